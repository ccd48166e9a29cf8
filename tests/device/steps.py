"""500 optimizer steps of the published recipes in bf16-mixed and in fp32: no loss that is not finite, and both curves.

The recipes' own model settings (learning rate for a batch of 4096, clipping, stochastic depth, mixup, CutMix, EMA) at
a smaller batch, which is the harder case, on generated images of ten classes that can be learnt; the schedule is
squeezed into these steps.
"""

from __future__ import annotations

import gc
import math
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hornet_lit.bench import Run, Setting, machine
from hornet_lit.data.cifar_names import NAMES
from tests.device.command import SMALL_NETWORK, column, fit_here
from tests.device.report import Bar, Job, Report

RECIPES = {"7×7": "hornet_t_in1k", "GF": "hornet_t_gf_in1k"}
NETWORKS = {"7×7": "hornet_tiny_7x7", "GF": "hornet_tiny_gf"}
PRECISIONS = ("bf16-mixed", "32-true")
STEPS = 500
WARM_UP = 0.2  # of the steps
BATCHES = (256, 128, 64, 32, 16)
START = 5.0  # seconds that a training takes beside its steps
OVERHEAD = 1.4  # of a whole training's step over the bare one's: data, mixup, EMA, clipping, logging
SMALL_NETWORKS = {"7×7": "hornet_pico_32", "GF": "hornet_nano_gf_32"}


def bars() -> list[Bar]:
    return [
        bar
        for kind in RECIPES
        for bar in (
            Bar(name=f"{kind}, bf16-mixed, losses that are not finite", at_most=0.0),
            Bar(name=f"{kind}, bf16-mixed, steps taken", at_least=float(STEPS)),
        )
    ]


def run(job: Job) -> Report:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report(part="steps", machine=machine(device))
    steps = 4 if job.small else STEPS
    batch = 4 if job.small else _largest_batch(job, device, report)
    folder = job.output / f"steps-{time.time_ns()}"
    images = make_images(folder / "images", per_class=2 if job.small else 256)
    curves: dict[tuple[str, str], dict[int, float]] = {}
    rows = report.tables.setdefault(f"{steps} steps of {batch} images by the recipes' model settings", [])
    trainings = list(product(RECIPES, PRECISIONS))
    for number, (kind, precision) in enumerate(trainings):
        run_folder = folder / f"{RECIPES[kind]}-{precision}"
        words = _words(kind, precision, images=images, run=run_folder, batch=batch, steps=steps, small=job.small)
        seconds = max(1, int(job.left() / (len(trainings) - number) - START))
        words += ["--trainer.max_time", f"00:00:{seconds // 60:02d}:{seconds % 60:02d}"]
        ended = fit_here(words, log=folder / f"{run_folder.name}.txt")
        losses = column(run_folder / "run", "train/loss")
        skipped = len(list(run_folder.glob("run/nonfinite-step*.json")))
        bad = max(skipped, sum(not math.isfinite(loss) for loss in losses.values()))
        curves[kind, precision] = losses
        rows.append(
            {
                "network": NETWORKS[kind],
                "precision": precision,
                "steps": len(losses),
                "not finite": bad,
                "loss, first ten": _mean(list(losses.values())[:10]),
                "loss, last ten": _mean(list(losses.values())[-10:]),
                "seconds": ended.seconds,
                "": "failed" if ended.code else "cut, its time was up" if len(losses) < steps else "",
            }
        )
        if ended.code:
            report.notes.append(f"{kind}, {precision}: exit code {ended.code}: {ended.why()}")
        if precision == "bf16-mixed" and losses:
            report.found[f"{kind}, bf16-mixed, losses that are not finite"] = float(bad)
            report.found[f"{kind}, bf16-mixed, steps taken"] = float(len(losses))
        gc.collect()  # the network of this training
        torch.cuda.empty_cache()
        draw(curves, job.output / "steps.png")
        report.save(job.output)
    report.notes.append(f"loss curves: {job.output / 'steps.png'}")
    return report


def make_images(folder: Path, *, per_class: int) -> Path:
    """train/ and test/ with a folder for each of ten classes: 32×32 gratings whose direction is the class's, in noise.

    Always the same images.
    """
    y_HW, x_HW = np.mgrid[0:32, 0:32] / 32
    for number, (split, count) in enumerate((("train", per_class), ("test", max(2, per_class // 16)))):
        for label, name in enumerate(NAMES[10]):
            inside = folder / split / name
            inside.mkdir(parents=True)
            random = np.random.default_rng((number, label))
            for i in range(count):
                angle = math.pi * label / 10
                phase, frequency = random.uniform(0, 2 * math.pi), random.uniform(3, 5)
                wave_HW = np.sin(2 * math.pi * frequency * (x_HW * math.cos(angle) + y_HW * math.sin(angle)) + phase)
                x_HWC = 128 + 50 * wave_HW[..., None] * random.uniform(0.3, 1, 3) + random.normal(0, 30, (32, 32, 3))
                Image.fromarray(x_HWC.clip(0, 255).astype(np.uint8)).save(inside / f"{i:04d}.png")
    return folder


def _words(kind: str, precision: str, *, images: Path, run: Path, batch: int, steps: int, small: bool) -> list[str]:
    """The recipe, its data exchanged: CIFAR's module holds the images in memory and enlarges them on the device."""
    per_epoch = len(list(images.glob("train/*/*"))) // batch
    data = {
        "root": images.resolve(),
        "num_classes": 10,
        "batch_size": batch,
        "eval_batch_size": batch,
        "num_workers": 0,
        "img_size": 32 if small else 224,
        "hflip": 0.0,  # a mirrored grating is of another class
        "reprob": 0.25,
    }
    return [
        *("--config", RECIPES[kind], "--data", "hornet_lit.data.CIFARDataModule"),
        *(word for key, value in data.items() for word in (f"--data.{key}", str(value))),
        *("--model.num_classes", "10", "--model.warmup_epochs", str(WARM_UP * steps / per_epoch)),
        *("--model.skip_nonfinite", str(steps)),  # count them all
        *("--trainer.precision", precision, "--trainer.max_steps", str(steps), "--trainer.log_every_n_steps", "1"),
        *("--trainer.max_epochs", str(-(-steps // per_epoch)), "--trainer.limit_val_batches", "2"),
        *("--trainer.logger.save_dir", str(run.parent.resolve()), "--trainer.logger.name", run.name),
        *("--trainer.logger.version", "run", "--trainer.check_val_every_n_epoch", "10"),
        *("--trainer.enable_progress_bar", "false"),
        *(("--model.network", SMALL_NETWORKS[kind], "--model.img_size", "32", *SMALL_NETWORK) if small else ()),
    ]


def _largest_batch(job: Job, device: torch.device, report: Report) -> int:
    """That lets all trainings end in time, going by a few bare steps of each."""
    seconds = 0.0  # an image, of all trainings together
    for kind, precision in product(RECIPES, PRECISIONS):
        setting = Setting(
            network=NETWORKS[kind],
            step="train",
            size=224,
            batch=128,  # far smaller ones wait for the launching of kernels
            precision="32" if precision == "32-true" else precision,
            channels_last=True,
            compile="none",
        )
        run = Run(setting, device)
        for _ in range(5):
            run.take_turn()
        seconds += sorted(run.times)[2] / setting.batch
    time_for_steps = job.left() - START * len(RECIPES) * len(PRECISIONS)
    fitting = [batch for batch in BATCHES if STEPS * batch * seconds * OVERHEAD <= time_for_steps]
    batch = fitting[0] if fitting else BATCHES[-1]
    report.notes.append(f"a bare step takes {seconds * 1e3:.2f} ms an image, both networks and precisions together")
    return batch


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def draw(curves: dict[tuple[str, str], dict[int, float]], picture: Path) -> None:
    """A panel for each network, a line for each precision: mean of ten steps, over the steps themselves, pale."""
    from matplotlib.figure import Figure

    from hornet_lit.writers.drawing import BLUE, ORANGE, save_picture

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(RECIPES)), RECIPES, strict=True):
        for precision, colour in zip(PRECISIONS, (BLUE, ORANGE), strict=True):
            losses = curves.get((kind, precision), {})
            x, y = np.array(list(losses)), np.array(list(losses.values()))
            axes.plot(x, y, color=colour, alpha=0.2, linewidth=0.7)
            width = min(10, len(y))
            if width:
                axes.plot(
                    x[width - 1 :], np.convolve(y, np.ones(width) / width, "valid"), color=colour, label=precision
                )
        axes.set(title=NETWORKS[kind], xlabel="optimizer step", ylabel="training loss (mixed labels)")
        axes.grid(alpha=0.3)
        if any(losses for (of, _), losses in curves.items() if of == kind):
            axes.legend(frameon=False)
    save_picture(figure, picture)
