"""Trainings of two processes, each started as a user would: by the strategy itself, torchrun, or SLURM (simulated)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml

ROOT = Path(__file__).parents[2]
SMALL_NETWORK = {"network_options": {"base_dim": 8, "depths": [1, 1, 1, 1]}, "warmup_epochs": 0}
PYTHON, FIT = [sys.executable], ["-m", "tests.distributed.command", "fit", "--config", "digits", "--ckpt_path", "auto"]
TORCHRUN = [*PYTHON, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
# What a training of several processes leaves in the environment: a process that finds it takes itself for one of them.
LEFT = ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")
LAUNCHERS = {
    "ddp": [*PYTHON, *FIT],
    "torchrun": [*TORCHRUN, *FIT],
    "torchrun restarting": [*TORCHRUN, "--max-restarts", "1", *FIT],
    "slurm": ["bash", str(ROOT / "recipes" / "slurm.sbatch"), "digits"],
}
JOB = {
    **{"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "hornet-lit", "SLURM_NNODES": "1", "SLURM_NODEID": "0"},
    **{"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NODELIST": "node[1-2]"},
}
# What the job script calls: srun as it would start the processes of one node, and scontrol, which notes its orders.
PROGRAMS = {
    "srun": """
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & tasks[i]=$!; done
highest=0
for task in "${tasks[@]}"; do wait "$task"; code=$?; ((code > highest)) && highest=$code; done
exit "$highest"
""",
    "scontrol": """
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >>scontrol.txt; fi
""",
    "hornet-lit": f"""
exec {sys.executable} -m tests.distributed.command "$@"
""",
}


class Beacon(pl.Callback):
    """Leaves a file with this process's id when a step (or a validation) is reached, and makes every later one last.

    Args:
        folder: for the files, `<rank>` each.
        step: the optimizer step.
        where: "train" or "validation".
        seconds: that each batch from that step on takes longer than it would.
    """

    def __init__(self, folder: str, step: int = 3, where: str = "train", seconds: float = 0.05) -> None:
        self.folder, self.step, self.where, self.seconds = Path(folder), step, where, seconds

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._reached(trainer, "train")

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._reached(trainer, "validation")

    def _reached(self, trainer: pl.Trainer, where: str) -> None:
        if trainer.sanity_checking or trainer.global_step < self.step:
            return
        if where == self.where:
            (self.folder / str(trainer.global_rank)).write_text(str(os.getpid()))
        time.sleep(self.seconds)


class Run:
    """A training of `hornet-lit fit --config digits`, started in the background in its own process group.

    Args:
        folder: an empty one; the run is in runs/digits/run, the beacons in beacons.
        launch: a name of LAUNCHERS; under "slurm" the run's folder is slurm-4711.
        words: further options.
        beacon: arguments of Beacon; None trains without one.
    """

    def __init__(
        self, folder: Path, *, launch: str, words: Sequence[str] = (), beacon: dict[str, Any] | None = None
    ) -> None:
        self.beacons = folder / "beacons"
        self.beacons.mkdir(parents=True, exist_ok=True)
        for stale in self.beacons.iterdir():
            stale.unlink()
        config: dict[str, Any] = {
            "trainer": {
                "accelerator": "cpu",
                "devices": 2,
                "strategy": "ddp",
                "log_every_n_steps": 1,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "logger": {
                    "class_path": "lightning.pytorch.loggers.CSVLogger",
                    "init_args": {"save_dir": "runs", "name": "digits", "version": "run"},
                },
            },
            "model": SMALL_NETWORK,
        }
        if beacon is not None:
            init_args = {"folder": str(self.beacons), **beacon}
            config["trainer"]["callbacks+"] = [{"class_path": f"{__spec__.name}.Beacon", "init_args": init_args}]
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
        command = [*LAUNCHERS[launch], "--config", "run.yaml", *words]
        environment = {name: value for name, value in os.environ.items() if name not in LEFT}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        if launch == "slurm":
            environment |= JOB | {"PATH": f"{_programs(folder)}:{os.environ['PATH']}"}
        self.folder = folder / "runs" / "digits" / ("slurm-4711" if launch == "slurm" else "run")
        self.log = folder / "log.txt"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def pids(self, timeout: float = 600) -> dict[int, int]:
        """Process ids by rank, once every rank has reached its beacon."""
        until = time.monotonic() + timeout
        while time.monotonic() < until and self.process.poll() is None:
            found = {int(path.name): path.read_text() for path in self.beacons.iterdir()}
            if len(found) == 2 and all(found.values()):
                return {rank: int(text) for rank, text in found.items()}
            time.sleep(0.02)
        self.kill()
        raise RuntimeError(f"no beacon of every rank; the log ends with\n{self.log.read_text()[-3000:]}")

    def wait(self, pids: Sequence[int] = (), timeout: float = 600) -> tuple[int, float]:
        """(exit code, seconds until this and every process of its group, and of `pids`, had gone)."""
        started = time.monotonic()
        try:
            code = self.process.wait(timeout)
            while time.monotonic() - started < timeout and (_group_lives(self.process.pid) or any(map(_lives, pids))):
                time.sleep(0.05)
        finally:
            self.kill()
        return code, time.monotonic() - started

    def kill(self) -> None:
        if _group_lives(self.process.pid):
            os.killpg(self.process.pid, signal.SIGKILL)

    def checkpoint(self, name: str = "last.ckpt") -> dict[str, Any]:
        return torch.load(self.folder / "checkpoints" / name, map_location="cpu", weights_only=True)


def _programs(folder: Path) -> Path:
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash{text}")
        (programs / name).chmod(0o755)
    return programs


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
