"""Sharding a network by block with FSDP2 (torch.distributed.fsdp.fully_shard)."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shard ``network`` in place over ``mesh``: each block of its stages a unit of its own, the rest one unit.

    Everything is resharded after the forward pass, the root too, so that no stale gathered copy survives when the
    shards themselves are rewritten (as when the averaged weights are swapped in).

    Raises:
        ValueError: if the network has no `stages`, `blocks` or `layers` to shard by.
    """
    containers = [getattr(network, name) for name in ("stages", "blocks", "layers") if hasattr(network, name)]
    if not containers:
        raise ValueError(f"{type(network).__name__} has no stages, blocks or layers to shard by: train it with ddp")
    for container in containers:
        for unit in container:
            for block in unit if isinstance(unit, nn.Sequential | nn.ModuleList) else [unit]:
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    assert all(isinstance(p, DTensor) for p in network.parameters()), "a parameter was left unsharded"
