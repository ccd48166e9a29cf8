"""Accuracy, mean loss and predictions.csv of n images on 1, 2 and 3 processes, ddp and FSDP2, against one process.

python -m tests.distributed.exactness                   # measure, and print the differences as a Markdown table
python -m tests.distributed.exactness FOLDER WORLD      # one process of one of its runs
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from hornet_lit.data import ImageNetDataModule
from hornet_lit.data.digits import save_images
from hornet_lit.strategy import FullyShardedStrategy
from hornet_lit.writers import PredictionWriter
from tests.distributed.processes import run_processes
from tests.distributed.worker import module

COUNTS, WORLDS = (1, 2, 7, 37, 64), (1, 2, 3)
# (images, images per device at once): of 7 and of 37 the last stands alone, and a batch of one takes other kernels.
CASES = [*((n, 6) for n in COUNTS), (37, 64)]
REFERENCE = ("auto", 1)
RUNS = [REFERENCE, *itertools.product(("ddp", "fsdp"), WORLDS)]
Run = tuple[str, int]  # strategy, number of processes


def measure(folder: Path) -> None:
    """Train a little, write the images, and run everything; `scores` and `table` tell where the results are."""
    prepare(folder)
    for world in WORLDS:
        run_processes("tests.distributed.exactness", [str(folder), str(world)], world)


def prepare(folder: Path) -> None:
    """A checkpoint whose raw and averaged weights score differently, and class folders of the first n held-out digits.

    The folders hold no train/ and, for a small n, not every class: the checkpoint tells what the labels are.
    """
    for n in COUNTS:
        for path in save_images(folder / "all", n, img_size=16):
            place = images(folder, n) / path.stem[-1] / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=20,
        logger=False,
        callbacks=[ModelCheckpoint(folder, filename="trained")],
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    data = ImageNetDataModule(
        root=str(images(folder, COUNTS[-1]).parent),
        train_split="val",
        batch_size=32,
        in_chans=1,
        img_size=16,
        scale=(0.7, 1.0),
        hflip=0.0,
        auto_augment=None,
        reprob=0.0,
        num_workers=0,
    )
    trainer.fit(module(), datamodule=data)


def images(folder: Path, n: int) -> Path:
    return folder / "images" / str(n) / "val"


def table(folder: Path, run: Run, n: int, batch: int) -> Path:
    """The predictions.csv of a run."""
    return folder / f"{run[0]}-{run[1]}-{n}-{batch}.csv"


def scores(folder: Path, run: Run, n: int, batch: int) -> dict[str, float]:
    """What validation logged in a run."""
    return json.loads(table(folder, run, n, batch).with_suffix(".json").read_text())


def evaluate(folder: Path, run: Run, n: int, batch: int) -> None:
    """Validate and predict, as one of the run's processes."""
    strategy, world = run
    data = ImageNetDataModule(
        root=str(images(folder, n).parent),
        predict_path=str(images(folder, n)),
        in_chans=1,
        img_size=16,
        crop_pct=1.0,
        eval_batch_size=batch,
        num_workers=0,
    )
    output = table(folder, run, n, batch)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=FullyShardedStrategy() if strategy == "fsdp" else strategy,
        callbacks=[PredictionWriter(output=str(output), top_k=10)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    model, checkpoint = module(), folder / "trained.ckpt"
    found = trainer.validate(model, datamodule=data, ckpt_path=checkpoint, verbose=False)[0]
    trainer.predict(model, datamodule=data, ckpt_path=checkpoint, return_predictions=False)
    if trainer.is_global_zero:
        output.with_suffix(".json").write_text(json.dumps(found))


def differences(folder: Path) -> Iterator[tuple[Run, int, int, float, bool]]:
    """(run, n, batch, largest difference of a score from one process's, predictions.csv equal byte for byte)."""
    for run, (n, batch) in itertools.product(RUNS[1:], CASES):
        one, other = (scores(folder, r, n, batch) for r in (REFERENCE, run))
        assert one.keys() == other.keys()
        texts = [table(folder, r, n, batch).read_bytes() for r in (REFERENCE, run)]
        yield run, n, batch, max(abs(one[k] - other[k]) for k in one), texts[0] == texts[1]


def main() -> int:
    if len(sys.argv) > 1:
        torch.set_num_threads(1)
        folder, world = Path(sys.argv[1]), int(sys.argv[2])
        for run, (n, batch) in itertools.product([r for r in RUNS if r[1] == world], CASES):
            evaluate(folder, run, n, batch)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        measure(Path(scratch))
        found = list(differences(Path(scratch)))
    counts = ", ".join(map(str, COUNTS))
    print(f"| strategy | processes | largest difference of a score, n = {counts} | predictions.csv |\n{'|---' * 4}|")
    for run in RUNS[1:]:
        mine = [row for row in found if row[0] == run]
        largest = ", ".join(f"{max(row[3] for row in mine if row[1] == n):.1g}" for n in COUNTS)
        print(f"| {run[0]} | {run[1]} | {largest} | {'identical' if all(row[4] for row in mine) else 'DIFFERS'} |")
    return int(any(difference > 1e-6 or not same for *_, difference, same in found))


if __name__ == "__main__":
    sys.exit(main())
