"""Kill a training with SIGKILL at awkward steps, resume it, and compare with the run that nobody killed.

    python -m tests.distributed.resume_matrix            # the whole matrix, as a Markdown table
    python -m tests.distributed.resume_matrix --fast     # two of its trainings

Everything random is on: augmentation, mixup and CutMix, stochastic depth, EMA, best-k checkpoints. Each run is a fresh
process, forked from a server that has only imported the libraries.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from hornet_lit.data import DigitsDataModule
from hornet_lit.module import ImageClassifier
from hornet_lit.strategy import FullyShardedStrategy

EPOCHS, STEPS, BATCH = 3, 6, 32
KILLS = {"1": 1, "mid": 3, "last-1": STEPS - 1, "last": STEPS, "last+1": STEPS + 1}
STRATEGIES = {"single": ("auto", 1), "ddp 2": ("ddp", 2), "FSDP2 2": ("fsdp", 2)}
Cell = tuple[str, int, int, str]  # strategy, workers, accumulation, precision


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


def train(out: str, cell: Cell, rank: int, port: int, kill: int | None, resume: str | None) -> None:
    """One process of one run; its checkpoints and metrics.csv go to ``out``."""
    name, workers, accumulation, precision = cell
    strategy, world = STRATEGIES[name]
    if world > 1:
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        environment |= {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "matrix"}
        os.environ.update({k: str(v) for k, v in environment.items()})
    sys.stdout = sys.stderr = open(Path(out) / f"log_{rank}.txt", "a")  # noqa: SIM115  (for the life of the process)
    torch.set_num_threads(1)
    pl.seed_everything(7, verbose=False)
    module = ImageClassifier(
        network="hornet_nano_gf_32",
        in_chans=1,
        img_size=16,
        drop_path_rate=0.3,
        network_options={"depths": [1, 1, 2, 1], "base_dim": 16},
        lr=2e-3,
        warmup_epochs=1,
        mixup=0.8,
        cutmix=1.0,
        ema_decay=0.9,
    )
    per_device = BATCH // world // accumulation
    data = DigitsDataModule(batch_size=BATCH, batch_size_per_device=per_device, img_size=16, num_workers=workers)
    checkpoints = [
        ModelCheckpoint(
            out, filename="step{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False
        ),
        ModelCheckpoint(out, filename="best{step}", monitor="val/acc1_ema", mode="max", auto_insert_metric_name=False),
    ]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=FullyShardedStrategy() if strategy == "fsdp" else strategy,
        precision=precision,
        max_epochs=EPOCHS,
        limit_train_batches=STEPS * accumulation,
        gradient_clip_val=1.0,
        logger=CSVLogger(out, name=None, version="resumed" if resume else "first"),
        log_every_n_steps=1,
        callbacks=checkpoints + ([Killer(kill)] if kill else []),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume)


def launch(out: Path, cell: Cell, *, kill: int | None = None, resume: Path | None = None) -> None:
    """Run all processes of one training and wait for them; a killed run must end by SIGKILL."""
    context = multiprocessing.get_context("forkserver")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    world = STRATEGIES[cell[0]][1]
    arguments = (str(out), cell)
    processes = [
        context.Process(target=train, args=(*arguments, rank, port, kill, resume and str(resume)))
        for rank in range(world)
    ]
    for p in processes:
        p.start()
    for p in processes:
        p.join(240)
    codes = [p.exitcode for p in processes]
    expected = [-signal.SIGKILL if kill else 0] * world
    if codes != expected:
        for p in processes:
            p.kill()
        log = (out / "log_0.txt").read_text()[-2000:]
        raise RuntimeError(f"{cell}, kill {kill}: exit codes {codes}, expected {expected}\n{log}")


def final(out: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(out / f"step{EPOCHS * STEPS}.ckpt", weights_only=True)
    averages = {f"ema.{k}": v for k, v in checkpoint["ema"]["state_dict"].items()}
    return checkpoint["state_dict"] | averages


def rows(out: Path, version: str, after: int) -> list[dict[str, str]]:
    """metrics.csv from the given optimizer step on; wall times are not logged, so every column must agree."""
    with (out / version / "metrics.csv").open() as file:
        found = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [row for row in found if int(row["step"]) >= after]


def compare(reference: Path, cell: Cell, kill: int, folder: Path) -> tuple[float, bool]:
    """Kill at ``kill``, resume; gives (largest difference of raw and averaged weights, metrics.csv equal)."""
    launch(folder, cell, kill=kill)
    launch(folder, cell, resume=folder / f"step{kill}.ckpt")
    one, two = final(reference), final(folder)
    assert one.keys() == two.keys()
    difference = max((one[k].double() - two[k].double()).abs().max().item() for k in one)
    # Lightning counts logged steps from 0: the first resumed optimizer step is row `kill`.
    return difference, rows(reference, "first", kill) == rows(folder, "resumed", kill)


def matrix(cells: list[Cell], kills: dict[str, int], scratch: Path) -> list[tuple[Cell, str, float, bool]]:
    results = []
    for cell in cells:
        reference = scratch / f"reference {cell}".replace(" ", "_")
        reference.mkdir()
        launch(reference, cell)
        for label, kill in kills.items():
            folder = scratch / f"{cell} {label}".replace(" ", "_")
            folder.mkdir()
            results.append((cell, label, *compare(reference, cell, kill, folder)))
    return results


def cells() -> list[Cell]:
    return list(itertools.product(STRATEGIES, (0, 2), (1, 2), ("32-true",)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true")
    fast = parser.parse_args().fast
    multiprocessing.get_context("forkserver").set_forkserver_preload([MODULE])
    wanted = FAST if fast else [*cells(), ("single", 2, 2, "bf16-mixed"), ("ddp 2", 0, 1, "bf16-mixed")]
    bad = 0
    print(
        "| strategy | workers | accumulation | precision | killed at | max abs difference | metrics.csv |\n|"
        + "---|" * 7
    )
    with tempfile.TemporaryDirectory() as scratch:
        for cell in wanted:
            for (name, workers, accumulation, precision), label, difference, same in matrix(
                [cell], KILLS, Path(scratch)
            ):
                verdict = "same" if same else "DIFFERS"
                print(
                    f"| {name} | {workers} | {accumulation} | {precision} | {label} | {difference} | {verdict} |",
                    flush=True,
                )
                bad += difference != 0 or not same
    return min(bad, 1)


MODULE = "tests.distributed.resume_matrix"
FAST: list[Cell] = [("single", 2, 2, "32-true"), ("ddp 2", 0, 1, "32-true")]

if __name__ == "__main__":
    sys.exit(main())
