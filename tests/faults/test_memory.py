"""That the measure of memory would see what grows."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from . import memory


def test_outputs_that_are_kept_would_be_seen(tmp_path: Path) -> None:
    class Keep(pl.Callback):
        kept: list[Any] = []  # noqa: RUF012

        def on_predict_batch_end(self, *words: Any) -> None:
            self.kept.append(words[2])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, half, last = memory.predict(tmp_path / "kept", images=3_000, also=(Keep(),))
    assert last - half > memory.MOST_GROWTH
