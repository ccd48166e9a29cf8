"""Started as users start it, with two processes: under SLURM (simulated), and by torchrun, which restarts them."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.distributed.started import ROOT, Run

SHORT = [
    *("--trainer.max_epochs", "2", "--trainer.limit_train_batches", "6", "--trainer.limit_val_batches", "1"),
    *("--trainer.check_val_every_n_epoch", "1"),
]


def metrics(run: Run) -> list[dict[str, str]]:
    with (run.folder / "metrics.csv").open(encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def assert_same(run: Run, reference: Run) -> None:
    """Weights bit for bit, every row of metrics.csv once, and the same best checkpoint."""
    one, two = run.checkpoint(), reference.checkpoint()
    assert one["global_step"] == two["global_step"] == 12
    assert all(one["state_dict"][k].equal(v) for k, v in two["state_dict"].items())
    assert metrics(run) == metrics(reference)
    names = [sorted(path.name for path in (r.folder / "checkpoints").iterdir()) for r in (run, reference)]
    assert names[0] == names[1]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Nobody interrupts this one."""
    run = Run(tmp_path_factory.mktemp("reference"), launch="ddp", words=SHORT)
    assert run.wait()[0] == 0, run.log.read_text()[-3000:]
    return run


def test_slurm_requeues_and_goes_on(reference: Run, tmp_path: Path) -> None:
    run = Run(tmp_path, launch="slurm", words=SHORT, beacon={"seconds": 0.5})
    pids = run.pids()
    for pid in pids.values():
        os.kill(pid, signal.SIGTERM)
    code, _ = run.wait(list(pids.values()))
    assert code == 143, run.log.read_text()[-3000:]
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 4711\n"
    assert 3 < run.checkpoint()["global_step"] < 12
    assert "ended after step" in run.log.read_text() and "Traceback" not in run.log.read_text()

    again = Run(tmp_path, launch="slurm", words=SHORT)
    assert again.wait()[0] == 0, again.log.read_text()[-3000:]
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 4711\n", "a job that is done was requeued"
    assert_same(again, reference)


def test_the_job_script_is_sound() -> None:
    text = (ROOT / "recipes" / "slurm.sbatch").read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    for line in ("--requeue", "--open-mode=append", "--signal=USR1@180"):
        assert f"#SBATCH {line}\n" in text


def test_torchrun_restarts_a_killed_process(reference: Run, tmp_path: Path) -> None:
    """In the second epoch, so that there is a checkpoint to go on from."""
    run = Run(tmp_path, launch="torchrun restarting", words=SHORT, beacon={"step": 8, "seconds": 0.5})
    os.kill(run.pids()[1], signal.SIGKILL)
    code, _ = run.wait()
    assert code == 0, run.log.read_text()[-3000:]
    assert "--ckpt_path auto: runs/digits/run/checkpoints/last.ckpt" in run.log.read_text()
    assert_same(run, reference)
