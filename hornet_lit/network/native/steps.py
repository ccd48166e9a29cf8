"""Kernels that each thread runs one after another for its images, without waiting for the other threads."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from hornet_lit.network.native import library
from hornet_lit.network.native.arguments import map_like


@dataclass(frozen=True)
class Call:
    """A kernel of the library ``name``, which must have been built, and what it is given. The tensors to which
    ``arguments`` points stay alive as long as this does."""

    name: str
    kernel: str
    arguments: ctypes.Structure
    tensors: tuple[Any, ...] = ()

    def run(self, *sizes: int) -> None:
        getattr(library(self.name), self.kernel)(ctypes.byref(self.arguments), *map(ctypes.c_int64, sizes))


class _Step(ctypes.Structure):
    _fields_ = [("run", ctypes.c_void_p), ("arguments", ctypes.c_void_p)]


@dataclass
class Steps:
    """Calls to be made later, and the maps that they fill then.

    Blocks of equal shapes share maps, hardly more than one block needs: what lies in them is no longer needed when the
    next block's kernels write there, but for that block's input. For a thread makes its calls in their order, and no
    other thread has its images.
    """

    calls: list[Call] = field(default_factory=list)
    maps: list[torch.Tensor] = field(default_factory=list)
    _taken: int = 0  # of the maps, by the block that is being prepared
    _input: torch.Tensor | None = None
    _spare: torch.Tensor | None = None

    def begin(self, x_BCHW: torch.Tensor) -> None:
        """With another block, of this input."""
        self._taken, self._input = 0, x_BCHW

    def map_like(self, x_BCHW: torch.Tensor, channels: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """`arguments.map_like`, or such a map that a block before has had in this place."""
        shape, dtype = (x_BCHW.shape[0], channels, *x_BCHW.shape[2:]), dtype or x_BCHW.dtype
        known = self.maps[self._taken] if self._taken < len(self.maps) else None
        if known is not None and known is self._input:
            known, self._spare = self._spare, known
        if known is None or known.shape != shape or known.dtype != dtype:
            known = map_like(x_BCHW, channels, dtype)
        self.maps[self._taken : self._taken + 1] = [known]
        self._taken += 1
        return known

    def run(self, x_BCHW: torch.Tensor) -> None:
        """Makes all calls, for maps of x's batch and size."""
        if not self.calls:
            return
        batch, _, height, width = x_BCHW.shape
        steps = (_Step * len(self.calls))()
        for step, call in zip(steps, self.calls, strict=True):
            step.run, step.arguments = _address(call.name, f"{call.kernel}_part"), ctypes.addressof(call.arguments)
        sizes = len(steps), batch, height * width, torch.get_num_threads()
        library("pixelwise").run_steps(steps, *map(ctypes.c_int64, sizes))


@functools.cache
def _address(name: str, symbol: str) -> int | None:
    return ctypes.cast(getattr(library(name), symbol), ctypes.c_void_p).value
