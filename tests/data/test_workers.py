"""Loader processes and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import torch
from torch.utils.data import DataLoader, Dataset

from hornet_lit.data.workers import outlive_signals


class Pids(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(0.02)
        return torch.tensor(os.getpid())


def test_only_its_own_process_ends_a_worker() -> None:
    # In a fresh process: once torch.distributed was used, a forked worker has a thread of torch's that takes SIGTERM.
    subprocess.run([sys.executable, "-m", "tests.data.test_workers"], check=True, timeout=120)


def send_signals() -> None:
    batches = iter(DataLoader(Pids(), batch_size=1, num_workers=1, worker_init_fn=outlive_signals, timeout=30))
    pid = int(next(batches))
    for name in ("TERM", "INT", "USR1"):
        subprocess.run(["kill", f"-{name}", str(pid)], check=True)
    assert all(int(next(batches)) == pid for _ in range(20))
    (worker,) = batches._workers  # type: ignore[attr-defined]
    os.kill(pid, signal.SIGTERM)
    worker.join(10)
    assert worker.exitcode == 0


if __name__ == "__main__":
    send_signals()
