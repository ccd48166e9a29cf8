"""Networks, each in a process of its own, that take turns: what one leaves in the caches serves none of the others."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hornet_lit.bench import Setting

PRIORITY = 10  # real-time, where it may be had: a second busy process makes OpenMP's loops many times slower


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row: a network in a mode.

    Attributes:
        side: "ours", "authors" or "rival".
        setting: see `hornet_lit.bench`.
        authors: their hornet.py, if it is their network.
        keeps_memory: whether freed memory is kept, as our commands do; a plain Python process gives it back.
    """

    side: str
    setting: Setting
    authors: Path | None = None
    keeps_memory: bool = True

    @property
    def compiled(self) -> bool:
        return self.setting.compile != "none"

    def told(self) -> str:
        whose = f"authors' {self.setting.network}" if self.side == "authors" else self.setting.network
        mode = "compiled" if self.compiled else "eager"
        if self.compiled and self.setting.step == "infer":
            mode += ", frozen"
        return f"{whose}, {self.setting.precision}, {mode}" + ("" if self.keeps_memory else ", plain Python")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """`times` in seconds, turn by turn; the others as in `hornet_lit.bench.Result`."""

    times: list[float]
    gflops: float
    peak_bytes: int
    saved_bytes: float | None

    def rate(self, batch: int) -> float:
        return batch / sorted(self.times)[len(self.times) // 2]

    @property
    def spread(self) -> float:
        return max(self.times) / min(self.times)


def take_turns(
    variants: Sequence[Variant], *, turns: int, product: str = "32"
) -> tuple[dict[Variant, Measured], list[float]]:
    """All variants, and the rates in 10⁹ a second of the machine's best matrix product in that precision, which takes
    turns with them."""
    context = multiprocessing.get_context("spawn")
    pipes, processes, abouts = [], [], []
    try:
        for what in (*variants, product):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, what), daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
            about = here.recv()
            if isinstance(about, str):
                raise RuntimeError(f"{what if isinstance(what, str) else what.told()}: {about}")
            abouts.append(about)
        times: list[list[float]] = [[] for _ in pipes]
        for _ in range(turns):
            for pipe, found in zip(pipes, times, strict=True):
                pipe.send(True)
                found.append(pipe.recv())
    finally:
        for process in processes:
            process.kill()
            process.join()
    *times, rates = times
    measured = [Measured(times=seconds, **about) for seconds, about in zip(times, abouts[:-1], strict=True)]
    return dict(zip(variants, measured, strict=True)), rates


def _serve(pipe: Connection, what: Variant | str) -> None:
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(PRIORITY))
    try:
        turn, about = _product(what) if isinstance(what, str) else _network(what)
    except Exception as error:  # told to the parent, which has the other networks to measure
        pipe.send(f"{type(error).__name__}: {str(error)[:300]}")
        return
    pipe.send(about)
    while pipe.recv():
        pipe.send(turn())


def _product(precision: str) -> tuple[Any, dict[str, Any]]:
    import torch

    from hornet_lit.bench import _best_product

    product = _best_product(torch.device("cpu"), torch.float32 if precision == "32" else torch.bfloat16)
    return lambda: max(product() for _ in range(5)), {}  # the others have emptied the caches


def _network(variant: Variant) -> tuple[Any, dict[str, Any]]:
    from hornet_lit.cli_process import keep_freed_memory

    if variant.keeps_memory:
        keep_freed_memory()
    import torch

    from hornet_lit.bench import Run, timed
    from tests.device.authors import authors_network

    network = authors_network(variant.authors, variant.setting.network) if variant.authors else None
    run = Run(variant.setting, torch.device("cpu"), network)
    run.warm_up()
    about = {"gflops": run.gflops, "peak_bytes": run.peak_bytes, "saved_bytes": run.saved_bytes}
    return lambda: timed(run.device, run.step), about
