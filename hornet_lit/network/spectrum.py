"""The global filter (GFNet's, HorNet §3.3): real 2-d DFT, a learned complex weight for each of its numbers, and back.

On CPUs small maps go through four matrix products, in the channels-last layout that the rest of the network has: the
FFT transposes the map there and back, has no bfloat16, and ends what a compiler can fuse. Where C++ could be built
(native/spectrum.cpp) one kernel makes all four while a map lies in the cache. Large maps go through the FFT, whose cost
grows more slowly, and so does all on GPUs, where the products have not been measured yet.

Shapes: B batch, C channels, H height, W width, F = W // 2 + 1 columns of a real spectrum; G = 2F and L = 2H count real
and imaginary parts as rows of their own; P points in either direction.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from hornet_lit.network import native
from hornet_lit.network.layers import exporting, needed, observed
from hornet_lit.network.native.arguments import Filter, Pointer, map_like, pointer
from hornet_lit.network.native.steps import Call, Steps
from hornet_lit.network.operations import operation, readable

Size = tuple[int, int]
Products = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

# Longest side for which the products are faster than the FFT, by measurement (BENCHMARKS.md, Speed).
LONGEST_SIDE = {"cpu": {torch.float32: 24, torch.bfloat16: 48, torch.float64: 24}}
# The same for the kernel.
LONGEST_KERNEL_SIDE = {torch.float32: 48, torch.bfloat16: 40}
_products_of: dict[tuple[Size, torch.dtype, torch.device], Products] = {}
_all_of: dict[Size, list[torch.Tensor]] = {}


def filter_spectrum(x_BCHW: torch.Tensor, weight_CHF2: torch.Tensor) -> torch.Tensor:
    """irfft2(rfft2(x) ⊙ weight), both orthonormal: a circular convolution of the map's own size.

    In float32, or in bfloat16 with its usual rounding where the map or autocast is bfloat16 and the products are used.

    Args:
        x_BCHW: the map.
        weight_CHF2: real and imaginary parts; resized to (H, F) if it has another size, see `resize_spectrum`.
    """
    height, width = x_BCHW.shape[-2:]
    weight_CHF2 = resize_spectrum(weight_CHF2, (height, width // 2 + 1))
    device = x_BCHW.device.type
    if device in LONGEST_SIDE and not exporting():
        if _by_kernel(x_BCHW, weight_CHF2):
            weight_CHF2 = weight_CHF2.float()
            filtered = _Filter.apply if needed(x_BCHW, weight_CHF2) else _global_filter
            return filtered(x_BCHW, weight_CHF2)
        autocast = torch.is_autocast_enabled(device) and x_BCHW.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device) if autocast else x_BCHW.dtype
        if max(height, width) <= LONGEST_SIDE[device].get(dtype, 0):
            return by_products(x_BCHW.to(dtype), weight_CHF2)
    return by_fft(x_BCHW, weight_CHF2)


def filter_spectrum_in_turn(x_BCHW: torch.Tensor, weight_CHF2: torch.Tensor, steps: Steps) -> torch.Tensor | None:
    """The same as a call to be made later, added to ``steps``; None where no kernel serves."""
    height, width = x_BCHW.shape[-2:]
    weight_CHF2 = resize_spectrum(weight_CHF2, (height, width // 2 + 1)).float()
    if not _by_kernel(x_BCHW, weight_CHF2):
        return None
    y_BCHW = steps.map_like(x_BCHW, x_BCHW.shape[1])
    steps.calls.append(_filter_call(x_BCHW, weight_CHF2, y_BCHW))
    return y_BCHW


def by_fft(x_BCHW: torch.Tensor, weight_CHF2: torch.Tensor) -> torch.Tensor:
    """`filter_spectrum` in float32 by the FFT, in the map's own type."""
    x_BCHF = torch.fft.rfft2(x_BCHW.float(), norm="ortho")
    filtered_BCHF = x_BCHF * torch.view_as_complex(weight_CHF2.float().contiguous())
    return torch.fft.irfft2(filtered_BCHF, s=x_BCHW.shape[-2:], norm="ortho").to(x_BCHW.dtype)


def by_products(x_BCHW: torch.Tensor, weight_CHF2: torch.Tensor) -> torch.Tensor:
    """`filter_spectrum` in the map's type by products with the matrices of the DFT."""
    batch, channels, height, width = x_BCHW.shape
    columns = width // 2 + 1
    along_w_GW, along_h_LL, back_h_LL, back_w_WG = _products((height, width), x_BCHW)
    y = _left(along_w_GW, x_BCHW.permute(0, 2, 3, 1).reshape(batch * height, width, channels))
    y = _left(along_h_LL, y.view(batch, 2 * height, columns * channels))
    real_BHFC, imag_BHFC = y.view(batch, height, 2, columns, channels).unbind(2)
    by_real_HFC, by_imag_HFC = weight_CHF2.to(x_BCHW.dtype).permute(3, 1, 2, 0).contiguous()
    filtered = (
        torch.addcmul(real_BHFC * by_real_HFC, imag_BHFC, by_imag_HFC, value=-1),
        torch.addcmul(real_BHFC * by_imag_HFC, imag_BHFC, by_real_HFC),
    )
    y = _left(back_h_LL, torch.stack(filtered, dim=2).view(batch, 2 * height, columns * channels))
    y = _left(back_w_WG, y.view(batch * height, 2 * columns, channels))
    return y.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _by_kernel(x_BCHW: torch.Tensor, weight_CHF2: torch.Tensor) -> bool:
    if max(x_BCHW.shape[-2:]) > LONGEST_KERNEL_SIDE.get(x_BCHW.dtype, 0) or not readable(x_BCHW, weight_CHF2):
        return False
    # What does not fit is left to the library, which says so.
    return len(weight_CHF2) == x_BCHW.shape[1] and not observed() and _built()


def _built() -> bool:
    return native.offers("spectrum", "filter_f32")


def _pixels(x_BCHW: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The map as (B, H, W, C) whose pixels lie at one distance from each other, without a copy of half of a map; and
    that distance."""
    x_BHWC = x_BCHW.permute(0, 2, 3, 1)
    _, height, width, channels = x_BHWC.shape
    pitch = x_BHWC.stride(2)
    if x_BHWC.stride() == (height * width * pitch, width * pitch, pitch, 1):
        return x_BHWC, pitch
    return x_BHWC.contiguous(), channels


def _call(name: str, x_BCHW: torch.Tensor, **tensors: torch.Tensor) -> Call:
    x_BHWC, x_pitch = _pixels(x_BCHW)
    b, h, w, c = x_BHWC.shape
    matrices = _matrices((h, w))
    arguments = Filter(B=b, H=h, W=w, C=c, x=pointer(x_BHWC), x_pitch=x_pitch)
    arguments.matrices = (Pointer * 8)(*map(pointer, matrices))
    if "dy" in tensors:
        tensors["dy"], arguments.dy_pitch = _pixels(tensors["dy"])
    for field, tensor in tensors.items():
        setattr(arguments, field, pointer(tensor))
    name += "_f32" if x_BHWC.dtype == torch.float32 else "_bf16"
    return Call("spectrum", name, arguments, (x_BHWC, tensors, matrices))


def _filter_call(x_BCHW: torch.Tensor, weight_CHF2: torch.Tensor, y_BCHW: torch.Tensor) -> Call:
    return _call("filter", x_BCHW, weight=weight_CHF2.contiguous(), y=y_BCHW)


@operation("global_filter")
def _global_filter(x_BCHW: torch.Tensor, weight_CHF2: torch.Tensor) -> torch.Tensor:
    y_BCHW = map_like(x_BCHW, x_BCHW.shape[1])
    _filter_call(x_BCHW, weight_CHF2, y_BCHW).run(torch.get_num_threads())
    return y_BCHW


@_global_filter.register_fake
def _(x_BCHW, weight_CHF2):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_BCHW, memory_format=torch.channels_last)


@operation("global_filter_backward")
def _global_filter_backward(
    dy_BCHW: torch.Tensor, x_BCHW: torch.Tensor, weight_CHF2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    weight_CHF2 = weight_CHF2.contiguous()
    dx_BCHW, dweight_CHF2 = map_like(x_BCHW, x_BCHW.shape[1]), torch.empty_like(weight_CHF2)
    call = _call("filter_backward", x_BCHW, weight=weight_CHF2, dy=dy_BCHW, dx=dx_BCHW, dweight=dweight_CHF2)
    call.run(torch.get_num_threads())
    return dx_BCHW, dweight_CHF2


@_global_filter_backward.register_fake
def _(dy_BCHW, x_BCHW, weight_CHF2):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_BCHW, memory_format=torch.channels_last), weight_CHF2.new_empty(weight_CHF2.shape)


class _Filter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BCHW, weight_CHF2):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x_BCHW, weight_CHF2)
        return _global_filter(x_BCHW, weight_CHF2)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BCHW):  # type: ignore[no-untyped-def]
        return _global_filter_backward(dy_BCHW, *ctx.saved_tensors)


def resize_spectrum(weight_CHF2: torch.Tensor, size: Size) -> torch.Tensor:
    """Resize a stored complex weight (C, H, F, 2) bilinearly (align_corners) to ``size`` = (H', F'), real and imaginary
    part alike and in float32, as the published code does; the tensor itself where the size fits."""
    if tuple(weight_CHF2.shape[1:3]) == tuple(size):
        return weight_CHF2
    weight_2CHF = weight_CHF2.float().permute(3, 0, 1, 2)
    return F.interpolate(weight_2CHF, size=size, mode="bilinear", align_corners=True).permute(1, 2, 3, 0)


def _left(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.bmm(matrix.expand(x.shape[0], -1, -1), x)


def _products(size: Size, like: torch.Tensor) -> Products:
    """The matrices of `_dft` for tensors like that one, kept from call to call; but where a graph is traced, or tensors
    only pretend to hold data, they become the tracer's own."""
    if torch.compiler.is_compiling() or type(like) is not torch.Tensor:
        return _dft(size, like.dtype, like.device)
    key = ((int(size[0]), int(size[1])), like.dtype, like.device)
    if key not in _products_of:
        with torch.inference_mode(False):  # kept tensors must serve training too
            return _products_of.setdefault(key, _dft(size, like.dtype, like.device))
    return _products_of[key]


def _matrices(size: Size) -> list[torch.Tensor]:
    """For the kernel: the four matrices in float32 and those turned, kept like them."""
    if size not in _all_of:
        products = _products(size, torch.empty(0, dtype=torch.float32, device="cpu"))
        with torch.inference_mode(False):
            # Another thread may have been faster, and be at work with its own.
            return _all_of.setdefault(size, [*products, *(matrix.T.contiguous() for matrix in products)])
    return _all_of[size]


def _dft(size: Size, dtype: torch.dtype, device: torch.device) -> Products:
    """The orthonormal DFT as products from the left: along W from real rows to F complex ones (G, W), along H from
    complex to complex (L, L), and the two ways back (L, L), (W, G)."""
    height, width = size
    columns = width // 2 + 1
    cos_FW, sin_FW = _waves(columns, width, device)
    along_w_GW = torch.cat((cos_FW, -sin_FW))
    # On the way back a column stands for its mirror image too, if it has one.
    column_F = torch.arange(columns, device=device)
    twice_F = torch.where((column_F == 0) | (2 * column_F == width), 1.0, 2.0).double()
    back_w_WG = (along_w_GW * twice_F.repeat(2)[:, None]).T.contiguous()
    cos_HH, sin_HH = _waves(height, height, device)
    # Row (k, part) gathers column (h, part): e^{-iφ}(a + ib) = (a cos φ + b sin φ) + i(b cos φ - a sin φ).
    along_h = torch.stack((torch.stack((cos_HH, sin_HH), dim=-1), torch.stack((-sin_HH, cos_HH), dim=-1)), dim=1)
    along_h_LL = along_h.reshape(2 * height, 2 * height)
    every = (along_w_GW, along_h_LL, along_h_LL.T.contiguous(), back_w_WG)
    return tuple(matrix.to(dtype) for matrix in every)  # type: ignore[return-value]


def _waves(frequencies: int, points: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of 2π·k·j / points in float64, divided by √points."""
    index_F, index_P = (torch.arange(n, device=device) for n in (frequencies, points))
    turns = index_F[:, None] * index_P % points
    angles = turns.double() * (2 * math.pi / points)
    return angles.cos() / math.sqrt(points), angles.sin() / math.sqrt(points)
