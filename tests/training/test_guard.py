"""A step that is not finite: it stops the run before it does harm, or is skipped; nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from hornet_lit.data import DigitsDataModule
from hornet_lit.guard import NonFiniteError
from hornet_lit.module import ImageClassifier

NETWORK = {
    "network": "hornet_pico_32",
    "in_chans": 1,
    "img_size": 16,
    "network_options": {"base_dim": 8, "depths": [1, 1, 1, 1]},
}
BATCHES, STEPS = 8, 4  # of an epoch: two batches make a step
POISONED = 5


class Poison(pl.Callback):
    """Makes one training batch nan. The loss is then nan, and so are all gradients."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, idx: int) -> None:
        if trainer.current_epoch == 0 and idx == POISONED:
            batch[0].fill_(float("nan"))


def fit(folder: Path, *callbacks: pl.Callback, resume: Path | None = None, **options: Any) -> pl.Trainer:
    pl.seed_everything(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        limit_train_batches=BATCHES,
        limit_val_batches=1,
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[ModelCheckpoint(dirpath=folder / "checkpoints", save_last=True), *callbacks],
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    data = DigitsDataModule(batch_size=16, batch_size_per_device=8, img_size=16)
    module = ImageClassifier(**NETWORK, ema_decay=0.9, mixup=0.8, drop_path_rate=0.1, **options)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer


def weights(trainer: pl.Trainer) -> dict[str, torch.Tensor]:
    network = trainer.lightning_module.network
    return network.state_dict() | {f"ema.{k}": v for k, v in trainer.lightning_module.ema.state_dict(network).items()}


def test_it_stops_with_its_cause_and_resumes_from_before(tmp_path: Path) -> None:
    step = POISONED // 2
    with pytest.raises(NonFiniteError) as caught:
        fit(tmp_path, Poison())
    text = str(caught.value)
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert f"batch {POISONED} of epoch 0 (step {step}): loss nan, gradient norm nan, learning rate" in text
    assert "the gradients of downsample_layers.0, downsample_layers.1" in text and str(last) in text
    assert len(text.splitlines()) <= 5

    (dump,) = (json.loads(path.read_text()) for path in tmp_path.glob("nonfinite-step*.json"))
    assert (dump["step"], dump["epoch"], dump["batch"], dump["loss"]) == (step, 0, POISONED, "nan")
    assert dump["gradient_norms"]["head"] == "nan" and dump["learning_rate"] > 0
    assert len(set(dump["images"])) == 16

    saved = torch.load(last, weights_only=True)
    assert saved["global_step"] == step
    assert all(value.isfinite().all() for value in saved["state_dict"].values() if value.is_floating_point())
    resumed, whole = weights(fit(tmp_path, resume=last)), weights(fit(tmp_path / "whole"))
    assert all(resumed[name].equal(value) for name, value in whole.items())


def test_images_of_the_step_are_those_that_were_in_it() -> None:
    data = DigitsDataModule(batch_size=16, batch_size_per_device=8, img_size=16)
    data.setup("fit")
    batches = [list(data.train_dataloader().sampler)[i * 8 : (i + 1) * 8] for i in range(4)]
    for batch in range(4):
        seen = [index for keys in batches[batch // 2 * 2 : batch // 2 * 2 + 2] for _, index in keys]
        assert data.images_of_step(0, batch) == seen


def test_images_of_a_step_are_those_of_the_first_epoch_while_overfitting() -> None:
    data = DigitsDataModule(batch_size=16, img_size=16)
    data.trainer = pl.Trainer(accelerator="cpu", overfit_batches=2, logger=False, enable_checkpointing=False)
    data.setup("fit")
    sampler = data.train_dataloader().sampler
    sampler.set_epoch(1)
    assert data.images_of_step(1, 1) == [index for _, index in list(sampler)[16:32]]


def test_it_is_skipped_as_often_as_allowed(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=rf"step skipped at batch {POISONED} of epoch 0.*\(1 of 1 that may be"):
        trainer = fit(tmp_path, Poison(), skip_nonfinite=1)
    assert trainer.global_step == 2 * STEPS
    assert all(value.isfinite().all() for value in weights(trainer).values())
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["skipped_steps"] == 1
    assert [path.name for path in tmp_path.glob("nonfinite*")] == [f"nonfinite-step{POISONED // 2}.json"]
