"""Loader processes and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset

from hornet_lit.data.sampling import ResumableLoader
from hornet_lit.data.workers import outlive_signals


class Pids(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(0.02)
        return torch.tensor(os.getpid())


def test_only_its_own_process_ends_a_worker() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # a worker then sets 1, at which torch starts a thread of its thread pool in it
    batches = iter(ResumableLoader(Pids(), batch_size=1, num_workers=1, worker_init_fn=outlive_signals, timeout=30))
    torch.set_num_threads(threads)
    pid = int(next(batches))
    open_masks = [task for task in Path(f"/proc/{pid}/task").iterdir() if not blocks_sigterm(task)]
    assert len(open_masks) == 1, "only the thread that waits for the signal may take it"
    for name in ("TERM", "INT", "USR1"):
        subprocess.run(["kill", f"-{name}", str(pid)], check=True)
    assert all(int(next(batches)) == pid for _ in range(20))
    (worker,) = batches._workers
    os.kill(pid, signal.SIGTERM)
    worker.join(10)
    assert worker.exitcode == 0


def test_signals_reach_this_process_again() -> None:
    next(iter(ResumableLoader(Pids(), batch_size=1, num_workers=1)))
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def blocks_sigterm(task: Path) -> bool:
    status = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines() if ":" in line)
    return bool(int(status["SigBlk"], 16) >> (signal.SIGTERM - 1) & 1)
