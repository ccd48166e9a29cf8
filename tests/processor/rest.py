"""What needs no rivals in processes of their own: the depth-wise weight gradient, cost per pixel of larger images, the
input, start-up."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from hornet_lit.bench import Run, Setting, machine
from tests.data import throughput
from tests.device import kernels
from tests.device.report import Bar, Job, Report
from tests.processor.speed import OURS, SMALL_OURS, STEPS, TURNS

SIZES = (224, 384, 512, 768)
CHEAP = ("--version", "--help", "recipes")
IMPORTS = "import torch, lightning.pytorch, timm"
GRADIENT = "depth-wise 7×7 weight gradient over its forward, most of the four shapes"
INPUT = "input, images/s per core, times timm's create_transform"
FIT = "fit on the digits, command to first step, over the bare imports"


def bars() -> list[Bar]:
    found = [Bar(name=f"{GRADIENT}, {dtype}", at_most=4.0) for dtype in kernels.DTYPES]
    for kind in OURS:
        for step in STEPS.values():
            found += [Bar(name=f"{kind}, {step}, most {what} per pixel over 224²", at_most=1.15) for what in MEASURES]
    found.append(Bar(name=INPUT, at_least=1.5))
    found += [Bar(name=f"hornet-lit {words}, seconds", at_most=0.3) for words in CHEAP]
    return [*found, Bar(name=FIT, at_most=1.3)]


MEASURES = ("time", "memory")


def run(job: Job) -> Report:
    report = Report(part="rest", machine=machine(torch.device("cpu")))
    for part in (_gradient, _growth, _input, _start):
        part(job, report)
        report.save(job.output)
    return report


def _gradient(job: Job, report: Report) -> None:
    timer = kernels.Timer(torch.device("cpu"), turns=2 if job.small else 11, inner=1)
    inner = Report(part="")
    kernels._depthwise(inner, timer, 1 if job.small else 8)
    report.tables |= inner.tables
    report.found |= {f"{GRADIENT}, {dtype}": inner.found[f"{kernels.GRADIENT}, {dtype}"] for dtype in kernels.DTYPES}


def _growth(job: Job, report: Report) -> None:
    """Batch 8, all sizes of a network in turns in one process."""
    rows = report.tables.setdefault("per pixel, against the smallest size (medians; most tensor memory)", [])
    sizes = (32, 48) if job.small else SIZES
    for kind, network in (SMALL_OURS if job.small else OURS).items():
        for step, told in STEPS.items():
            first = Setting(
                network=network, step=step, size=sizes[0], batch=8, precision="32", channels_last=True, compile="none"
            )
            runs = {size: Run(replace(first, size=size), torch.device("cpu")) for size in sizes}
            for each in runs.values():
                each.warm_up()
            for _ in range(2 if job.small else TURNS - 2):
                for each in runs.values():
                    each.take_turn()
            time_per, memory_per = (
                {size: value / size**2 for size, value in values.items()}
                for values in (
                    {size: statistics.median(each.times) for size, each in runs.items()},
                    {size: each.peak_bytes - _weights(each) for size, each in runs.items()},
                )
            )
            for what, per in zip(MEASURES, (time_per, memory_per), strict=True):
                grown = {f"{size}²": per[size] / per[sizes[0]] for size in sizes[1:]}
                rows.append({"network": network, "step": told, "of": what, **grown})
                report.found[f"{kind}, {told}, most {what} per pixel over 224²"] = max(grown.values())


def _weights(run: Run) -> int:
    """Bytes that do not grow with the image: weights, and in training their gradients and AdamW's moments."""
    return sum(p.nbytes for p in run.network.parameters()) * (4 if run.setting.step == "train" else 1)


def _input(job: Job, report: Report) -> None:
    if job.images is None:
        report.notes.append("input not measured: give --images FOLDER of class folders of JPEGs")
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sides = throughput.jpeg_sides(job.images, img_size=224)
        found = throughput.rates(sides, repeats=1 if job.small else 7, passes=1 if job.small else 3)
    finally:
        torch.set_num_threads(threads)
    first, *_ = found.values()
    ratios = {name: [a / b for a, b in zip(first, values, strict=True)] for name, values in found.items()}
    report.tables["JPEGs to augmented batches, one core"] = [
        {
            "side": name,
            "images/s": statistics.median(values),
            "smallest": min(values),
            "largest": max(values),
            "first row / this": statistics.median(ratios[name]),
        }
        for name, values in found.items()
    ]
    report.found[INPUT] = statistics.median(ratios["timm, create_transform to the end"])


def _start(job: Job, report: Report) -> None:
    """Whole processes, from start to end; `fit` ends with its first step."""
    with tempfile.TemporaryDirectory() as folder:
        fit = ["fit", "--config", "digits", "--trainer.max_steps", "1", "--model.warmup_epochs", "0"]
        fit += ["--trainer.logger.save_dir", folder, "--trainer.enable_progress_bar", "false"]
        commands = {words: [*_command(), words] for words in CHEAP}
        commands |= {"fit": [*_command(), *fit], IMPORTS: [sys.executable, "-c", IMPORTS]}
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for turn in range(2 if job.small else TURNS - 1):
            for name, command in commands.items():
                started = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True, cwd=folder)
                if turn:  # the first fills the caches
                    seconds[name].append(time.perf_counter() - started)
    report.tables["whole processes, s"] = [
        {"command": name, "median": statistics.median(values), "least": min(values), "most": max(values)}
        for name, values in seconds.items()
    ]
    report.found |= {f"hornet-lit {words}, seconds": statistics.median(seconds[words]) for words in CHEAP}
    report.found[FIT] = statistics.median(a / b for a, b in zip(seconds["fit"], seconds[IMPORTS], strict=True))


def _command() -> list[str]:
    beside = Path(sys.executable).with_name("hornet-lit")
    return [str(beside)] if beside.exists() else [sys.executable, "-m", "hornet_lit"]
