"""Kill a training with SIGKILL at awkward steps, resume it, and compare with the run that nobody killed.

    python -m tests.distributed.resume_matrix            # the whole matrix, as a Markdown table
    python -m tests.distributed.resume_matrix ddp        # its rows that hold this word

Everything random is on: augmentation, mixup and CutMix, stochastic depth, EMA, best-k checkpoints. Each run is a fresh
process, forked from a server that has only imported the libraries.
"""

from __future__ import annotations

import csv
import faulthandler
import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from hornet_lit.data import CIFARDataModule, DigitsDataModule, ImageNetDataModule
from hornet_lit.data.cifar_names import NAMES
from hornet_lit.module import ImageClassifier
from hornet_lit.strategy import FullyShardedStrategy
from tests.distributed.processes import environment, forkserver, free_port

EPOCHS, STEPS, BATCH = 3, 6, 32
KILLS = {"1": 1, "mid": 3, "last-1": STEPS - 1, "last": STEPS, "last+1": STEPS + 1}
STRATEGIES = {"single": ("auto", 1), "ddp 2": ("ddp", 2), "FSDP2 2": ("fsdp", 2)}


class Cell(NamedTuple):
    strategy: str = "single"
    workers: int = 0
    accumulation: int = 1
    precision: str = "32-true"
    data: str = "digits"
    validations: int = 1  # per epoch


CELLS = [
    *(Cell(*settings) for settings in itertools.product(STRATEGIES, (0, 2), (1, 2))),
    Cell("single", 2, 2, "bf16-mixed"),
    Cell("ddp 2", 0, 1, "bf16-mixed"),
    Cell("FSDP2 2", 0, 2, "bf16-mixed"),
    Cell("single", 2, 1, data="CIFAR"),
    Cell("ddp 2", 0, 2, "bf16-mixed", data="CIFAR"),
    Cell("single", 2, 1, data="folder"),
    Cell("FSDP2 2", 2, 2, data="folder"),
    Cell("single", 0, 2, validations=2),
    Cell("ddp 2", 2, 1, validations=2),
]


class Killer(Checkpoint):
    """SIGKILL of this process as soon as the given optimizer step is done and saved.

    A Checkpoint in name only: Lightning calls those last, in their order, so that the step has been saved.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.strategy.barrier()  # every process has saved
            os.kill(os.getpid(), signal.SIGKILL)


def write_images(root: Path) -> None:
    """Class folders train/ and test/ of 32×32 noise under CIFAR-10's names: one step's images more than are used."""
    random = np.random.default_rng(0)
    for split, count in (("train", BATCH * (STEPS + 1)), ("test", 30)):
        for i in range(count):
            path = root / split / NAMES[10][i % 10] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(path)


def data_of(cell: Cell, root: Path) -> pl.LightningDataModule:
    shared: dict[str, Any] = {"batch_size": BATCH, "img_size": 16, "num_workers": cell.workers}
    shared["batch_size_per_device"] = BATCH // STRATEGIES[cell.strategy][1] // cell.accumulation
    if cell.data == "digits":
        return DigitsDataModule(**shared)
    augment = {"auto_augment": "rand-m9-mstd0.5-inc1", "reprob": 0.25}
    if cell.data == "CIFAR":
        return CIFARDataModule(root=str(root), cutout=8, **augment, **shared)
    return ImageNetDataModule(root=str(root), val_split="test", **augment, **shared)


def train(out: str, cell: Cell, kill: int | None, resume: str | None, settings: dict[str, str]) -> None:
    """One process of one run; its checkpoints, metrics.csv and outcome.json go to ``out``."""
    os.environ.update(settings)
    # Else loader workers are started as this process was, by a server of their own, which outlives the kill with them.
    multiprocessing.set_start_method("fork", force=True)
    folder, (strategy, world) = Path(out), STRATEGIES[cell.strategy]
    sys.stdout = sys.stderr = log = open(folder / f"log_{settings.get('RANK', 0)}.txt", "a")  # noqa: SIM115  (for life)
    os.dup2(log.fileno(), 2)  # what libraries say, too
    faulthandler.enable(log)
    torch.set_num_threads(1)
    pl.seed_everything(7, verbose=False)
    module = ImageClassifier(
        network="hornet_nano_gf_32",
        in_chans=1 if cell.data == "digits" else 3,
        img_size=16,
        drop_path_rate=0.3,
        network_options={"depths": [1, 1, 2, 1], "base_dim": 16},
        lr=2e-3,
        warmup_epochs=1,
        mixup=0.8,
        cutmix=1.0,
        ema_decay=0.9,
    )
    plain: dict[str, Any] = {"dirpath": folder, "auto_insert_metric_name": False}
    best = ModelCheckpoint(filename="best{step}", monitor="val/loss_ema", save_top_k=2, **plain)
    saver = ModelCheckpoint(filename="step{step}", every_n_train_steps=kill or EPOCHS * STEPS, save_top_k=-1, **plain)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=FullyShardedStrategy() if strategy == "fsdp" else strategy,
        precision=cell.precision,
        max_epochs=EPOCHS,
        limit_train_batches=STEPS * cell.accumulation,
        val_check_interval=STEPS * cell.accumulation // cell.validations,
        gradient_clip_val=1.0,
        logger=CSVLogger(folder, name=None, version="resumed" if resume else "first"),
        log_every_n_steps=1,
        callbacks=[best, saver] + ([Killer(kill)] if kill else []),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data_of(cell, folder.parent / "images"), ckpt_path=resume)
    if trainer.is_global_zero:
        outcome = {Path(path).name: score.item() for path, score in best.best_k_models.items()}
        best_of_all = Path(best.best_model_path).name, best.best_model_score.item()
        (folder / "outcome.json").write_text(json.dumps([outcome, best_of_all, trainer.global_step]))


def launch(out: Path, cell: Cell, *, kill: int | None = None, resume: Path | None = None) -> None:
    """Run all processes of one training and wait for them; a killed run must end by SIGKILL."""
    world, port = STRATEGIES[cell.strategy][1], free_port()
    run = (str(out), cell, kill, resume and str(resume))
    settings = [environment(rank, world, port) for rank in range(world)]
    processes = [forkserver().Process(target=train, args=(*run, own)) for own in settings]
    for p in processes:
        p.start()
    for p in processes:
        p.join(240)
    codes = [p.exitcode for p in processes]
    expected = [-signal.SIGKILL if kill else 0] * world
    if codes != expected:
        for p in processes:
            p.kill()
        logs = "\n".join(path.read_text()[-2000:] for path in sorted(out.glob("log_*.txt")))
        raise RuntimeError(f"{cell}, kill {kill}: exit codes {codes}, expected {expected}\n{logs}")


def final(out: Path) -> dict[str, torch.Tensor]:
    """Raw and averaged weights and the optimizer's averages after the last step."""
    checkpoint = torch.load(out / f"step{EPOCHS * STEPS}.ckpt", weights_only=True)
    averages = {f"ema.{k}": v for k, v in checkpoint["ema"]["state_dict"].items()}
    (optimizer,) = checkpoint["optimizer_states"]
    moments = {f"optimizer.{p}.{k}": v for p, state in optimizer["state"].items() for k, v in state.items()}
    return checkpoint["state_dict"] | averages | moments


def rows(out: Path, version: str, after: int) -> list[dict[str, str]]:
    """metrics.csv after optimizer step ``after``; wall times are not logged, so every column must agree.

    Lightning counts from 0: the step that follows is row ``after``, a validation that follows is row ``after - 1``.
    """
    with (out / version / "metrics.csv").open() as file:
        found = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [row for row in found if int(row["step"]) >= after - ("val/loss" in row)]


def compare(reference: Path, cell: Cell, kill: int, folder: Path) -> tuple[float, bool]:
    """Kill at ``kill``, resume; gives (largest difference of any tensor, metrics.csv and best checkpoints equal)."""
    launch(folder, cell, kill=kill)
    launch(folder, cell, resume=folder / f"step{kill}.ckpt")
    one, two = final(reference), final(folder)
    assert one.keys() == two.keys()
    difference = max((one[k].double() - two[k].double()).abs().max().item() for k in one)
    outcomes = [json.loads((f / "outcome.json").read_text()) for f in (reference, folder)]
    expected = rows(reference, "first", kill)
    before = (kill - 1) * cell.validations // STEPS
    assert sum("val/loss" in row for row in expected) == EPOCHS * cell.validations - before
    return difference, expected == rows(folder, "resumed", kill) and outcomes[0] == outcomes[1]


def matrix(cells: list[Cell], kills: dict[str, int], scratch: Path) -> Iterator[tuple[Cell, str, float, bool]]:
    if not (scratch / "images").exists():
        write_images(scratch / "images")
    for number, cell in enumerate(cells):
        reference = scratch / f"reference{number}"
        reference.mkdir()
        launch(reference, cell)
        for label, kill in kills.items():
            folder = scratch / f"{number}-{label}"
            folder.mkdir()
            yield cell, label, *compare(reference, cell, kill, folder)


def main() -> int:
    started, bad = time.monotonic(), 0
    columns = ["strategy", "workers", "accumulation", "precision", "data", "validations per epoch", "killed at"]
    columns += ["max abs difference", "metrics.csv, best checkpoints"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    cells = [cell for cell in CELLS if all(word in " ".join(map(str, cell)) for word in sys.argv[1:])]
    with tempfile.TemporaryDirectory() as scratch:
        for cell, label, difference, same in matrix(cells, KILLS, Path(scratch)):
            found = [*cell, label, f"{difference:g}", "same" if same else "DIFFER"]
            print(f"| {' | '.join(map(str, found))} |", flush=True)
            bad += difference != 0 or not same
    print(f"\n{len(cells) * len(KILLS)} rows, {bad} not exact, {time.monotonic() - started:.0f} s")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
