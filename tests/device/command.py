"""`hornet-lit fit` with the words that a user would give it, and what it leaves in its run's folder."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL_NETWORK = ("--model.network_options", '{"base_dim": 16, "depths": [1, 1, 1, 1]}')
TO_STOP = 20.0  # seconds that a training gets to save its checkpoint and end


@dataclass(frozen=True, kw_only=True)
class Ended:
    """`seconds` is the whole of the process, its imports included; `cut`: stopped because the time was up."""

    code: int
    cut: bool
    seconds: float
    output: str

    def why(self) -> str:
        """The end of what it printed."""
        return " / ".join(self.output.strip().splitlines()[-5:])[-500:]


def fit_here(words: Sequence[str], *, log: Path) -> Ended:
    """Runs `hornet-lit fit` with `words` in this process, which spares the imports."""
    import hornet_lit.cli_lightning  # noqa: F401  before the redirection: Lightning keeps the stderr of its first import
    from hornet_lit.cli import main

    started = time.monotonic()
    with log.open("w", encoding="utf-8") as output, redirect_stdout(output), redirect_stderr(output):
        code = main(["fit", *words])
    return _ended(code, cut=False, started=started, log=log)


def fit(words: Sequence[str], *, log: Path, seconds: float) -> Ended:
    """Runs `hornet-lit fit` with `words`; after `seconds` it gets SIGTERM, then SIGKILL."""
    command = [sys.executable, "-m", "hornet_lit", "fit", *words]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    log.parent.mkdir(parents=True, exist_ok=True)
    started, cut = time.monotonic(), False
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        try:
            process.wait(max(1.0, seconds - TO_STOP))
        except subprocess.TimeoutExpired:
            cut = True
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(TO_STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    return _ended(process.returncode, cut=cut, started=started, log=log)


def _ended(code: int, *, cut: bool, started: float, log: Path) -> Ended:
    printed = log.read_text(encoding="utf-8", errors="replace")
    return Ended(code=code, cut=cut, seconds=time.monotonic() - started, output=printed)


def column(run: Path, name: str) -> dict[int, float]:
    """Step → value of a column of the run's metrics.csv; empty where there is none."""
    file = run / "metrics.csv"
    if not file.exists():
        return {}
    with file.open(newline="", encoding="utf-8") as lines:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(lines) if row.get(name)}
