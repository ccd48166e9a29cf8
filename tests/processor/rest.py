"""What needs no rival networks: the depth-wise weight gradient, cost per pixel of larger images, input, start-up."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hornet_lit.bench import STEPS, Setting
from tests.data import throughput
from tests.device import kernels
from tests.device.report import Bar, Job, Report
from tests.processor.speed import OURS, SMALL_OURS, SMALL_TURNS, TOLD
from tests.processor.turns import Measured, Variant, take_turns

SIZES, SMALL_SIZES = (224, 384, 512, 768), (32, 48)
MEASURES: dict[str, Callable[[Measured], float]] = {
    "time": lambda measured: statistics.median(measured.times),
    "memory": lambda measured: measured.peak_bytes - measured.resident_bytes,
}
GRADIENT_TURNS, GROWTH_TURNS, INPUT_TURNS, START_TURNS = 11, 7, 7, 7
CHEAP = ("--version", "--help", "recipes")
IMPORTS = "import torch, lightning.pytorch, timm"
INPUT = {  # bar → its two sides, of `throughput.jpeg_sides`
    "input, what a loader process does, times timm's create_transform": (
        "hornet-lit, uint8",
        "timm, create_transform to the end",
    ),
    "input, equal work on one core, times timm's create_transform": (
        "hornet-lit, normalised and erased on the same core",
        "timm, create_transform to the end",
    ),
}
FIT = "fit on the digits, command to its end after one step, over the bare imports"


def bars() -> list[Bar]:
    found = kernels.bars()
    for kind in OURS:
        for step in TOLD.values():
            found += [Bar(name=f"{kind}, {step}, most {what} per pixel over 224²", at_most=1.15) for what in MEASURES]
    found += [Bar(name=name, at_least=1.5) for name in INPUT]
    found += [Bar(name=f"hornet-lit {words}, seconds", at_most=0.3) for words in CHEAP]
    return [*found, Bar(name=FIT, at_most=1.3)]


def sections(job: Job, report: Report) -> Sequence[Callable[[], None]]:
    """What is measured, one call after another; each adds to the report."""
    kinds = SMALL_OURS if job.small else OURS
    growth = [partial(_growth, kind, network, step, job, report) for kind, network in kinds.items() for step in STEPS]
    return [partial(_gradient, job, report), *growth, partial(_input, job, report), partial(_start, job, report)]


def _gradient(job: Job, report: Report) -> None:
    turns = SMALL_TURNS if job.small else GRADIENT_TURNS
    inner = Report(part="")
    kernels.depthwise_table(inner, kernels.Timer(torch.device("cpu"), turns=turns, inner=1), 1 if job.small else 8)
    report.tables |= {f"{title}, medians of {turns} turns and their ratio": t for title, t in inner.tables.items()}
    report.found |= inner.found


def _growth(kind: str, network: str, step: str, job: Job, report: Report) -> None:
    """Medians, and memory in tensors at its peak less weights and optimizer state, which do not grow."""
    sizes = SMALL_SIZES if job.small else SIZES
    racing = [
        Variant(
            side="ours",
            setting=Setting(
                network=network, step=step, size=size, batch=8, precision="32", channels_last=True, compile="none"
            ),
        )
        for size in sizes
    ]
    turns = SMALL_TURNS if job.small else GROWTH_TURNS
    found, _ = take_turns(racing, turns=turns, failed=report.notes.append)
    first = found[racing[0]]
    rows: list[dict[str, Any]] = []
    for variant, measured in found.items():
        pixels = (variant.setting.size / sizes[0]) ** 2
        row = {
            "size": variant.setting.size,
            "ms": 1e3 * statistics.median(measured.times),
            "largest over smallest time": measured.spread,
            "peak MiB": round(measured.peak_bytes / 2**20),
            "of it weights": round(measured.resident_bytes / 2**20),
        }
        per = {what: value(measured) / value(first) / pixels for what, value in MEASURES.items()}
        rows.append(row | {f"{what} per pixel": value for what, value in per.items()})
        report.times[f"{TOLD[step]}, {network}, {variant.setting.size}²"] = measured.times
    report.tables[f"{TOLD[step]} of larger images, batch 8, tiny {kind}, medians of {turns} turns"] = rows
    if len(rows) == len(sizes):
        for what in MEASURES:
            most = max(row[f"{what} per pixel"] for row in rows[1:])
            report.found[f"{kind}, {TOLD[step]}, most {what} per pixel over 224²"] = most


def _input(job: Job, report: Report) -> None:
    if job.images is None:
        report.notes.append("input not measured: give --images FOLDER of class folders of JPEGs")
        return
    repeats, passes = (1, 1) if job.small else (INPUT_TURNS, 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sides = throughput.jpeg_sides(job.images, img_size=224)
        found = throughput.rates(sides, repeats=repeats, passes=passes)
    finally:
        torch.set_num_threads(threads)
    timm = found["timm, create_transform to the end"]
    count = sum(file.is_file() for file in job.images.rglob("*"))
    report.tables[f"{count} files to augmented batches, one core, medians of {repeats} × {passes} passes"] = [
        {
            "side": name,
            "images/s": statistics.median(values),
            "smallest": min(values),
            "largest": max(values),
            "times timm, create_transform": statistics.median(a / b for a, b in zip(values, timm, strict=True)),
        }
        for name, values in found.items()
    ]
    report.times |= {f"{name}, images/s": values for name, values in found.items()}
    for bar, (ours, theirs) in INPUT.items():
        report.found[bar] = statistics.median(a / b for a, b in zip(found[ours], found[theirs], strict=True))


def _start(job: Job, report: Report) -> None:
    """Whole processes, from start to end; `fit` ends with its first step."""
    with tempfile.TemporaryDirectory() as folder:
        fit = ["fit", "--config", "digits", "--trainer.max_steps", "1", "--model.warmup_epochs", "0"]
        fit += ["--trainer.logger.save_dir", folder, "--trainer.enable_progress_bar", "false"]
        commands = {words: [*_command(), words] for words in CHEAP}
        commands |= {"fit": [*_command(), *fit], IMPORTS: [sys.executable, "-c", IMPORTS]}
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        turns = SMALL_TURNS if job.small else START_TURNS
        for turn in range(turns + 1):
            for name, command in commands.items():
                started = time.perf_counter()
                done = subprocess.run(command, capture_output=True, cwd=folder, text=True)
                taken = time.perf_counter() - started
                if done.returncode:
                    raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr[-300:]}")
                if turn:  # the first fills the caches
                    seconds[name].append(taken)
    report.tables[f"whole processes, s, medians of {turns} turns"] = [
        {"command": name, "median": statistics.median(values), "least": min(values), "most": max(values)}
        for name, values in seconds.items()
    ]
    report.times |= seconds
    report.found |= {f"hornet-lit {words}, seconds": statistics.median(seconds[words]) for words in CHEAP}
    report.found[FIT] = statistics.median(a / b for a, b in zip(seconds["fit"], seconds[IMPORTS], strict=True))


def _command() -> list[str]:
    beside = Path(sys.executable).with_name("hornet-lit")
    return [str(beside)] if beside.exists() else [sys.executable, "-m", "hornet_lit"]
