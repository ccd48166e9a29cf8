"""Starting the processes of one distributed run as torchrun would, on this machine."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun tells a process; a single process is told nothing."""
    if world == 1:
        return {}
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    settings |= {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "test"}
    return {name: str(value) for name, value in settings.items()}


def forkserver() -> ForkServerContext:
    """Forks processes from a server that has only imported the libraries: each of them would take seconds for that."""
    context = multiprocessing.get_context("forkserver")
    ours = [f"hornet_lit.{name}" for name in ("data", "module", "strategy", "writers")]
    context.set_forkserver_preload([*ours, "sklearn.datasets", "sklearn.model_selection"])  # for the digits
    return context


def run_processes(module: str, arguments: list[str], world: int, timeout: int = 400) -> str:
    """Run ``python -m module arguments`` in ``world`` fresh processes and give what they printed, one after another."""
    with tempfile.TemporaryDirectory() as folder:
        port, logs = free_port(), [Path(folder, str(rank)) for rank in range(world)]
        settings = [dict(os.environ) | environment(rank, world, port) for rank in range(world)]
        processes = [
            forkserver().Process(target=_run_module, args=(module, arguments, own, log))
            for own, log in zip(settings, logs, strict=True)
        ]
        for p in processes:
            p.start()
        until = time.monotonic() + timeout
        for p in processes:
            p.join(max(0, until - time.monotonic()))
        for p in processes:
            p.kill()
            p.join()
        for rank, (p, log) in enumerate(zip(processes, logs, strict=True)):
            end = log.read_text()[-3000:] if log.exists() else ""
            assert p.exitcode == 0, f"process {rank} of {module} {arguments} ended with {p.exitcode}:\n{end}"
        return "".join(log.read_text() for log in logs)


def _run_module(module: str, arguments: list[str], settings: dict[str, str], log: Path) -> None:
    os.environ.clear()  # it is the server's
    os.environ.update(settings)
    with log.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__")
