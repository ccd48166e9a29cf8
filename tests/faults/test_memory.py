"""Memory over few images and steps; `python -m tests.faults memory` takes 100 000 and 2 000."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from . import memory


def test_memory_does_not_grow() -> None:
    wrong = [row for row in memory.rows(thorough=False) if not row.right]
    assert not wrong, wrong


def test_outputs_that_are_kept_would_be_seen(tmp_path: Path) -> None:
    class Keep(pl.Callback):
        kept: list[Any] = []  # noqa: RUF012

        def on_predict_batch_end(self, *words: Any) -> None:
            self.kept.append(words[2])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, half, last = memory.predict(tmp_path / "kept", images=3_000, also=(Keep(),))
    assert last - half > memory.MOST_GROWTH
