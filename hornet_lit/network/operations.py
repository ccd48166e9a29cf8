"""Operations of our own: custom ops of PyTorch's to whoever traces or counts, and plain calls to everybody else.

The dispatcher's way through a custom op written in Python takes longer than most of what such a call has to do, and
more so between kernels that empty the caches (BENCHMARKS.md, Speed).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

LIBRARY = torch.library.Library("hornet_lit", "FRAGMENT")
PLAIN = (torch.Tensor, nn.Parameter)


def operation(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as ``hornet_lit::name``, which mutates nothing it is given and gives nothing of it back.

    What is called under its name afterwards is the function itself, unless a graph is traced, a dispatch mode is on (as
    of fake tensors or operation counters), a profiler runs, or its first tensor is of a type of its own or has no data.
    """

    def registered(function: Callable[..., Any]) -> Callable[..., Any]:
        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        custom_op = getattr(torch.ops.hornet_lit, name).default

        @functools.wraps(function)
        def called(first: Any, *others: Any) -> Any:
            traced = torch.compiler.is_compiling() or dispatched(first)
            return custom_op(first, *others) if traced else function(first, *others)

        called.register_fake = torch.library.register_fake(f"hornet_lit::{name}", lib=LIBRARY)  # type: ignore[attr-defined]
        return called

    return registered


def dispatched(first: Any) -> bool:
    """Whether the dispatcher has to hear of a call with this first tensor, or list of tensors."""
    tensor = first if isinstance(first, torch.Tensor) else first[0]
    if type(tensor) not in PLAIN or tensor.is_meta:
        return True
    return torch._C._len_torch_dispatch_stack() > 0 or torch.autograd.profiler._is_profiler_enabled
