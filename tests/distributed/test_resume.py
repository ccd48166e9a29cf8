"""The fast part of the matrix of killed and resumed trainings; `make resume-matrix` runs the whole.

Resuming under ddp and FSDP2 is in test_processes, with processes started afresh.
"""

from __future__ import annotations

import multiprocessing

import pytest

from tests.distributed import resume_matrix


@pytest.mark.parametrize(
    "cell,label",
    [
        (("single", 2, 2, "32-true"), "mid"),
        (("single", 0, 1, "bf16-mixed"), "last"),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(cell: resume_matrix.Cell, label: str, tmp_path) -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload([resume_matrix.MODULE])
    ((_, _, difference, same),) = resume_matrix.matrix([cell], {label: resume_matrix.KILLS[label]}, tmp_path)
    assert difference == 0
    assert same, "metrics.csv differs"
