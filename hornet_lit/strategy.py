"""FSDP2 for the recipes: Lightning's ModelParallelStrategy with every process in the data-parallel dimension."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes.

    Lightning's "auto" sizes put all processes of a node in the tensor-parallel dimension, where nothing of ours is
    sharded and every process runs every batch, without a warning. Here the data-parallel size is the world size.

    Args:
        save_distributed_checkpoint: False (default) gathers one file that loads anywhere, also on one device; True
            writes a folder with a file per process.
        kwargs: passed on to `ModelParallelStrategy`, the sizes excepted.
    """

    def __init__(self, *, save_distributed_checkpoint: bool = False, **kwargs: Any) -> None:
        super().__init__(
            data_parallel_size=1,
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            **kwargs,
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
