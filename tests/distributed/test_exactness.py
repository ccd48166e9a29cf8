"""Scores and predictions do not depend on the number of processes, nor on ddp or FSDP2, even with too few images."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.distributed import exactness
from tests.distributed.exactness import CASES, REFERENCE, RUNS

NAMES = {f"val/{name}{suffix}" for name in ("loss", "acc1", "acc5") for suffix in ("", "_ema")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exactness")
    exactness.measure(folder)
    return folder


@pytest.mark.parametrize("run", RUNS[1:], ids=str)
def test_scores_and_predictions_are_those_of_one_process(folder: Path, run: exactness.Run) -> None:
    for found, n, batch, difference, same in exactness.differences(folder):
        if found == run:
            assert difference <= 1e-6, (n, batch)
            assert same, f"predictions.csv of {n} images in batches of {batch} differs"


def test_one_process_predicts_every_image_once_and_scores_what_it_predicts(folder: Path) -> None:
    for n, batch in CASES:
        with exactness.table(folder, REFERENCE, n, batch).open() as file:
            rows = list(csv.DictReader(file))
        files = sorted(
            str(p.relative_to(exactness.images(folder, n))) for p in exactness.images(folder, n).rglob("*.png")
        )
        assert [row["file"] for row in rows] == files and len(set(files)) == n
        scores = exactness.scores(folder, REFERENCE, n, batch)
        assert scores.keys() == NAMES
        right = sum(row["name_1"] == row["file"].split("/")[0] for row in rows)  # a digit's folder is its class
        assert scores["val/acc1_ema"] == pytest.approx(right / n, abs=1e-6)
    assert 0.2 < scores["val/acc1_ema"] < 1 and scores["val/loss"] != scores["val/loss_ema"], "no telling example"
