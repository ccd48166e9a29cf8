"""Two processes against one: the same training, checkpoints, accuracy and predictions under ddp and FSDP2."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.worker import IMAGES, weights

ROOT = Path(__file__).parents[2]
RUNS = {"single": ("auto", 1, 2), "ddp": ("ddp", 2, 1), "fsdp": ("fsdp", 2, 1)}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_processes(arguments: list[str], world: int, timeout: int = 400) -> None:
    """Start ``world`` processes as torchrun would, on this machine, and wait for all of them."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    if world > 1:
        shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "TORCHELASTIC_RUN_ID": "test"}
    processes = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"} if world > 1 else {}
        command = [sys.executable, "-m", "tests.distributed.worker", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=os.environ | shared | own, cwd=ROOT, **pipes))
    try:
        outputs = [p.communicate(timeout=timeout)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    for rank, (p, output) in enumerate(zip(processes, outputs, strict=True)):
        assert p.returncode == 0, f"process {rank} of {arguments} ended with {p.returncode}:\n{output[-3000:]}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("processes")
    for name, (strategy, world, accumulation) in RUNS.items():
        (folder / name).mkdir()
        run_processes([str(folder / name), strategy, str(world), str(accumulation)], world)
    return {name: folder / name for name in RUNS}


def scores(folder: Path) -> dict[str, float]:
    return json.loads((folder / "scores.json").read_text())


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_weights_after_twenty_steps_agree_with_one_process(runs, name: str) -> None:
    """Raw and averaged weights; the single process reaches the same global batch by accumulation."""
    assert scores(runs["single"])["accumulation"] == 2 and scores(runs[name])["accumulation"] == 1
    assert scores(runs["single"])["steps"] == scores(runs[name])["steps"] == 20
    one, two = (weights(runs[n] / "whole" / "epoch=1.ckpt") for n in ("single", name))
    assert one.keys() == two.keys()
    difference = {k: (one[k] - two[k]).abs().max().item() for k in one}
    assert max(difference.values()) <= 1e-5, sorted(difference.items(), key=lambda d: -d[1])[:3]
    start = weights(runs["single"] / "whole" / "epoch=0.ckpt")
    assert max((one[k] - start[k]).abs().max().item() for k in one) > 1e-3, "the training did not move"


def test_ddp_and_fsdp_end_with_the_same_weights(runs) -> None:
    ddp, fsdp = (weights(runs[name] / "whole" / "epoch=1.ckpt") for name in ("ddp", "fsdp"))
    assert max((ddp[k] - fsdp[k]).abs().max().item() for k in ddp) <= 1e-6


@pytest.mark.parametrize("name", RUNS)
def test_resumed_training_is_the_uninterrupted_one(runs, name: str) -> None:
    assert scores(runs[name])["resume_difference"] == 0


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_validation_counts_every_image_once(runs, name: str) -> None:
    """360 images in batches of 50 divide neither by one process nor by two."""
    one, two = scores(runs["single"]), scores(runs[name])
    for key in ("val/loss", "val/acc1", "val/acc5", "val/loss_ema", "val/acc1_ema", "val/acc5_ema"):
        assert two[key] == pytest.approx(one[key], abs=1e-5), key


@pytest.mark.parametrize("name", RUNS)
def test_prediction_writes_every_image_once_in_order(runs, name: str) -> None:
    with (runs[name] / "predictions.csv").open() as one, (runs["single"] / "predictions.csv").open() as other:
        rows, expected = list(csv.DictReader(one)), list(csv.DictReader(other))
    assert [r["file"] for r in rows] == sorted(p.name for p in (runs[name].parent / "pictures").iterdir())
    assert len(rows) == IMAGES
    for row, reference in zip(rows, expected, strict=True):
        assert row["class_1"] == reference["class_1"]
        assert float(row["probability_1"]) == pytest.approx(float(reference["probability_1"]), abs=1e-5)


def test_a_sharded_run_leaves_one_file_that_one_process_reads(runs) -> None:
    path = runs["fsdp"] / "whole" / "epoch=1.ckpt"
    assert path.is_file()
    assert all(type(v) is torch.Tensor for v in weights(path).values())
