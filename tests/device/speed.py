"""Speed and memory of tiny 7×7 and tiny GF in bf16, against the authors' code, ConvNeXt and Swin.

The authors' code as published is fp32, eager and contiguous; their code as one would run it today is under bf16
autocast, channels-last and torch.compile, and so are the networks of timm.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from hornet_lit.bench import Result, Run, Setting, machine, take_turns
from hornet_lit.cli_bench import ratio
from hornet_lit.network import depthwise, spectrum
from tests.device.authors import authors_network
from tests.device.kernels import FORMS, faster_kernels
from tests.device.report import Bar, Job, Report

OURS = {"7×7": "hornet_tiny_7x7", "GF": "hornet_tiny_gf"}
RIVALS = ("convnext_tiny", "swin_tiny_patch4_window7_224")
SMALL_OURS = {"7×7": "hornet_pico_32", "GF": "hornet_nano_gf_32"}
SMALL_RIVALS = ("convnext_atto", "resnet10t")
STEPS = {"train": "training step", "infer": "inference"}
PUBLISHED, TODAY = "authors, as published", "authors, bf16 and compiled"
TURNS = 9
AHEAD = 6  # networks compiled at once, before any is measured: most of a compilation runs on one core
LONGEST_COMPILATION = 75  # seconds; with less time left no further one is begun


def bars() -> list[Bar]:
    found = []
    for kind, step in itertools.product(OURS, STEPS.values()):
        found += [
            Bar(name=f"{kind}, {step}, times as fast as {PUBLISHED}", at_least=6.0),
            Bar(name=f"{kind}, {step}, times as fast as {TODAY}", at_least=1.5),
            Bar(name=f"{kind}, {step}, times as fast as {RIVALS[0]}", at_least=1.1),
        ]
    return found + [Bar(name=f"{kind}, peak training memory over that of {TODAY}", at_most=0.6) for kind in OURS]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row: whose network (`kind` names the two that are compared, for ours and the authors'), in which mode."""

    side: str
    kind: str
    setting: Setting
    kernels: frozenset[str] = frozenset()  # that are not (yet) the package's choice, see `faster_kernels`

    def run(self, job: Job, device: torch.device) -> Run:
        run = RunWithKernels(self.setting, device, self._authors_network(job))
        run.kernels = self.kernels
        return run

    def _authors_network(self, job: Job) -> nn.Module | None:
        if self.side == "ours" or not self.kind:
            return None
        assert job.authors is not None
        return authors_network(job.authors, self.setting.network)


class RunWithKernels(Run):
    kernels: frozenset[str] = frozenset()

    def warm_up(self) -> None:
        with self._kernels():
            super().warm_up()

    def step(self) -> None:
        with self._kernels():
            super().step()

    @contextmanager
    def _kernels(self) -> Iterator[None]:
        longest = {"cuda": spectrum.LONGEST_SIDE["cpu"]} if "dft" in self.kernels else {}
        with (
            patch.object(depthwise, "TRITON", self.kernels & FORMS["Triton"]),
            patch.dict(spectrum.LONGEST_SIDE, longest),
        ):
            yield


def variants(step: str, job: Job) -> list[Variant]:
    """In the order in which they are to be built while time lasts."""
    base = Setting(
        network="",
        step=step,
        size=32 if job.small else 224,
        batch=2 if job.small else 256,
        precision="bf16-mixed",
        channels_last=True,
        compile="none",
    )
    compiled = replace(base, compile="none" if job.small else "default")
    published = replace(base, precision="32", channels_last=False)
    faster = FORMS["Triton"] | {"dft"} if job.small else faster_kernels(job.output)
    faster -= {"weight_grad"} if step == "infer" else set()
    ours = [base, compiled] if step == "train" else [base, compiled, replace(compiled, precision="bf16")]
    found = []
    for kind, network in (SMALL_OURS if job.small else OURS).items():
        if job.authors is not None:
            found.append(Variant(side=PUBLISHED, kind=kind, setting=replace(published, network=network)))
            found.append(Variant(side=TODAY, kind=kind, setting=replace(compiled, network=network)))
        modes = dict.fromkeys(ours)  # the small ones have no compiled mode
        chosen = dict.fromkeys((frozenset(), faster - ({"dft"} if kind == "7×7" else set())))
        for mode, kernels in itertools.product(modes, chosen):
            found.append(Variant(side="ours", kind=kind, setting=replace(mode, network=network), kernels=kernels))
    for network in SMALL_RIVALS if job.small else RIVALS:
        found.append(Variant(side=network, kind="", setting=replace(compiled, network=network)))
    # What is compiled comes last, and of that what no bar but ours can need.
    return sorted(found, key=lambda variant: (variant.setting.compile != "none", bool(variant.kernels)))


def run(job: Job) -> Report:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report(part="speed", machine=machine(device))
    torch.backends.cudnn.benchmark = True  # as in the authors' training script; the shapes never change
    torch._dynamo.config.recompile_limit = 64  # all networks share the code of nn.Module
    started = time.time()
    if device.type == "cuda":
        _compile_ahead(job)
        report.notes.append(f"compiled ahead in {AHEAD} processes, {time.time() - started:.0f} s")
    half = job.left() * 0.55
    for step in STEPS:
        reserve = job.left() - half if step == "train" else 0.0
        try:
            _measure(step, replace(job, deadline=job.deadline - reserve), device, report)
        except Exception as error:
            report.notes.append(f"{STEPS[step]}: {type(error).__name__}: {str(error)[:300]}")
        report.save(job.output)
        torch._dynamo.reset()
    return report


def _measure(step: str, job: Job, device: torch.device, report: Report) -> None:
    """What needs no compilation is measured alone first, so that a compilation that hangs leaves something."""
    runs: dict[Variant, Run] = {}
    for compiled, group in itertools.groupby(variants(step, job), key=lambda variant: variant.setting.compile):
        for variant in group:
            if compiled != "none" and job.left() < LONGEST_COMPILATION:
                report.notes.append(f"no time left for {_told(variant)}")
                continue
            try:
                runs.update([_warm(variant, job, device)])
            except Exception as error:
                report.notes.append(f"{_told(variant)} failed: {type(error).__name__}: {str(error)[:300]}")
        for each in runs.values():
            each.times.clear()
        # The product is taken in the precision of the first: bf16, which is the machine's best.
        order = sorted(runs, key=lambda variant: variant.setting.precision == "32")
        results = take_turns([runs[variant] for variant in order], repeats=2 if job.small else TURNS)
        _tell(step, dict(zip(order, results, strict=True)), report)
        report.save(job.output)


def _warm(variant: Variant, job: Job, device: torch.device) -> tuple[Variant, Run]:
    """The variant, at the largest half, quarter … of its batch that fits into the memory, and its run."""
    while True:
        try:
            run = variant.run(job, device)
            run.warm_up()
            return variant, run
        except torch.cuda.OutOfMemoryError:
            if variant.setting.batch == 1:
                raise
        run = None  # its memory
        torch.cuda.empty_cache()
        variant = replace(variant, setting=replace(variant.setting, batch=variant.setting.batch // 2))


def _told(variant: Variant) -> str:
    s = variant.setting
    return f"{variant.side} {variant.kind} ({s.step}, {_mode(variant)})"


def _mode(variant: Variant) -> str:
    s = variant.setting
    compiled = "eager" if s.compile == "none" else "compiled"
    own = [f"own {' + '.join(sorted(variant.kernels))}"] if variant.kernels else []
    return ", ".join([s.precision, compiled, *own])


def _tell(step: str, results: dict[Variant, Result], report: Report) -> None:
    best = {}
    for kind in OURS:
        own = [result for variant, result in results.items() if (variant.side, variant.kind) == ("ours", kind)]
        if own:
            best[kind] = max(own, key=lambda result: result.images_per_second)
    rows: list[dict[str, Any]] = []
    for variant, result in results.items():
        s = result.setting
        low, high = s.batch / max(result.times), s.batch / min(result.times)
        rows.append(
            {
                "network": s.network,
                "side": variant.side if variant.kind else "timm",
                "mode": _mode(variant),
                "batch": s.batch,
                "img/s": f"{result.images_per_second:.1f} ({low:.1f}–{high:.1f})",
                "of product": f"{100 * result.share:.0f} %",
                "peak MiB": round(result.peak_bytes / 2**20),
                "saved MiB/img": None if result.saved_bytes is None else round(result.saved_bytes / 2**20, 1),
                **{
                    f"ours as fast, {kind}": f"{_ratio(own, result):.2f}×" if variant.kind in ("", kind) else None
                    for kind, own in best.items()
                },
                "": "best of ours" if any(result is own for own in best.values()) else "",
            }
        )
        for kind, own in best.items():
            if variant.kind not in ("", kind) or variant.side == "ours":
                continue
            side = RIVALS[0] if s.network in (RIVALS[0], SMALL_RIVALS[0]) else variant.side
            report.found[f"{kind}, {STEPS[step]}, times as fast as {side}"] = _ratio(own, result)
            if step == "train" and side == TODAY:
                report.found[f"{kind}, peak training memory over that of {TODAY}"] = own.peak_bytes / result.peak_bytes
    rate = statistics.median(result.product_rate for result in results.values())
    size = next(iter(results)).setting.size
    report.tables = {t: rows for t, rows in report.tables.items() if not t.startswith(STEPS[step])}
    report.tables[f"{STEPS[step]}, {size}², medians of turns (range), best bf16 product {rate / 1e3:.3g} TFLOP/s"] = (
        rows
    )


def _ratio(own: Result, other: Result) -> float:
    return ratio(own, other) * own.setting.batch / other.setting.batch


def _compile_ahead(job: Job) -> None:
    """Compiles in several processes, so that Inductor's cache on disk has the networks when they are measured."""
    wanted = [variant for step in STEPS for variant in variants(step, job) if variant.setting.compile != "none"]
    until = time.time() + 0.45 * job.left()
    threads = str(max(1, (os.cpu_count() or 1) // AHEAD))
    before = os.environ.get("TORCHINDUCTOR_COMPILE_THREADS")
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = threads  # read when a process imports Inductor
    pool = multiprocessing.get_context("spawn").Pool(AHEAD)
    try:
        for result in [pool.apply_async(_compile_one, (variant, job)) for variant in wanted]:
            result.wait(max(0.0, until - time.time()))
    finally:
        pool.terminate()
        os.environ.pop("TORCHINDUCTOR_COMPILE_THREADS")
        if before is not None:
            os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = before


def _compile_one(variant: Variant, job: Job) -> None:
    """Failures show when the network is measured; that memory runs out, with others beside, comes after compiling."""
    torch.backends.cudnn.benchmark = True
    run = variant.run(job, torch.device("cuda"))
    run.compile()
    run.step()
