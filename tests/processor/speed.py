"""Inference and training of tiny 7×7 and tiny GF beside the authors' code and ConvNeXt."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hornet_lit.bench import Setting, machine
from hornet_lit.network.build import build_network
from hornet_lit.network.layers import MULTIPLIES_BFLOAT16
from tests.conftest import filled_by_rule
from tests.device.report import Bar, Job, Report
from tests.processor.turns import Measured, Variant, take_turns

OURS = {"7×7": "hornet_tiny_7x7", "GF": "hornet_tiny_gf"}
RIVAL = "convnext_tiny"
SMALL_OURS, SMALL_RIVAL = {"7×7": "hornet_pico_32"}, "convnext_atto"
STEPS = {"infer": "inference", "train": "training"}
TURNS = 9


def bars() -> list[Bar]:
    found = []
    for kind in OURS:
        found += [
            Bar(name=f"{kind}, inference fp32 eager, times as fast as the authors' eager", at_least=1.8),
            Bar(name=f"{kind}, inference fp32 best mode, times as fast as the authors' eager", at_least=2.4),
            Bar(name=f"{kind}, inference fp32 best mode, times as fast as the authors' compiled", at_least=1.6),
            Bar(name=f"{kind}, inference bf16 best mode, times as fast as the authors' fp32 eager", at_least=4.0),
            Bar(name=f"{kind}, inference bf16, relative error", at_most=2e-2),
            Bar(name=f"{kind}, inference fp32, share of the best matrix product", at_least=0.8),
            Bar(name=f"{kind}, training fp32 eager, times as fast as the authors' eager", at_least=2.0),
            Bar(name=f"{kind}, training fp32 best mode, times as fast as the authors' eager", at_least=2.5),
            Bar(name=f"{kind}, kept for the backward pass over the authors'", at_most=0.6),
        ]
        for step, precision in itertools.product(STEPS.values(), ("fp32", "bf16")):
            found.append(Bar(name=f"{kind}, {step} {precision} best mode, times as fast as {RIVAL}", at_least=1.3))
    return found


def run(job: Job) -> Report:
    report = Report(part="speed", machine=machine(torch.device("cpu")))
    if not MULTIPLIES_BFLOAT16:
        report.notes.append(f"{RIVAL} in bf16 left out: PyTorch takes some ten times fp32's time on this CPU")
    for kind, network in (SMALL_OURS if job.small else OURS).items():
        report.found[f"{kind}, inference bf16, relative error"] = _error(network, 32 if job.small else 224)
    for step, (kind, network) in itertools.product(STEPS, (SMALL_OURS if job.small else OURS).items()):
        found, rates = take_turns(variants(step, network, job), turns=2 if job.small else TURNS)
        _tell(step, kind, found, rates, report)
        report.save(job.output)
    return report


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
    compiled = replace(base, compile="default")
    low = replace(base, precision="bf16" if step == "infer" else "bf16-mixed")
    rival = SMALL_RIVAL if job.small else RIVAL
    modes = [base, low] if job.small else [base, compiled, low]
    found = [Variant(side="ours", setting=s) for s in modes]
    rivals = [replace(s, network=rival) for s in modes if s is not low or MULTIPLIES_BFLOAT16]
    found += [Variant(side="rival", setting=s) for s in rivals]
    if job.authors is not None:
        theirs = Variant(side="authors", setting=replace(base, channels_last=False), authors=job.authors)
        found += [theirs, replace(theirs, keeps_memory=False)]
        if step == "infer" and not job.small:
            found.append(replace(theirs, setting=replace(theirs.setting, compile="default")))
    return found


def _error(network: str, size: int) -> float:
    """Of the logits with weights and images in bfloat16, the weights filled as the golden networks'."""
    x_BCHW = torch.from_numpy(np.random.RandomState(0).standard_normal((2, 3, size, size)).astype(np.float32))
    built = build_network(network, num_classes=1000, img_size=size).eval()
    built.load_state_dict(filled_by_rule(built))
    with torch.no_grad():
        exact_BK = built(x_BCHW)
        found_BK = built.bfloat16()(x_BCHW.bfloat16()).float()
    return ((found_BK - exact_BK).norm() / exact_BK.norm()).item()


def ratio(ours: Measured, theirs: Measured) -> float:
    """How many times as fast `ours` is: the median over the turns, of which each compares neighbours in time."""
    return statistics.median(b / a for a, b in zip(ours.times, theirs.times, strict=True))


def _tell(step: str, kind: str, found: dict[Variant, Measured], rates: list[float], report: Report) -> None:
    rate = statistics.median(rates)
    authors = {v.compiled: m for v, m in found.items() if v.side == "authors" and v.keeps_memory}
    plain = next((m for v, m in found.items() if not v.keeps_memory), None)
    rows: list[dict[str, Any]] = []
    for variant, measured in found.items():
        images = measured.rate(variant.setting.batch)
        row = {
            "network and mode": variant.told(),
            "img/s": images,
            "largest over smallest time": measured.spread,
            "share of product": measured.gflops * images / rate,
            "peak MiB": round(measured.peak_bytes / 2**20),
            "kept MiB/img": None if measured.saved_bytes is None else round(measured.saved_bytes / 2**20, 1),
        }
        for name, theirs in {"authors, eager": authors.get(False), "authors, plain Python": plain}.items():
            if theirs is not None:
                row[f"times {name}"] = ratio(measured, theirs)
        rows.append(row)
    title = f"{STEPS[step]}, tiny {kind}, medians of {len(rates)} turns, best fp32 product {rate:.0f} GFLOP/s"
    report.tables[title] = rows
    report.found |= _judged(step, kind, found, rate)


def _judged(step: str, kind: str, found: dict[Variant, Measured], rate: float) -> dict[str, float]:
    def of(whose: str, low: bool, compiled: bool | None = None) -> Measured | None:
        fitting = [
            measured
            for v, measured in found.items()
            if (v.side, v.setting.precision != "32") == (whose, low)
            and v.keeps_memory
            and compiled in (None, v.compiled)
        ]
        return max(fitting, key=lambda m: m.rate(1), default=None)

    name, judged = f"{kind}, {STEPS[step]}", {}
    eager, best, low = of("ours", False, False), of("ours", False), of("ours", True)
    theirs, compiled = of("authors", False, False), of("authors", False, True)
    assert eager is not None and best is not None and low is not None
    for precision, ours in (("fp32", best), ("bf16", low)):
        if rival := of("rival", precision == "bf16"):
            judged[f"{name} {precision} best mode, times as fast as {RIVAL}"] = ratio(ours, rival)
    if theirs is not None:
        judged[f"{name} fp32 eager, times as fast as the authors' eager"] = ratio(eager, theirs)
        judged[f"{name} fp32 best mode, times as fast as the authors' eager"] = ratio(best, theirs)
        if step == "infer":
            judged[f"{name} bf16 best mode, times as fast as the authors' fp32 eager"] = ratio(low, theirs)
        elif theirs.saved_bytes:
            judged[f"{kind}, kept for the backward pass over the authors'"] = eager.saved_bytes / theirs.saved_bytes
    if step == "infer" and compiled is not None:
        judged[f"{name} fp32 best mode, times as fast as the authors' compiled"] = ratio(best, compiled)
    if step == "infer":
        judged[f"{name} fp32, share of the best matrix product"] = best.gflops * best.rate(8) / rate
    return judged
