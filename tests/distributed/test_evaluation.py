"""`test` and its report do not depend on the number of processes: label sets, views and padding included."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.distributed import evaluation
from tests.distributed.processes import run_processes


def test_scores_and_report_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    """In batches of two: of nine images one process has a batch of padding, of one image nothing else."""
    evaluation.prepare(tmp_path)
    for world in evaluation.STRATEGIES:
        run_processes("tests.distributed.evaluation", [str(tmp_path), str(world)], world)
    for count, counted in evaluation.COUNTS.items():
        reference = tmp_path / f"auto-{count}"
        one = json.loads((reference / "scores.json").read_text())
        assert one.keys() == {f"test/{kind}{s}" for kind in ("loss", "acc1", "acc5", "ece") for s in ("", "_ema")}
        assert one["test/loss"] != one["test/loss_ema"]
        for folder in (tmp_path / f"ddp-{count}", tmp_path / f"fsdp-{count}"):
            assert json.loads((folder / "scores.json").read_text()) == pytest.approx(one, abs=1e-6)
            for table in ("classes.csv", "confusion.csv"):
                assert (folder / table).read_bytes() == (reference / table).read_bytes()
        with open(reference / "classes.csv", encoding="utf-8", newline="") as file:
            assert sum(int(row["images"]) for row in csv.DictReader(file)) == counted
