"""What the kernels of pixelwise.cpp are given: its structures, field by field."""

from __future__ import annotations

import ctypes

import torch

MAX_ORDER = 16  # of gnConv
Pointer, Int = ctypes.c_void_p, ctypes.c_int64


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Norm(ctypes.Structure):
    _fields_ = [("weight", Pointer), ("bias", Pointer), ("eps", ctypes.c_float)]


class Linear(ctypes.Structure):
    _fields_ = [("x", Pointer), ("K", Int), ("N", Int), ("P", Int), ("norm", Norm)]
    _fields_ += [(name, Pointer) for name in ("w", "b", "p", "q", "dx", "dw", "dvectors")]


class Mlp(ctypes.Structure):
    _fields_ = [("x", Pointer), ("C", Int), ("N", Int), ("norm", Norm)]
    _fields_ += [(name, Pointer) for name in ("w1", "b1", "w2", "b2", "scale", "h", "y")]
    _fields_ += [("residual", Int)]
    _fields_ += [(name, Pointer) for name in ("dy", "dx", "dw1", "dw2", "dvectors", "dscale")]


class Gates(ctypes.Structure):
    _fields_ = [("p", Pointer), ("gates", Pointer), ("C", Int), ("order", Int), ("first", Int)]
    _fields_ += [("w", Pointer * MAX_ORDER), ("b", Pointer * MAX_ORDER)]
    _fields_ += [(name, Pointer) for name in ("scale", "x", "y", "dy")]
    _fields_ += [("dp", Pointer), ("dgates", Pointer), ("dw", Pointer * MAX_ORDER)]
    _fields_ += [("dvectors", Pointer), ("dscale", Pointer)]
