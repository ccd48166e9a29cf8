"""Memory of the main process: predict and validate over many images, and a training of many steps, do not grow.

The network is one layer, so that the images' own way through loader, metrics and writers is what is measured. The names
of all images are there before the first is read (packed, some 100 bytes an image) and are not part of the growth.
"""

from __future__ import annotations

import ctypes
import gc
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import timm
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import nn

from hornet_lit.data import DigitsDataModule, ImageDataModule, ImageNetDataModule
from hornet_lit.module import ImageClassifier
from hornet_lit.writers import LearningCurves, PredictionSheet, PredictionWriter

from .command import empty_folder
from .row import Row

SIDE = 8
CLASSES = 1000  # outputs of the network: kept by mistake, they would be 4 kB an image
BATCH = 100
MOST_GROWTH = 4 * 2**20
TRAIN_BATCH = 16


class OneLayer(nn.Module):
    def __init__(self, *, num_classes: int, in_chans: int, img_size: int) -> None:
        super().__init__()
        self.head = nn.Linear(in_chans * img_size**2, num_classes)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.head(x_BCHW.flatten(1))

    def get_classifier(self) -> nn.Module:
        return self.head


@timm.models.register_model
def one_layer_of_the_tests(
    pretrained: bool = False, *, num_classes: int, in_chans: int, img_size: int, drop_path_rate: float = 0.0, **_: Any
) -> nn.Module:
    return OneLayer(num_classes=num_classes, in_chans=in_chans, img_size=img_size)


class MemoryAt(pl.Callback):
    """Bytes that the process holds after so many batches of the loop that runs."""

    def __init__(self, *batches: int) -> None:
        self.batches = batches
        self.seen = 0
        self.held: list[int] = []

    def _count(self) -> None:
        self.seen += 1
        if self.seen in self.batches:
            gc.collect()
            self.held.append(held())

    def on_predict_batch_end(self, *_: Any) -> None:
        self._count()

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.validating:
            self._count()

    def on_train_batch_end(self, *_: Any) -> None:
        self._count()


def held() -> int:
    """Bytes of memory that this process holds now, less what the allocator keeps for later (some 30 MiB)."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
        libc.malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def rows(*, thorough: bool) -> Iterator[Row]:
    images, steps = (100_000, 2_000) if thorough else (3_000, 300)
    with empty_folder() as here, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, measure in (("predict", predict), ("validate", validate)):
            first, half, last = measure(here / name, images=images)
            yield _row(
                f"{name} over {images} images", f"image {images // 10}, {images // 2} and {images}", first, half, last
            )
        first, half, last = fit(steps=steps)
        yield _row(f"{steps} training steps", f"step {steps // 4}, {steps // 2} and {steps}", first, half, last)


def _row(case: str, where: str, *held_bytes: int) -> Row:
    first, half, last = held_bytes
    sizes = ", ".join(f"{size / 2**20:.1f}" for size in held_bytes)
    return Row(
        case=case,
        outcome=f"{sizes} MiB held at {where}",
        right=last - half < MOST_GROWTH and last - first < 2 * MOST_GROWTH,
    )


def predict(folder: Path, *, images: int, also: tuple[pl.Callback, ...] = ()) -> list[int]:
    """Bytes held after a tenth, a half and all of the images, which a list names; predictions.csv is written."""
    folder.mkdir()
    few = _write_images(folder)
    (folder / "list.txt").write_text("".join(f"{few[i % len(few)].name}\n" for i in range(images)))
    data = ImageNetDataModule(predict_path=str(folder / "list.txt"), num_workers=1, **_data_options())
    writer = PredictionWriter(output=str(folder / "predictions.csv"))
    memory = MemoryAt(*(images // BATCH * part // 10 for part in (1, 5, 10)))
    trainer = _trainer(callbacks=[writer, memory, *also])
    trainer.predict(_module(CLASSES), datamodule=data, return_predictions=False)
    with open(folder / "predictions.csv") as file:
        assert sum(1 for _ in file) == images + 1
    return memory.held


def validate(folder: Path, *, images: int) -> list[int]:
    """Bytes held after a tenth, a half and all of the images, which are links to a few files in class folders."""
    few = _write_images(folder, make=True)
    for i in range(images):
        target = folder / "val" / f"{i % 10}" / f"{i}.png"
        if i < 10:
            target.parent.mkdir(parents=True)
        os.link(few[i % len(few)], target)
    (folder / "names.txt").write_text("".join(f"{label}\n" for label in range(CLASSES)))
    data = ImageNetDataModule(root=str(folder), class_map=str(folder / "names.txt"), num_workers=1, **_data_options())
    memory = MemoryAt(*(images // BATCH * part // 10 for part in (1, 5, 10)))
    _trainer(callbacks=[memory]).validate(_module(CLASSES), datamodule=data, verbose=False)
    return memory.held


def fit(*, steps: int) -> list[int]:
    """Bytes held after a quarter, a half and all of the steps of a training with all that the recipes switch on."""
    data: ImageDataModule = DigitsDataModule(batch_size=TRAIN_BATCH, img_size=SIDE)
    memory = MemoryAt(steps // 4, steps // 2, steps)
    callbacks = [ModelCheckpoint(save_last=True), LearningRateMonitor(), LearningCurves(), PredictionSheet(), memory]
    trainer = _trainer(callbacks=callbacks, max_steps=steps, logger=CSVLogger("."), enable_checkpointing=True)
    trainer.fit(_module(10, in_chans=1, ema_decay=0.99, mixup=0.8), datamodule=data)
    assert trainer.global_step == steps
    return memory.held


def _module(classes: int, *, in_chans: int = 3, **options: Any) -> ImageClassifier:
    network = "one_layer_of_the_tests"
    return ImageClassifier(network=network, num_classes=classes, in_chans=in_chans, img_size=SIDE, **options)


def _data_options() -> dict[str, Any]:
    return {"img_size": SIDE, "eval_batch_size": BATCH, "crop_pct": 1.0}


def _trainer(**options: Any) -> pl.Trainer:
    return pl.Trainer(
        **{"logger": False, "enable_checkpointing": False} | options,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _write_images(folder: Path, *, make: bool = False) -> list[Path]:
    if make:
        folder.mkdir()
    noise = np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(16)]
    for path in paths:
        Image.fromarray(noise.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
    return paths
