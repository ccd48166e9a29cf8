"""Starting the processes of one distributed run as torchrun would, on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


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


def run_processes(module: str, arguments: list[str], world: int, timeout: int = 400) -> None:
    """Run ``python -m module arguments`` in ``world`` fresh processes and wait for all of them."""
    port, processes = free_port(), []
    for rank in range(world):
        settings = os.environ | {"OMP_NUM_THREADS": "1"} | environment(rank, world, port)
        command = [sys.executable, "-m", module, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=settings, cwd=ROOT, **pipes))
    try:
        outputs = [p.communicate(timeout=timeout)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    for rank, (p, output) in enumerate(zip(processes, outputs, strict=True)):
        assert p.returncode == 0, f"process {rank} of {module} {arguments} ended with {p.returncode}:\n{output[-3000:]}"
