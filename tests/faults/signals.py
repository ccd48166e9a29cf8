"""Each signal to each process of a training of two: the exit code, the seconds until all have gone, what is left.

python -m tests.faults signals             # 10 times each, as `--config ddp` starts them
python -m tests.faults.signals torchrun 5  # as torchrun does, which has exit codes of its own
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.distributed.started import Run
from tests.faults.row import Row

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL)
EXPECTED = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}
CASES = [*((s, r) for s in SIGNALS for r in range(2)), *((s, None) for s in EXPECTED)]  # None: to the whole group
WITHIN = 30  # seconds
KILLED_WITHIN = 60  # seconds, after a SIGKILL


def rows(*, thorough: bool) -> Iterator[Row]:
    """Ten tries each; the fast subset is a single one, SIGINT to the process that Lightning started."""
    for signum, rank in CASES if thorough else [(signal.SIGINT, 1)]:
        yield tries(signum, rank, launch="ddp", times=10 if thorough else 1)


def tries(signum: signal.Signals, rank: int | None, *, launch: str, times: int) -> Row:
    results = []
    for _ in range(times):
        with tempfile.TemporaryDirectory() as scratch:
            results.append(measure(Path(scratch), launch=launch, signum=signum, rank=rank))
    codes = sorted({code for code, _, _ in results})
    seconds = sorted(each for _, each, _ in results)
    wrong = [problem for _, _, problem in results if problem]
    if launch == "ddp" and codes != [EXPECTED.get(signum, codes[0])]:
        wrong.append(f"exit codes {codes}")
    if seconds[-1] > (KILLED_WITHIN if signum == signal.SIGKILL else WITHIN):
        wrong.append("too slow")
    outcome = f"exit {', '.join(map(str, codes))}; {seconds[len(seconds) // 2]:.1f} s, at most {seconds[-1]:.1f} s"
    whom = "every process, loader workers included" if rank is None else f"process {rank} of 2"
    case = f"{signum.name} to {whom} ({launch}), {times} times"
    return Row(case=case, outcome="; ".join([outcome, *wrong]), right=not wrong)


def measure(folder: Path, *, launch: str, signum: int, rank: int | None) -> tuple[int, float, str]:
    """(exit code, seconds until all had gone, what is wrong or "")."""
    words = ["--trainer.max_epochs", "1000", "--data.num_workers", "2" if rank is None else "0"]
    run = Run(folder, launch=launch, beacon={}, words=words)
    pids = run.pids()
    time.sleep(random.random())
    if rank is None:
        os.killpg(run.process.pid, signum)
    else:
        os.kill(pids[rank], signum)
    code, seconds = run.wait(list(pids.values()))
    log = run.log.read_text()
    if signum == signal.SIGKILL:
        told = "another process of this run has gone" in log or "terminated with code" in log or "has gone" in log
        return code, seconds, "" if told or launch == "torchrun" else "no message"
    lines = [line for line in log.splitlines() if "ended after step" in line]
    if len(lines) != 1 or not lines[0].endswith("last.ckpt") or (launch == "ddp" and "Traceback" in log):
        return code, seconds, f"log: {log[-1500:]}"
    step = int(lines[0].split("after step ")[1].split(";")[0])
    saved = run.checkpoint()["global_step"]
    return code, seconds, "" if saved == step else f"ended after step {step}, saved at {saved}"


if __name__ == "__main__":
    for each in CASES:
        print(tries(*each, launch=sys.argv[1], times=int(sys.argv[2])), flush=True)
