"""Depth-wise convolution and its weight gradient as Triton kernels for CUDA, on channels-last maps.

Both read a map in tiles of pixels by channels, as it lies in memory, with one step from pixel to pixel: so a slice of
channels, gnConv's q, needs no copy. Sums are in float32.

Shapes: B batch, C channels (in a kernel: those of a tile), H height, W width, K kernel size, P pixels of a tile, S
shares of the pixels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Of tiles. gnConv's widths are multiples of 32 in all published networks; and with these sizes, in Triton's four warps,
# the loops hold no access to shared memory and no barrier (read off their PTX; tests/network/test_triton.py).
CHANNELS, PIXELS, PIXELS_IN_SUMS = 32, 64, 32
PROGRAMS = 4096  # that the weight gradient aims at: some for each multiprocessor of the largest GPUs


@triton.jit
def convolve_kernel(
    x_ptr,
    weight_ptr,  # (K, K, C)
    bias_ptr,
    y_ptr,
    pixels,
    height,
    width,
    channels,
    x_step,
    HAS_BIAS: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
):
    p_P = tl.program_id(0) * P + tl.arange(0, P)
    c_C = tl.program_id(1) * C + tl.arange(0, C)
    row_P, column_P, there_C = p_P // width % height, p_P % width, c_C < channels
    sum_PC = tl.zeros((P, C), tl.float32)
    if HAS_BIAS:
        sum_PC += tl.load(bias_ptr + c_C, mask=there_C, other=0.0).to(tl.float32)[None, :]
    for i in range(K):
        down = i - K // 2
        in_rows_P = (p_P < pixels) & (row_P + down >= 0) & (row_P + down < height)
        for j in tl.static_range(K):
            right = j - K // 2
            inside_P = in_rows_P & (column_P + right >= 0) & (column_P + right < width)
            from_P = (p_P + down * width + right).to(tl.int64) * x_step
            x_PC = tl.load(x_ptr + from_P[:, None] + c_C[None, :], mask=inside_P[:, None] & there_C[None, :], other=0.0)
            weight_C = tl.load(weight_ptr + (i * K + j) * channels + c_C, mask=there_C, other=0.0)
            sum_PC += x_PC.to(tl.float32) * weight_C.to(tl.float32)[None, :]
    to_PC = p_P.to(tl.int64)[:, None] * channels + c_C[None, :]
    tl.store(y_ptr + to_PC, sum_PC.to(y_ptr.dtype.element_ty), mask=(p_P < pixels)[:, None] & there_C[None, :])


@triton.jit
def weight_sums_kernel(
    x_ptr,
    grad_ptr,
    sums_ptr,  # (S, K, K, C)
    bias_ptr,  # (S, C)
    pixels,
    share,
    height,
    width,
    channels,
    x_step,
    grad_step,
    K: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
):
    # Rows of the kernel are the fastest of the programs' indices: those that read the same pixels run together.
    i, s = tl.program_id(0), tl.program_id(2)
    c_C = tl.program_id(1) * C + tl.arange(0, C)
    down, there_C = i - K // 2, c_C < channels
    last = tl.minimum((s + 1) * share, pixels)
    bias_PC, sums = tl.zeros((P, C), tl.float32), ()
    for _ in tl.static_range(K):
        sums += (tl.zeros((P, C), tl.float32),)
    for start in tl.range(s * share, last, P, num_stages=1):  # more stages would go through shared memory
        p_P = start + tl.arange(0, P)
        row_P, column_P = p_P // width % height + down, p_P % width
        at_PC = p_P.to(tl.int64)[:, None] * grad_step + c_C[None, :]
        grad_PC = tl.load(grad_ptr + at_PC, mask=(p_P < last)[:, None] & there_C[None, :], other=0.0).to(tl.float32)
        in_rows_P = (p_P < last) & (row_P >= 0) & (row_P < height)
        added = ()
        for j in tl.static_range(K):
            right = j - K // 2
            inside_P = in_rows_P & (column_P + right >= 0) & (column_P + right < width)
            from_P = (p_P + down * width + right).to(tl.int64) * x_step
            x_PC = tl.load(x_ptr + from_P[:, None] + c_C[None, :], mask=inside_P[:, None] & there_C[None, :], other=0.0)
            added += (sums[j] + x_PC.to(tl.float32) * grad_PC,)
        sums = added
        bias_PC += grad_PC
    for j in tl.static_range(K):
        tl.store(sums_ptr + ((s * K + i) * K + j) * channels + c_C, tl.sum(sums[j], axis=0), mask=there_C)
    if i == 0:
        tl.store(bias_ptr + s * channels + c_C, tl.sum(bias_PC, axis=0), mask=there_C)


def convolve(x_BCHW: torch.Tensor, weight_C1KK: torch.Tensor, bias_C: torch.Tensor | None) -> torch.Tensor:
    """Depth-wise K×K convolution, stride 1, zero-padded to keep H×W; in the map's type, channels-last."""
    b, c, h, w = x_BCHW.shape
    (x_BHWC, x_step), k = _pixel_by_pixel(x_BCHW), weight_C1KK.shape[-1]
    weight_KKC = weight_C1KK[:, 0].permute(1, 2, 0).contiguous()
    y_BHWC = torch.empty(b, h, w, c, dtype=x_BCHW.dtype, device=x_BCHW.device)
    pixels = b * h * w
    grid = triton.cdiv(pixels, PIXELS), triton.cdiv(c, CHANNELS)
    with torch.cuda.device_of(x_BCHW):
        convolve_kernel[grid](
            x_BHWC,
            weight_KKC,
            weight_KKC if bias_C is None else bias_C.contiguous(),
            y_BHWC,
            pixels,
            h,
            w,
            c,
            x_step,
            HAS_BIAS=bias_C is not None,
            K=k,
            P=PIXELS,
            C=CHANNELS,
        )
    return y_BHWC.permute(0, 3, 1, 2)


def weight_grad(x_BCHW: torch.Tensor, grad_BCHW: torch.Tensor, kernel_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients (C, 1, K, K) and (C) of weight and bias, in the map's type."""
    b, c, h, w = x_BCHW.shape
    x_BHWC, x_step = _pixel_by_pixel(x_BCHW)
    grad_BHWC, grad_step = _pixel_by_pixel(grad_BCHW)
    k, pixels = kernel_size, b * h * w
    shares = max(1, min(triton.cdiv(PROGRAMS, k * triton.cdiv(c, CHANNELS)), pixels // (8 * PIXELS_IN_SUMS)))
    sums_SKKC = torch.empty(shares, k, k, c, device=x_BCHW.device)
    bias_SC = torch.empty(shares, c, device=x_BCHW.device)
    with torch.cuda.device_of(x_BCHW):
        weight_sums_kernel[(k, triton.cdiv(c, CHANNELS), shares)](
            x_BHWC,
            grad_BHWC,
            sums_SKKC,
            bias_SC,
            pixels,
            triton.cdiv(pixels, shares),
            h,
            w,
            c,
            x_step,
            grad_step,
            K=k,
            P=PIXELS_IN_SUMS,
            C=CHANNELS,
        )
    weight_C1KK = sums_SKKC.sum(0).permute(2, 0, 1)[:, None].contiguous()
    return weight_C1KK.to(x_BCHW.dtype), bias_SC.sum(0).to(x_BCHW.dtype)


def _pixel_by_pixel(x_BCHW: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(B, H, W, C) with the channels of a pixel side by side, and the one step from each pixel to the next."""
    x_BHWC = x_BCHW.permute(0, 2, 3, 1)
    h, w, c = x_BHWC.shape[1:]
    step = x_BHWC.stride(2)
    if step >= c and x_BHWC.stride() == (h * w * step, w * step, step, 1):
        return x_BHWC, step
    return x_BHWC.contiguous(), c
