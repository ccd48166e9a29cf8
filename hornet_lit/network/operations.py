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

    What is called under its name afterwards is the function itself, unless a graph is traced or the dispatcher has to
    hear of it (see `dispatched`).
    """

    def registered(function: Callable[..., Any]) -> Callable[..., Any]:
        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        custom_op = getattr(torch.ops.hornet_lit, name).default

        @functools.wraps(function)
        def called(*arguments: Any) -> Any:
            traced = torch.compiler.is_compiling() or dispatched(*arguments)
            return custom_op(*arguments) if traced else function(*arguments)

        called.register_fake = torch.library.register_fake(f"hornet_lit::{name}", lib=LIBRARY)  # type: ignore[attr-defined]
        return called

    return registered


def dispatched(*arguments: Any) -> bool:
    """Whether the dispatcher has to hear of a call with these arguments: a dispatch mode is on (as of fake tensors or
    operation counters) or a functorch transform, a profiler runs, or a tensor among them is not `plain`."""
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active():
        return True
    if torch.autograd.profiler._is_profiler_enabled:
        return True
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            if not plain(argument):
                return True
        elif isinstance(argument, list | tuple) and not plain(*argument):
            return True
    return False


def plain(*values: Any) -> bool:
    """Whether the tensors among these are what their memory holds: they have some, are of no type of their own, and
    nothing is still to be negated or one of a batch's gradients."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if any([type(tensor) not in PLAIN or tensor.is_meta for tensor in tensors]):
        return False
    if torch.compiler.is_compiling():
        return True
    return not any([tensor.is_neg() or torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors])


def readable(*tensors: torch.Tensor | None) -> bool:
    """Whether kernels for CPUs may read these tensors where they lie."""
    return plain(*tensors) and all([tensor is None or tensor.is_cpu for tensor in tensors])
