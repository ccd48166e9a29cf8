"""The fast part of the matrix of killed and resumed trainings; `make resume-matrix` runs the whole."""

from __future__ import annotations

import pytest

from tests.distributed.resume_matrix import KILLS, Cell, matrix


@pytest.mark.parametrize(
    ("cell", "label"),
    [
        (Cell("single", 2, 2, data="folder"), "last"),
        (Cell("single", 0, 1, "bf16-mixed", "CIFAR", validations=2), "mid"),
        (Cell("ddp 2", 0, 2), "last-1"),
        (Cell("FSDP2 2", 0, 1), "last+1"),
    ],
    ids=str,
)
def test_a_killed_run_resumes_bit_for_bit(cell: Cell, label: str, tmp_path) -> None:
    ((_, _, difference, same),) = matrix([cell], {label: KILLS[label]}, tmp_path)
    assert difference == 0
    assert same, "metrics.csv or the best checkpoints differ"
