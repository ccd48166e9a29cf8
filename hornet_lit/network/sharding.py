"""Sharding a network by block with FSDP2 (torch.distributed.fsdp.fully_shard)."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


def shard(network: nn.Module, mesh: DeviceMesh, *, dtype: torch.dtype | None = None) -> None:
    """Shard ``network`` in place over ``mesh``: each block of its stages a unit of its own, the rest one unit.

    Everything is resharded after the forward pass, the root too, so that no stale gathered copy survives when the
    shards themselves are rewritten (as when the averaged weights are swapped in).

    Args:
        network: with `stages`, `blocks` or `layers`.
        mesh: one-dimensional.
        dtype: of the autocast that the network runs under, if it does: the weights that autocast would convert are
            then gathered in it. The shards that the optimizer sees keep their type; gradients are reduced in float32.

    Raises:
        ValueError: if the network has no `stages`, `blocks` or `layers` to shard by.
    """
    containers = [getattr(network, name) for name in ("stages", "blocks", "layers") if hasattr(network, name)]
    if not containers:
        raise ValueError(f"{type(network).__name__} has no stages, blocks or layers to shard by: train it with ddp")
    options = {"mesh": mesh, "reshard_after_forward": True, "mp_policy": _policy(network, dtype)}
    for container in containers:
        for unit in container:
            for block in unit if isinstance(unit, nn.Sequential | nn.ModuleList) else [unit]:
                fully_shard(block, **options)
    fully_shard(network, **options)
    assert all(isinstance(p, DTensor) for p in network.parameters()), "a parameter was left unsharded"


def _policy(network: nn.Module, dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    """Autocast stays in charge of what is computed in which type, so that FSDP2 computes what ddp does.

    With all parameters and inputs in bfloat16, as FSDP2 would have them, LayerScale, norms and the residual stream lose
    their float32, and the losses differ more from those of float32 (BENCHMARKS.md). Choosing by parameter needs
    torch 2.15; before, all are gathered in float32.
    """
    chosen = {}
    if dtype is not None and "param_dtype_override_fn" in MixedPrecisionPolicy.__dataclass_fields__:
        dense = (m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d) and getattr(m, "groups", 1) == 1)
        cast = {id(m.weight) for m in dense}
        chosen = {"param_dtype": dtype, "param_dtype_override_fn": lambda p: None if id(p) in cast else p.dtype}
    return MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False, **chosen)
