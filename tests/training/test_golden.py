"""Twelve optimizer steps through the LightningModule and the Trainer, as the recipes use them, against the authors'."""

from __future__ import annotations

import csv
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import timm
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from hornet_lit.module import ImageClassifier
from hornet_lit.optim import build_optimizer
from tests.conftest import images

RUNS = {
    "tiny_7x7": ("hornet_tiny_7x7", 5.0, None),
    "tiny_gf": ("hornet_tiny_gf", 1.0, None),
    "tiny_gf_layer_decay": ("hornet_tiny_gf", 1.0, 0.7),
}
EPOCHS, STEPS, BATCH = 3, 4, 8


class GoldenData(pl.LightningDataModule):
    """Step i draws RandomState(100 + i): first the images, then the labels."""

    class_names = tuple("abcdefghij")
    steps_per_epoch = STEPS

    def train_dataloader(self) -> DataLoader:
        first = 100 + self.trainer.current_epoch * STEPS
        draws = [np.random.RandomState(first + i) for i in range(STEPS)]
        x = np.concatenate([d.standard_normal((BATCH, 3, 64, 64)).astype(np.float32) for d in draws])
        y = np.concatenate([d.randint(0, 10, BATCH) for d in draws])
        return DataLoader(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), batch_size=BATCH)


def column(path: Path, name: str) -> list[float]:
    with path.open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.mark.parametrize("run", RUNS)
def test_twelve_steps_match_the_authors(run: str, golden, official_file, tmp_path) -> None:
    name, clip, layer_decay = RUNS[run]
    expected = golden("training.npz")
    weights = official_file(timm.create_model(name, num_classes=10))
    module = ImageClassifier(
        network=name,
        weights=str(weights),
        lr=2e-4,
        weight_decay=0.05,
        layer_decay=layer_decay,
        warmup_epochs=1,
        min_lr=1e-6,
        label_smoothing=0.1,
        ema_decay=0.99,
    )
    logger = CSVLogger(tmp_path, name=None, version="")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        gradient_clip_val=clip,
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=1,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=GoldenData())
    metrics = tmp_path / "metrics.csv"
    np.testing.assert_allclose(column(metrics, "train/loss"), expected[f"{run}/losses"], rtol=1e-4)
    np.testing.assert_allclose(column(metrics, "train/lr"), expected[f"{run}/lrs"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(column(metrics, "train/grad_norm"), expected[f"{run}/norms"], rtol=1e-3)
    module.eval()
    x_BCHW = images(1099, 4, 3, 64, 64)
    with torch.inference_mode():
        raw = module(x_BCHW).numpy()
        with module.ema.swapped(module.network):
            averaged = module(x_BCHW).numpy()
    for logits, kind in ((raw, "raw"), (averaged, "ema")):
        reference = expected[f"{run}/{kind}"]
        assert np.abs(logits - reference).max() <= 1e-3 * np.abs(reference).max(), kind
    assert not np.allclose(raw, averaged)


@pytest.mark.parametrize("run", RUNS)
def test_parameter_groups_match_the_authors(run: str, golden) -> None:
    name, _, layer_decay = RUNS[run]
    network = timm.create_model(name, num_classes=10)
    optimizer = build_optimizer(network, lr=2e-4, weight_decay=0.05, layer_decay=layer_decay)
    names = {id(p): n for n, p in network.named_parameters()}
    groups = {
        names[id(p)]: [group["weight_decay"], group.get("lr_scale", 1.0)]
        for group in optimizer.param_groups
        for p in group["params"]
    }
    expected = golden("param_groups.json")[run]
    assert groups.keys() == expected.keys()
    for key, values in expected.items():
        assert groups[key] == pytest.approx(values, rel=1e-9), key
