"""Depth-wise convolution with a weight gradient of our own on CPUs.

The library's weight gradient of a depth-wise 7×7 convolution takes many times its forward and so dominates training on
CPUs (BENCHMARKS.md). Forward and input gradient stay the library's.

Shapes: B batch, C channels, H height, W width, K kernel size, S shares of the batch.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from hornet_lit.network import native

KERNEL_SIZES = (3, 5, 7, 9, 11)
LANES = 16  # channels of one vector
SYMBOLS = {torch.float32: "depthwise_weight_grad_f32", torch.bfloat16: "depthwise_weight_grad_bf16"}


def depthwise_conv2d(x_BCHW: torch.Tensor, weight_C1KK: torch.Tensor, bias_C: torch.Tensor | None) -> torch.Tensor:
    """Depth-wise K×K convolution, stride 1, zero-padded to keep H×W: `F.conv2d` with another way back on CPUs."""
    trained = torch.is_grad_enabled() and weight_C1KK.requires_grad and not torch.compiler.is_exporting()
    if not trained or x_BCHW.device.type != "cpu":
        return F.conv2d(x_BCHW, weight_C1KK, bias_C, padding=weight_C1KK.shape[-1] // 2, groups=len(weight_C1KK))
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x_BCHW, weight_C1KK = x_BCHW.to(dtype), weight_C1KK.to(dtype)
        bias_C = None if bias_C is None else bias_C.to(dtype)
    return _DepthwiseConv.apply(x_BCHW, weight_C1KK, bias_C)


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BCHW, weight_C1KK, bias_C):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x_BCHW, weight_C1KK)
        ctx.has_bias = bias_C is not None
        return F.conv2d(x_BCHW, weight_C1KK, bias_C, padding=weight_C1KK.shape[-1] // 2, groups=len(weight_C1KK))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BCHW):  # type: ignore[no-untyped-def]
        x_BCHW, weight_C1KK = ctx.saved_tensors
        kernel_size, channels = weight_C1KK.shape[-1], len(weight_C1KK)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            # Stride 1 and an odd kernel: the input gradient is the convolution with the flipped kernel.
            flipped = weight_C1KK.flip((2, 3))
            grad_x = F.conv2d(grad_BCHW, flipped, padding=kernel_size // 2, groups=channels)
        if ctx.needs_input_grad[1]:
            grad_weight, grad_bias = depthwise_weight_grad(x_BCHW, grad_BCHW, kernel_size)
        return grad_x, grad_weight, grad_bias if ctx.has_bias else None


@torch.library.custom_op("hornet_lit::depthwise_weight_grad", mutates_args=())
def depthwise_weight_grad(
    x_BCHW: torch.Tensor, grad_BCHW: torch.Tensor, kernel_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients (C, 1, K, K) and (C) of a depth-wise convolution's weight and bias, accumulated in float32.

    Runs the C++ kernel where it is built in for this type and size and could be compiled; else the library's.
    """
    grad_BCHW = grad_BCHW.to(x_BCHW.dtype)  # both kernels read the two as one type
    library = native.library()
    if library is None or x_BCHW.dtype not in SYMBOLS or kernel_size not in KERNEL_SIZES or x_BCHW.device.type != "cpu":
        return _library_weight_grad(x_BCHW, grad_BCHW, kernel_size)
    x_BHWC, grad_BHWC = (t.permute(0, 2, 3, 1).contiguous() for t in (x_BCHW, grad_BCHW))
    b, h, w, c = x_BHWC.shape
    threads, vectors = torch.get_num_threads(), -(-c // LANES)
    shares = 1 if vectors % threads == 0 or vectors > 4 * threads else min(threads, b)  # few vectors share unevenly
    weight_SC1KK = torch.empty(shares, c, 1, kernel_size, kernel_size)
    bias_SC = torch.empty(shares, c)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x_BHWC, grad_BHWC, weight_SC1KK, bias_SC)]
    sizes = [ctypes.c_int64(n) for n in (b, h, w, c, kernel_size, shares, threads)]
    failed = getattr(library, SYMBOLS[x_BHWC.dtype])(*pointers, *sizes)
    assert not failed, f"no kernel for K = {kernel_size}"
    return weight_SC1KK.sum(0).to(x_BCHW.dtype), bias_SC.sum(0).to(x_BCHW.dtype)


@depthwise_weight_grad.register_fake
def _(x_BCHW: torch.Tensor, grad_BCHW: torch.Tensor, kernel_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    channels = x_BCHW.shape[1]
    return x_BCHW.new_empty(channels, 1, kernel_size, kernel_size), x_BCHW.new_empty(channels)


def _library_weight_grad(
    x_BCHW: torch.Tensor, grad_BCHW: torch.Tensor, kernel_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    channels = x_BCHW.shape[1]
    weight_C1KK = x_BCHW.new_empty(channels, 1, kernel_size, kernel_size)
    padding, ones = [kernel_size // 2] * 2, [1, 1]
    _, weight, bias = torch.ops.aten.convolution_backward(
        grad_BCHW, x_BCHW, weight_C1KK, [channels], ones, padding, ones, False, [0, 0], channels, [False, True, True]
    )
    return weight, bias
