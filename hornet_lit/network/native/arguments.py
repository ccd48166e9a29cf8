"""What the kernels are given: maps as rows of channels, and the structures of pixelwise.h, depthwise.cpp and
spectrum.cpp, field by field.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

MAX_ORDER = 16  # of gnConv
MAX_SIDE = 4  # of patches
Pointer, Int = ctypes.c_void_p, ctypes.c_int64
Pointers = Pointer * MAX_ORDER


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def rows(x_BCHW: torch.Tensor) -> torch.Tensor:
    """The map as contiguous (B, H, W, C)."""
    return x_BCHW.permute(0, 2, 3, 1).contiguous()


NewMap = Callable[[torch.Tensor, int, torch.dtype], torch.Tensor]  # such as:


def map_like(x_BCHW: torch.Tensor, channels: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An empty channels-last map of x's batch and size; no view, of which FSDP2 would warn."""
    size = x_BCHW.shape[0], channels, *x_BCHW.shape[2:]
    dtype = dtype or x_BCHW.dtype
    return torch.empty(size, dtype=dtype, device=x_BCHW.device, memory_format=torch.channels_last)


class Norm(ctypes.Structure):
    _fields_ = [("weight", Pointer), ("bias", Pointer), ("eps", ctypes.c_float)]


class Linear(ctypes.Structure):
    _fields_ = [("x", Pointer), *((name, Int) for name in ("K", "S", "height", "width", "N", "P")), ("norm", Norm)]
    _fields_ += [(name, Pointer) for name in ("w", "b", "p", "q", "r")]
    _fields_ += [("then", Norm)]
    _fields_ += [(name, Pointer) for name in ("kept", "dx", "dw", "dvectors")]


class Mlp(ctypes.Structure):
    _fields_ = [("x", Pointer), ("C", Int), ("N", Int), ("norm", Norm)]
    _fields_ += [(name, Pointer) for name in ("w1", "b1", "w2", "b2", "scale", "h", "y")]
    _fields_ += [("residual", Int)]
    _fields_ += [(name, Pointer) for name in ("dy", "dx", "dw1", "dw2", "dvectors", "dscale")]


class Gates(ctypes.Structure):
    _fields_ = [("p", Pointer), ("gates", Pointer), ("others", Pointer), ("norm", Norm)]
    _fields_ += [("C", Int), ("order", Int), ("first", Int)]
    _fields_ += [("w", Pointers), ("b", Pointers)]
    _fields_ += [(name, Pointer) for name in ("scale", "x", "y", "dy")]
    _fields_ += [("dp", Pointer), ("dgates", Pointer), ("dothers", Pointer), ("dw", Pointers)]
    _fields_ += [("dvectors", Pointer), ("dscale", Pointer)]


class Convolution(ctypes.Structure):
    _fields_ = [(name, Pointer) for name in ("x", "w", "bias", "y")]
    _fields_ += [(name, Int) for name in ("B", "H", "W", "C", "K")]


class Filter(ctypes.Structure):
    _fields_ = [("x", Pointer), ("dy", Pointer)]
    _fields_ += [(name, Int) for name in ("B", "H", "W", "C", "x_pitch", "dy_pitch")]
    _fields_ += [("weight", Pointer), ("matrices", Pointer * 8)]
    _fields_ += [(name, Pointer) for name in ("y", "dx", "dweight")]
