"""Two processes against one: the same training and the same kind of checkpoint under ddp and FSDP2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.processes import run_processes
from tests.distributed.worker import weights

RUNS = {"single": ("auto", 1, 2), "ddp": ("ddp", 2, 1), "fsdp": ("fsdp", 2, 1)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("processes")
    for name, (strategy, world, accumulation) in RUNS.items():
        (folder / name).mkdir()
        arguments = [str(folder / name), strategy, str(world), str(accumulation)]
        run_processes("tests.distributed.worker", arguments, world)
    return {name: folder / name for name in RUNS}


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_weights_after_twenty_steps_agree_with_one_process(runs, name: str) -> None:
    """Raw and averaged weights; the single process reaches the same global batch by accumulation."""
    outcomes = {n: json.loads((runs[n] / "outcome.json").read_text()) for n in ("single", name)}
    assert outcomes == {"single": {"steps": 20, "accumulation": 2}, name: {"steps": 20, "accumulation": 1}}
    one, two = (weights(runs[n] / "epoch=1.ckpt") for n in ("single", name))
    assert one.keys() == two.keys()
    difference = {k: (one[k] - two[k]).abs().max().item() for k in one}
    assert max(difference.values()) <= 1e-5, sorted(difference.items(), key=lambda d: -d[1])[:3]
    start = weights(runs["single"] / "epoch=0.ckpt")
    assert max((one[k] - start[k]).abs().max().item() for k in one) > 1e-3, "the training did not move"


def test_ddp_and_fsdp_end_with_the_same_weights(runs) -> None:
    ddp, fsdp = (weights(runs[name] / "epoch=1.ckpt") for name in ("ddp", "fsdp"))
    assert max((ddp[k] - fsdp[k]).abs().max().item() for k in ddp) <= 1e-6


def test_a_sharded_run_leaves_one_file_that_one_process_reads(runs) -> None:
    path = runs["fsdp"] / "epoch=1.ckpt"
    assert path.is_file()
    assert all(type(v) is torch.Tensor for v in weights(path).values())
