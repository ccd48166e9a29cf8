"""Networks, each in a process of its own, that take turns: what one leaves in the caches serves none of the others."""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from hornet_lit.bench import BestProduct, Result, Run, Setting, resident_bytes, timed
from hornet_lit.cli_process import keep_freed_memory
from tests.device.authors import authors_network

TO_END = 10.0  # seconds for the end of a process
PRODUCT_STEPS = 5  # of a turn, and the best counts: the others have emptied the caches


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
    def low(self) -> bool:
        return self.setting.precision != "32"

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
class Measured(Result):
    """`resident_bytes` are those of the peak that do not grow with the images."""

    resident_bytes: int

    @property
    def spread(self) -> float:
        return max(self.times) / min(self.times)


@dataclass(frozen=True)
class Failed:
    """What a process sends in place of an answer."""

    why: str


@dataclass
class _Peer:
    """A process that tells what `_network` or `_product` found, and then answers each request with a turn."""

    name: str
    process: BaseProcess
    pipe: Connection

    @classmethod
    def started(cls, name: str, variant: Variant | None) -> _Peer:
        context = multiprocessing.get_context("forkserver")  # forks from what has only imported
        context.set_forkserver_preload(["hornet_lit.bench", "tests.device.authors"])
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, variant), daemon=True)
        process.start()
        there.close()
        return cls(name, process, here)

    def answer(self, *, asked: bool) -> Any:
        try:
            if asked:
                self.pipe.send(True)
            return self.pipe.recv()
        except (EOFError, OSError):  # killed for its memory, say
            self.process.join()
            return Failed(f"its process ended with {self.process.exitcode}")

    def end(self) -> None:
        with suppress(OSError):  # it has ended by itself
            self.pipe.send(False)
        self.process.join(TO_END)
        self.process.kill()
        self.process.join()


def take_turns(
    variants: Sequence[Variant], *, turns: int, failed: Callable[[str], None]
) -> tuple[dict[Variant, Measured], list[float]]:
    """All variants, and the rates in 10⁹ a second of the machine's best fp32 matrix product, which takes turns too.

    A variant that fails is left out, and ``failed`` is told. Each turn begins with the next, so that none has always
    the same neighbour.

    Raises:
        RuntimeError: if the product fails, without which no rate means anything.
    """
    peers: dict[Variant | None, _Peer] = {}
    abouts: dict[Variant | None, dict[str, Any]] = {}
    times: dict[Variant | None, list[float]] = {}

    def heard(variant: Variant | None, *, asked: bool) -> Any:
        found = peers[variant].answer(asked=asked)
        if not isinstance(found, Failed):
            return found
        told = f"{peers[variant].name} failed: {found.why}"
        if variant is None:
            raise RuntimeError(told)
        failed(told)
        peers.pop(variant).end()
        times.pop(variant, None)
        return None

    try:
        for variant in (*variants, None):  # one after another: building takes both cores
            peers[variant] = _Peer.started(variant.told() if variant else "the matrix product", variant)
            if (about := heard(variant, asked=False)) is not None:
                abouts[variant], times[variant] = about, []
        for turn in range(turns):
            order = list(times)
            for variant in order[turn % len(order) :] + order[: turn % len(order)]:
                if (found := heard(variant, asked=True)) is not None:
                    times[variant].append(found)
    finally:
        for peer in peers.values():
            peer.end()
    rates = times.pop(None)
    product = {"product_rate": statistics.median(rates), "product_type": "fp32"}
    found = {v: Measured(setting=v.setting, times=seconds, **product, **abouts[v]) for v, seconds in times.items() if v}
    return found, rates


def _serve(pipe: Connection, variant: Variant | None) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler, which counts the memory, would write to stderr
    try:
        turn, about = _product() if variant is None else _network(variant)
        pipe.send(about)
        while pipe.recv():
            pipe.send(turn())
    except EOFError:  # the parent has gone
        return
    except Exception as error:  # whatever a network or its compiler comes to, it must not cost the others
        pipe.send(Failed(f"{type(error).__name__}: {str(error)[:300]}"))


def _product() -> tuple[Callable[[], float], dict[str, Any]]:
    product = BestProduct(torch.device("cpu"), "32")
    return lambda: max(product.rate() for _ in range(PRODUCT_STEPS)), {}


def _network(variant: Variant) -> tuple[Callable[[], float], dict[str, Any]]:
    if variant.keeps_memory:
        keep_freed_memory()
    network = authors_network(variant.authors, variant.setting.network) if variant.authors else None
    run = Run(variant.setting, torch.device("cpu"), network)
    run.warm_up()
    about = {"gflops": run.gflops, "peak_bytes": run.peak_bytes}
    # Compiled networks keep what their partitioner decides, which is counted before they are compiled.
    about |= {"resident_bytes": resident_bytes(run), "saved_bytes": None if variant.compiled else run.saved_bytes}
    return lambda: timed(run.device, run.step), about
