"""FSDP2 for the recipes: Lightning's ModelParallelStrategy with every process in the data-parallel dimension.

And how checkpoints of one file are written under any strategy.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from hornet_lit import sharded
from hornet_lit.durable import whole_file

FULL = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


class DurableCheckpointIO(TorchCheckpointIO):
    """Checkpoints that survive a kill and a power cut at any moment; Lightning's own are moved from $TMPDIR, unsynced.

    The command line uses it by itself; elsewhere: ``Trainer(plugins=[DurableCheckpointIO()])``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``; URLs are left to Lightning.

        Raises:
            OSError: no space, no permission, …; names ``path``, where an earlier checkpoint is left as it was.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Through a file of Python's: where torch opens it itself, a full disk is a RuntimeError without a reason.
        with whole_file(path) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes.

    Lightning's "auto" sizes put all processes of a node in the tensor-parallel dimension, where nothing of ours is
    sharded and every process runs every batch, without a warning. Here the data-parallel size is the world size.

    Checkpoints are read and written here, since Lightning's own reading gave the optimizer states of a checkpoint of
    one device or of ddp to the wrong parameters, and its sharded folders can be loaded half-written (`sharded`).

    Args:
        save_distributed_checkpoint: False (default) gathers one file that loads anywhere, also on one device; True
            writes a folder with a file per process, which `hornet-lit convert` makes one file of.
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

    def setup(self, trainer: pl.Trainer) -> None:
        """Refuse a module whose configure_model leaves parameters whole: it would train, each process on its own.

        Raises:
            ValueError: naming such parameters.
        """
        super().setup(trainer)
        whole = [name for name, p in self.model.named_parameters() if not isinstance(p, DTensor)]
        if whole:
            raise ValueError(
                f"{type(self).__name__}: configure_model left {len(whole)} parameters unsharded "
                f"({', '.join(whole[:3])}): shard them with fully_shard, or train with ddp"
            )

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        path = Path(self.broadcast(filepath))
        if self._save_distributed_checkpoint:
            tensors = {"state_dict": checkpoint.pop("state_dict")}
            tensors |= {f"optimizer_{i}": state for i, state in enumerate(checkpoint.pop("optimizer_states", []))}
            sharded.write(
                path,
                tensors=tensors,
                rest=checkpoint,
                rank=self.global_rank,
                world=self.world_size,
                barrier=self.barrier,
            )
            return
        if self.is_global_zero and sharded.is_sharded(path):  # Lightning lets every process remove it
            shutil.rmtree(path)
        self.barrier()
        super().save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Weights and optimizer states go to where they belong; gives the rest. Never unpickles.

        Raises:
            ValueError: a sharded checkpoint that is not whole, or one of other parameters.
        """
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            sharded.check(path)
            weights = {"state_dict": get_model_state_dict(self.model)}
            sharded.read_into(path, weights)
            self.model.load_state_dict(weights["state_dict"])
            for i, optimizer in enumerate(self.optimizers):
                state = {f"optimizer_{i}": get_optimizer_state_dict(self.model, optimizer)}
                sharded.read_into(path, state)
                set_optimizer_state_dict(self.model, optimizer, state[f"optimizer_{i}"])
            return sharded.read_meta(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # torch broadcasts the bytes as they lie: channels-last weights, as one device and ddp have them, would arrive
        # permuted at every process but the first.
        checkpoint |= {
            key: apply_to_collection(checkpoint[key], torch.Tensor, torch.Tensor.contiguous)
            for key in ("state_dict", "optimizer_states")
            if key in checkpoint
        }
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=FULL)
        states = checkpoint.get("optimizer_states", [])
        if self.optimizers and len(states) != len(self.optimizers):
            raise ValueError(f"cannot resume: {path} has weights alone: start anew from them with --model.weights")
        for optimizer, state in zip(self.optimizers, states, strict=False):
            set_optimizer_state_dict(self.model, optimizer, self._named(state, optimizer), options=FULL)
        return checkpoint

    def _named(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """An optimizer's saved state under the parameters' names; its numbers count within the groups, in order."""
        names = {p: name for name, p in self.model.named_parameters()}
        now = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        saved = state["param_groups"]
        if [len(group["params"]) for group in saved] != [len(group) for group in now]:
            raise ValueError(
                "cannot resume: the checkpoint's optimizer has other parameters: resume with the settings of the run"
            )
        numbers = [number for group in saved for number in group["params"]]
        name_of = dict(zip(numbers, (name for group in now for name in group), strict=True))
        return {
            "state": {name_of[number]: values for number, values in state["state"].items()},
            "param_groups": [group | {"params": new} for group, new in zip(saved, now, strict=True)],
        }
