"""The last checkpoint is the last, also where none of the later ones is better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from hornet_lit.data import DigitsDataModule
from hornet_lit.module import ImageClassifier

NETWORK = {
    "network": "hornet_pico_32",
    "in_chans": 1,
    "img_size": 16,
    "network_options": {"base_dim": 8, "depths": [1, 1, 1, 1]},
}
STEPS = 2  # an epoch


def fit(folder: Path, *, resume: Path | None = None, epochs: int = 3, saver: dict[str, Any], **options: Any) -> str:
    savers = [ModelCheckpoint(folder, mode="min", **saver), ModelCheckpoint(folder / "raw", monitor="val/acc1")]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=STEPS,
        logger=False,
        callbacks=savers,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **{"limit_val_batches": 1} | options,
    )
    data = DigitsDataModule(batch_size=16, img_size=16)
    trainer.fit(ImageClassifier(**NETWORK), datamodule=data, ckpt_path=resume, weights_only=True)
    return savers[0].last_model_path


def saved(path: Path) -> tuple[int, int]:
    checkpoint = torch.load(path, weights_only=True)
    return checkpoint["epoch"], checkpoint["global_step"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"val_check_interval": 0.5},
        {"limit_val_batches": 0},
        {"saver": {"save_on_train_epoch_end": False}},
        {"saver": {"every_n_epochs": 3}},
    ],
    ids=str,
)
def test_the_last_is_the_last_and_the_best_is_the_best(tmp_path: Path, options: dict[str, Any]) -> None:
    saver = {"monitor": "epoch", "filename": "best", "save_last": True} | options.get("saver", {})
    first = saver.get("every_n_epochs", 1)
    assert fit(tmp_path, **options | {"saver": saver}) == str(tmp_path / "last.ckpt")
    assert saved(tmp_path / "last.ckpt") == (2, 3 * STEPS)
    assert saved(tmp_path / "best.ckpt")[0] == first - 1
    assert {path.name for path in tmp_path.iterdir()} <= {"best.ckpt", "last.ckpt", "raw"}


def test_a_resumed_run_goes_on_with_it(tmp_path: Path) -> None:
    saver = {"monitor": "epoch", "filename": "best", "save_last": True}
    fit(tmp_path, saver=saver)
    fit(tmp_path, resume=tmp_path / "last.ckpt", epochs=4, saver=saver)
    assert (saved(tmp_path / "best.ckpt"), saved(tmp_path / "last.ckpt")) == ((0, STEPS), (3, 4 * STEPS))


def test_none_is_saved_for_who_wants_none(tmp_path: Path) -> None:
    assert not fit(tmp_path, saver={"monitor": "epoch", "filename": "best", "save_last": False})
    assert not (tmp_path / "last.ckpt").exists()


def test_a_last_checkpoint_of_another_run_stays(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_text("another's")
    last = fit(tmp_path, saver={"monitor": "epoch", "save_top_k": 0, "save_last": True})
    assert last == str(tmp_path / "last-v1.ckpt")
    assert saved(tmp_path / "last-v1.ckpt") == (2, 3 * STEPS)
    assert (tmp_path / "last.ckpt").read_text() == "another's"
