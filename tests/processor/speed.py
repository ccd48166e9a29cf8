"""Inference and training of tiny 7×7 and tiny GF beside the authors' code and ConvNeXt."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from hornet_lit.bench import STEPS, Setting
from hornet_lit.cli_bench import ratio
from hornet_lit.network.build import build_network
from hornet_lit.network.layers import MULTIPLIES_BFLOAT16
from tests.conftest import filled_by_rule
from tests.device.report import Bar, Job, Report
from tests.processor.turns import Measured, Variant, take_turns

OURS = {"7×7": "hornet_tiny_7x7", "GF": "hornet_tiny_gf"}
RIVAL = "convnext_tiny"
SMALL_OURS, SMALL_RIVAL = {"7×7": "hornet_pico_32"}, "convnext_atto"
TOLD = dict(zip(STEPS, ("inference", "training"), strict=True))
TURNS, SMALL_TURNS = 9, 2
EAGER = "the authors' eager"  # with freed memory kept and AdamW fused, as for ours: their faster form


def bars() -> list[Bar]:
    found = []
    for kind in OURS:
        found += [
            Bar(name=f"{kind}, inference fp32 eager, times as fast as {EAGER}", at_least=1.8),
            Bar(name=f"{kind}, inference fp32 best mode, times as fast as {EAGER}", at_least=2.4),
            Bar(name=f"{kind}, inference fp32 best mode, times as fast as the authors' compiled", at_least=1.6),
            Bar(name=f"{kind}, inference bf16 best mode, times as fast as {EAGER} in fp32", at_least=4.0),
            Bar(name=f"{kind}, inference bf16, relative error", at_most=2e-2),
            Bar(name=f"{kind}, inference fp32 best mode, share of the best matrix product", at_least=0.8),
            Bar(name=f"{kind}, training fp32 eager, times as fast as {EAGER}", at_least=2.0),
            Bar(name=f"{kind}, training fp32 best mode, times as fast as {EAGER}", at_least=2.5),
            Bar(name=f"{kind}, kept for the backward pass over the authors'", at_most=0.6),
        ]
        for step, precision in itertools.product(TOLD.values(), ("fp32", "bf16")):
            found.append(Bar(name=f"{kind}, {step} {precision} best mode, times as fast as {RIVAL}'s", at_least=1.3))
    return found


def sections(job: Job, report: Report) -> Sequence[Callable[[], None]]:
    """What is measured, one call after another; each adds to the report."""
    kinds = SMALL_OURS if job.small else OURS
    if not MULTIPLIES_BFLOAT16:
        report.notes.append(f"{RIVAL} runs in fp32 alone: PyTorch only emulates products of bf16 on this CPU")
    errors = [partial(_error, kind, network, job, report) for kind, network in kinds.items()]
    return errors + [
        partial(_race, step, kind, network, job, report) for step in STEPS for kind, network in kinds.items()
    ]


def variants(step: str, network: str, job: Job) -> list[Variant]:
    base = Setting(
        network=network,
        step=step,
        size=32 if job.small else 224,
        batch=2 if job.small else 8,
        precision="32",
        channels_last=True,
        compile="none",
    )
    low = replace(base, precision="bf16" if step == "infer" else "bf16-mixed")
    modes = [base, low] if job.small else [replace(s, compile=c) for s in (base, low) for c in ("none", "default")]
    found = [Variant(side="ours", setting=setting) for setting in modes]
    rivals = [s for s in modes if s.precision == "32" or MULTIPLIES_BFLOAT16]
    found += [Variant(side="rival", setting=replace(s, network=SMALL_RIVAL if job.small else RIVAL)) for s in rivals]
    if job.authors is not None:
        theirs = Variant(side="authors", setting=replace(base, channels_last=False), authors=job.authors)
        found += [theirs, replace(theirs, keeps_memory=False)]
        if step == "infer" and not job.small:
            found.append(replace(theirs, setting=replace(theirs.setting, compile="default")))
    return found


def _error(kind: str, network: str, job: Job, report: Report) -> None:
    """Of the logits with weights and images in bfloat16, the weights filled as the golden networks'."""
    size = 32 if job.small else 224
    x_BCHW = torch.from_numpy(np.random.RandomState(0).standard_normal((2, 3, size, size)).astype(np.float32))
    built = build_network(network, num_classes=1000, img_size=size).eval()
    built.load_state_dict(filled_by_rule(built))
    with torch.no_grad():
        exact_BK = built(x_BCHW)
        found_BK = built.bfloat16()(x_BCHW.bfloat16()).float()
    error = (found_BK - exact_BK).norm() / exact_BK.norm()
    report.found[f"{kind}, inference bf16, relative error"] = error.item()


def _race(step: str, kind: str, network: str, job: Job, report: Report) -> None:
    turns = SMALL_TURNS if job.small else TURNS
    found, rates = take_turns(variants(step, network, job), turns=turns, failed=report.notes.append)
    _tell(step, kind, found, rates, report)


def _tell(step: str, kind: str, found: dict[Variant, Measured], rates: list[float], report: Report) -> None:
    rate = statistics.median(rates)
    authors = {v.compiled: m for v, m in found.items() if v.side == "authors" and v.keeps_memory}
    plain = next((m for v, m in found.items() if not v.keeps_memory), None)
    rows: list[dict[str, Any]] = []
    title = f"{TOLD[step]}, tiny {kind}, medians of {len(rates)} turns, best fp32 product {rate:.0f} GFLOP/s"
    for variant, measured in found.items():
        row = {
            "network and mode": variant.told(),
            "img/s": measured.images_per_second,
            "largest over smallest time": measured.spread,
            "share of fp32 product": measured.share,
            "peak MiB": round(measured.peak_bytes / 2**20),
            "kept MiB/img": None if measured.saved_bytes is None else round(measured.saved_bytes / 2**20, 1),
        }
        for name, theirs in {"authors, eager": authors.get(False), "authors, plain Python": plain}.items():
            if theirs is not None:
                row[f"times {name}"] = ratio(measured, theirs)
        rows.append(row)
        report.times[f"{TOLD[step]}, {variant.told()}"] = measured.times
    report.tables[title] = rows
    report.times[f"{TOLD[step]}, {kind}, product, GFLOP/s"] = rates
    report.found |= judged(step, kind, found)


def judged(step: str, kind: str, found: dict[Variant, Measured]) -> dict[str, float]:
    """Values of the bars for which there are measurements; the best mode of a side is its fastest."""

    def of(side: str, *, low: bool | None = None, compiled: bool | None = None) -> Measured | None:
        fitting = [
            measured
            for v, measured in found.items()
            if v.side == side and v.keeps_memory and low in (None, v.low) and compiled in (None, v.compiled)
        ]
        return max(fitting, key=lambda m: m.images_per_second, default=None)

    name, values = f"{kind}, {TOLD[step]}", {}
    eager, best, low = of("ours", low=False, compiled=False), of("ours", low=False), of("ours", low=True)
    # In bf16 too the rival may run in whatever is its fastest.
    rivals = {"fp32": of("rival", low=False), "bf16": of("rival")}
    theirs, compiled = of("authors", compiled=False), of("authors", compiled=True)

    def compare(what: str, ours: Measured | None, other: Measured | None, whose: str) -> None:
        if ours and other:
            values[f"{name} {what}, times as fast as {whose}"] = ratio(ours, other)

    for precision, ours in {"fp32": best, "bf16": low}.items():
        compare(f"{precision} best mode", ours, rivals[precision], f"{RIVAL}'s")
    compare("fp32 eager", eager, theirs, EAGER)
    compare("fp32 best mode", best, theirs, EAGER)
    if step == "infer":
        compare("bf16 best mode", low, theirs, f"{EAGER} in fp32")
        compare("fp32 best mode", best, compiled, "the authors' compiled")
        if best:
            values[f"{name} fp32 best mode, share of the best matrix product"] = best.share
    elif eager and theirs and eager.saved_bytes and theirs.saved_bytes:
        values[f"{kind}, kept for the backward pass over the authors'"] = eager.saved_bytes / theirs.saved_bytes
    return values
