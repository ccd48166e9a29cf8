"""Depth-wise convolution with a weight gradient of our own.

The library's weight gradient of a depth-wise 7×7 convolution takes many times its forward and so dominates training on
CPUs (BENCHMARKS.md). Ours is C++ there; so are forward and input gradient, which leave an image where the operations
beside them want it. On CUDA there are Triton kernels for all three,
which run only where `$HORNET_LIT_TRITON` asks for them: they have not been measured on a GPU yet.

Shapes: B batch, C channels, H height, W width, K kernel size, S shares of the batch.
"""

from __future__ import annotations

import functools
import os
import warnings
from types import ModuleType

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from hornet_lit.network import native
from hornet_lit.network.layers import needed, observed
from hornet_lit.network.native.arguments import Convolution, Int, Pointer, map_like, pointer, rows
from hornet_lit.network.native.steps import Call, Steps
from hornet_lit.network.operations import operation, readable

KERNEL_SIZES = (3, 5, 7, 9, 11)
CONVOLUTIONS = {torch.float32: "depthwise_conv_f32", torch.bfloat16: "depthwise_conv_bf16"}
SYMBOLS = {torch.float32: "depthwise_weight_grad_f32", torch.bfloat16: "depthwise_weight_grad_bf16"}
TRITON_KERNELS = frozenset({"forward", "weight_grad"})  # the input gradient is a forward too
TRITON_DEVICE, TRITON_TYPES = "cuda", (torch.float32, torch.bfloat16, torch.float16)


def _asked_for(words: str) -> frozenset[str]:
    asked = frozenset(filter(None, map(str.strip, words.split(","))))
    if unknown := asked - TRITON_KERNELS:
        known = ",".join(sorted(TRITON_KERNELS))
        warnings.warn(
            f"HORNET_LIT_TRITON has no kernel {min(unknown)!r}: set it to {known} or to one of them", stacklevel=2
        )
    return asked & TRITON_KERNELS


TRITON = _asked_for(os.environ.get("HORNET_LIT_TRITON", ""))


def depthwise_conv2d(x_BCHW: torch.Tensor, weight_C1KK: torch.Tensor, bias_C: torch.Tensor | None) -> torch.Tensor:
    """Depth-wise K×K convolution, stride 1, zero-padded to keep H×W: `F.conv2d` with another way back on CPUs."""
    device = x_BCHW.device.type
    if observed() or device not in ("cpu", TRITON_DEVICE):
        return _by_library(x_BCHW, weight_C1KK, bias_C)
    x_BCHW, weight_C1KK, bias_C = _as_under_autocast(x_BCHW, weight_C1KK, bias_C)
    trained = needed(weight_C1KK)
    by_triton = device == TRITON_DEVICE and ("forward" in TRITON or (trained and "weight_grad" in TRITON))
    own = by_triton or (device == "cpu" and (trained or _by_native(x_BCHW, weight_C1KK, bias_C)))
    if own and needed(x_BCHW, weight_C1KK, bias_C):
        return _DepthwiseConv.apply(x_BCHW, weight_C1KK, bias_C)
    return (_convolved if own else _by_library)(x_BCHW, weight_C1KK, bias_C)


def _as_under_autocast(x_BCHW: torch.Tensor, *parameters: torch.Tensor | None) -> list[torch.Tensor | None]:
    device = x_BCHW.device.type
    if not torch.is_autocast_enabled(device) or x_BCHW.dtype == torch.float64:  # which autocast leaves alone
        return [x_BCHW, *parameters]
    dtype = torch.get_autocast_dtype(device)
    return [None if t is None else t.to(dtype) for t in (x_BCHW, *parameters)]


def _by_library(x_BCHW: torch.Tensor, weight_C1KK: torch.Tensor, bias_C: torch.Tensor | None) -> torch.Tensor:
    return F.conv2d(x_BCHW, weight_C1KK, bias_C, padding=weight_C1KK.shape[-1] // 2, groups=len(weight_C1KK))


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BCHW, weight_C1KK, bias_C):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x_BCHW, weight_C1KK)
        return _convolved(x_BCHW, weight_C1KK, bias_C)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BCHW):  # type: ignore[no-untyped-def]
        x_BCHW, weight_C1KK = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            # Stride 1 and an odd kernel: the input gradient is the convolution with the flipped kernel.
            grad_x = _convolved(grad_BCHW, weight_C1KK.flip((2, 3)), None)
        if ctx.needs_input_grad[1]:
            grad_weight, grad_bias = depthwise_weight_grad(x_BCHW, grad_BCHW, weight_C1KK.shape[-1])
        elif ctx.needs_input_grad[2]:
            grad_bias = grad_BCHW.sum((0, 2, 3))
        return grad_x, grad_weight, grad_bias if ctx.needs_input_grad[2] else None


def _convolved(x_BCHW: torch.Tensor, weight_C1KK: torch.Tensor, bias_C: torch.Tensor | None) -> torch.Tensor:
    if _by_triton("forward", x_BCHW) or _by_native(x_BCHW, weight_C1KK, bias_C):
        return depthwise_conv(x_BCHW, weight_C1KK, bias_C)
    return _by_library(x_BCHW, weight_C1KK, bias_C)


@operation("depthwise_conv")
def depthwise_conv(x_BCHW: torch.Tensor, weight_C1KK: torch.Tensor, bias_C: torch.Tensor | None) -> torch.Tensor:
    """Depth-wise convolution by the C++ or the Triton kernel, or the library where there are none; channels-last."""
    if _by_triton("forward", x_BCHW) and (triton := _triton()) is not None:
        return triton.convolve(x_BCHW, weight_C1KK, bias_C)
    if _by_native(x_BCHW, weight_C1KK, bias_C):
        y_BCHW = map_like(x_BCHW, x_BCHW.shape[1])
        _conv_call(x_BCHW, weight_C1KK, bias_C, y_BCHW).run(torch.get_num_threads())
        return y_BCHW
    return _by_library(x_BCHW, weight_C1KK, bias_C).contiguous(memory_format=torch.channels_last)


def _conv_call(
    x_BCHW: torch.Tensor, weight_C1KK: torch.Tensor, bias_C: torch.Tensor | None, y_BCHW: torch.Tensor
) -> Call:
    x_BHWC = rows(x_BCHW)
    b, h, w, c = x_BHWC.shape
    tensors = x_BHWC, weight_C1KK.contiguous(), None if bias_C is None else bias_C.contiguous(), y_BCHW
    arguments = Convolution(*map(pointer, tensors), b, h, w, c, weight_C1KK.shape[-1])
    return Call("depthwise", CONVOLUTIONS[x_BCHW.dtype], arguments, tensors)


def depthwise_conv2d_in_turn(
    x_BCHW: torch.Tensor, weight_C1KK: torch.Tensor, bias_C: torch.Tensor | None, steps: Steps
) -> torch.Tensor | None:
    """`depthwise_conv2d` as a call to be made later, added to ``steps``; None where no kernel serves."""
    x_BCHW, weight_C1KK, bias_C = _as_under_autocast(x_BCHW, weight_C1KK, bias_C)
    if not _by_native(x_BCHW, weight_C1KK, bias_C):
        return None
    y_BCHW = steps.map_like(x_BCHW, x_BCHW.shape[1])
    steps.calls.append(_conv_call(x_BCHW, weight_C1KK, bias_C, y_BCHW))
    return y_BCHW


@depthwise_conv.register_fake
def _(x_BCHW: torch.Tensor, weight_C1KK: torch.Tensor, bias_C: torch.Tensor | None) -> torch.Tensor:
    return torch.empty_like(x_BCHW, memory_format=torch.channels_last)


@operation("depthwise_weight_grad", maps=2)
def depthwise_weight_grad(
    x_BCHW: torch.Tensor, grad_BCHW: torch.Tensor, kernel_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients (C, 1, K, K) and (C) of a depth-wise convolution's weight and bias, accumulated in float32.

    Runs the C++ kernel where it is built in for this type and size and could be compiled, the Triton kernel on CUDA
    where `TRITON` has it; else the library's.
    """
    grad_BCHW = grad_BCHW.to(x_BCHW.dtype)  # all kernels read the two as one type
    if _by_triton("weight_grad", x_BCHW) and (triton := _triton()) is not None:
        return triton.weight_grad(x_BCHW, grad_BCHW, kernel_size)
    library = native.library("depthwise")
    if library is None or x_BCHW.dtype not in SYMBOLS or kernel_size not in KERNEL_SIZES or x_BCHW.device.type != "cpu":
        return _library_weight_grad(x_BCHW, grad_BCHW, kernel_size)
    x_BHWC, grad_BHWC = rows(x_BCHW), rows(grad_BCHW)
    b, h, w, c = x_BHWC.shape
    threads, vectors = torch.get_num_threads(), -(-c // library.lanes())
    shares = 1 if vectors % threads == 0 or vectors > 4 * threads else min(threads, b)  # few vectors share unevenly
    weight_SC1KK = x_BCHW.new_empty(shares, c, 1, kernel_size, kernel_size, dtype=torch.float32)
    bias_SC = x_BCHW.new_empty(shares, c, dtype=torch.float32)
    pointers = [Pointer(pointer(t)) for t in (x_BHWC, grad_BHWC, weight_SC1KK, bias_SC)]
    sizes = map(Int, (b, h, w, c, kernel_size, shares, threads))
    failed = getattr(library, SYMBOLS[x_BHWC.dtype])(*pointers, *sizes)
    assert not failed, f"no kernel for K = {kernel_size}"
    return weight_SC1KK.sum(0).to(x_BCHW.dtype), bias_SC.sum(0).to(x_BCHW.dtype)


@depthwise_weight_grad.register_fake
def _(x_BCHW: torch.Tensor, grad_BCHW: torch.Tensor, kernel_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    channels = x_BCHW.shape[1]
    return x_BCHW.new_empty(channels, 1, kernel_size, kernel_size), x_BCHW.new_empty(channels)


def _by_native(x_BCHW: torch.Tensor, weight_C1KK: torch.Tensor, bias_C: torch.Tensor | None) -> bool:
    dtype = x_BCHW.dtype
    if dtype not in CONVOLUTIONS or x_BCHW.ndim != 4 or not readable(x_BCHW, weight_C1KK, bias_C):
        return False
    # What does not fit is left to the library, which says so.
    channels, k = x_BCHW.shape[1], weight_C1KK.shape[-1]
    if k not in KERNEL_SIZES or weight_C1KK.dtype != dtype or weight_C1KK.shape != (channels, 1, k, k):
        return False
    if bias_C is not None and (bias_C.dtype != dtype or bias_C.shape != (channels,)):
        return False
    return native.offers("depthwise", "depthwise_conv_f32")


def _by_triton(what: str, x_BCHW: torch.Tensor) -> bool:
    return what in TRITON and x_BCHW.device.type == TRITON_DEVICE and x_BCHW.dtype in TRITON_TYPES


@functools.cache
def _triton() -> ModuleType | None:
    try:
        from hornet_lit.network import triton_depthwise
    except ImportError as error:
        warnings.warn(f"HORNET_LIT_TRITON has no effect, there is no Triton here: {error}", stacklevel=2)
        return None
    return triton_depthwise


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
