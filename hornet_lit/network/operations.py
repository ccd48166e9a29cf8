"""Operations of our own: custom ops of PyTorch's to whoever traces or counts, and plain calls to everybody else.

The dispatcher's way through a custom op written in Python takes longer than most of what such a call has to do, and
more so between kernels that empty the caches (BENCHMARKS.md, Speed).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

LIBRARY = torch.library.Library("hornet_lit", "FRAGMENT")
PLAIN = (torch.Tensor, nn.Parameter)


def operation(name: str, maps: int = 1) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as ``hornet_lit::name``, which mutates nothing it is given and gives nothing of it back.

    What is called under its name afterwards is the function itself, unless a graph is traced or the dispatcher has to
    hear of it (see `dispatched`) because of its first ``maps`` arguments. Its callers have looked at the others.
    """

    def registered(function: Callable[..., Any]) -> Callable[..., Any]:
        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        custom_op = getattr(torch.ops.hornet_lit, name).default

        @functools.wraps(function)
        def called(*arguments: Any) -> Any:
            traced = torch.compiler.is_compiling() or dispatched(*arguments[:maps])
            return custom_op(*arguments) if traced else function(*arguments)

        called.register_fake = torch.library.register_fake(f"hornet_lit::{name}", lib=LIBRARY)  # type: ignore[attr-defined]
        return called

    return registered


def dispatched(*maps: torch.Tensor | Sequence[torch.Tensor]) -> bool:
    """Whether the dispatcher has to hear of a call with these maps, or lists of them: a dispatch mode is on (as of fake
    tensors or operation counters) or a functorch transform, a profiler runs, or one is not what its memory holds."""
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active():
        return True
    if torch.autograd.profiler._is_profiler_enabled:
        return True
    for one in maps:
        for x_BCHW in (one,) if isinstance(one, torch.Tensor) else one:
            if type(x_BCHW) not in PLAIN or x_BCHW.is_meta or x_BCHW.is_neg():
                return True
            if torch._C._functorch.is_legacy_batchedtensor(x_BCHW):  # as gradients of many losses at once are
                return True
    return False


def readable(*tensors: torch.Tensor | None) -> bool:
    """Whether kernels for CPUs may read these tensors where they lie: they are of no type of their own, have data, and
    are not still to be negated."""
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in PLAIN or not tensor.is_cpu):
            return False
    return torch.compiler.is_compiling() or not any([t is not None and t.is_neg() for t in tensors])
