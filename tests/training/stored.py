"""Trainings whose results are stored in tests/golden/ and must come out again after every later change.

    python -m tests.training.stored --write    # for a new version, or where a change of the numbers is meant

- curve_tiny_gf.csv: loss and gradient norm of 100 optimizer steps of hornet_tiny_gf on the digits, fp32, CPU.
- checkpoints/VERSION.{yaml,ckpt,csv}: a recipe, a checkpoint that this version wrote in the middle of its second epoch,
  and the metrics.csv of the training that went on from there.
"""

from __future__ import annotations

import csv
import shutil
import sys
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import timm
import torch
from lightning.pytorch.loggers import CSVLogger

from hornet_lit import __version__
from hornet_lit.cli import main
from hornet_lit.data import DigitsDataModule
from hornet_lit.module import ImageClassifier
from tests.conftest import GOLDEN, filled_by_rule

CURVE = GOLDEN / "curve_tiny_gf.csv"
CHECKPOINTS = GOLDEN / "checkpoints"
STEPS = 100


def curve(folder: Path) -> list[dict[str, float]]:
    """Loss and gradient norm of every step; ``folder`` gets a weight file and metrics.csv.

    With mixup, CutMix and augmentation, from weights filled by rule: a change in any of the network, the optimizer, the
    schedule, the order of the images or what is drawn for them shows.
    """
    weights = folder / "weights.pth"
    torch.save({"model": filled_by_rule(timm.create_model("hornet_tiny_gf", num_classes=10, in_chans=1))}, weights)
    pl.seed_everything(0, verbose=False)
    module = ImageClassifier(
        network="hornet_tiny_gf",
        in_chans=1,
        weights=str(weights),
        lr=1e-4,
        warmup_epochs=0.1,
        mixup=0.8,
        cutmix=1.0,
        mix_prob=0.5,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        gradient_clip_val=1.0,
        logger=CSVLogger(folder, name=None, version=""),
        log_every_n_steps=1,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=4, img_size=64))
    columns = {"loss": "train/loss", "grad_norm": "train/grad_norm"}
    return [{name: row[key] for name, key in columns.items()} for row in rows(folder / "metrics.csv")]


def resume(recipe: Path, checkpoint: Path | None, folder: Path) -> list[dict[str, float]]:
    """`hornet-lit fit` with a stored recipe and checkpoint; gives the rows of metrics.csv."""
    where = ["--trainer.logger.init_args.save_dir", str(folder), "--trainer.logger.init_args.version", "run"]
    words = ["fit", "--config", str(recipe), *where, *(["--ckpt_path", str(checkpoint)] if checkpoint else [])]
    assert main(words) == 0
    return rows(folder / "run" / "metrics.csv")


def rows(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def write() -> None:
    """Store this version's curve, and a checkpoint of it with the continuation of its training."""
    with tempfile.TemporaryDirectory() as scratch:
        values = curve(Path(scratch))
        with CURVE.open("w", newline="") as file:
            table = csv.DictWriter(file, values[0], lineterminator="\n")
            table.writeheader()
            table.writerows(values)
    recipe = CHECKPOINTS / f"{__version__}.yaml"
    with tempfile.TemporaryDirectory() as scratch:
        resume(recipe, None, Path(scratch))
        run = Path(scratch, "run")
        shutil.copyfile(run / "checkpoints" / "step9.ckpt", recipe.with_suffix(".ckpt"))
        shutil.copyfile(run / "metrics.csv", recipe.with_suffix(".csv"))


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    write()
