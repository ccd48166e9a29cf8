"""recipes/cifar10 from scratch on the real images, by the command: wall time and top-1 on the test images."""

from __future__ import annotations

import time

import torch

from hornet_lit.bench import machine
from tests.device.command import SMALL_NETWORK, column, fit
from tests.device.report import Bar, Job, Report

ACCURACY, MINUTES = "CIFAR-10 from scratch, top-1 on the test images in %", "CIFAR-10 from scratch, minutes"
SMALL = (
    *(*SMALL_NETWORK, "--model.warmup_epochs", "0"),
    *("--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1", "--data.batch_size", "8"),
    *("--data.num_workers", "0"),
)


def bars() -> list[Bar]:
    return [Bar(name=ACCURACY, at_least=96.0), Bar(name=MINUTES, at_most=10.0)]


def run(job: Job) -> Report:
    report = Report(part="cifar", machine=machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    if job.images is None:
        report.notes.append("not run: give --images FOLDER_OR_TAR with train/ and test/")
        return report
    folder = job.output / f"cifar-{time.time_ns()}"
    words = ["--config", "cifar10", "--data.root", str(job.images.resolve())]
    words += ["--trainer.logger.save_dir", str(folder.resolve()), "--trainer.logger.name", ""]
    words += ["--trainer.logger.version", "run", *(SMALL if job.small else ())]
    ended = fit(words, log=folder / "log.txt", seconds=job.left())
    raw, ema = (column(folder / "run", name) for name in ("val/acc1", "val/acc1_ema"))
    whole = ended.code == 0
    report.tables["recipes/cifar10"] = [
        {
            "validated after step": step,
            "top-1 %, raw": 100 * raw[step],
            "top-1 %, EMA": 100 * ema[step] if step in ema else None,
        }
        for step in sorted(raw)
    ]
    report.notes.append(f"exit code {ended.code} after {ended.seconds:.0f} s, imports and decoding included")
    if ended.cut:
        report.notes.append("CUT: the time was up before the schedule's end, so its accuracy is not the recipe's")
    elif not whole:
        report.notes.append(f"failed: {ended.why()}")
    if whole and raw:
        last = max(raw)
        # The weights that the recipe selects its checkpoint by.
        report.found = {ACCURACY: 100 * ema.get(last, raw[last]), MINUTES: ended.seconds / 60}
    return report
