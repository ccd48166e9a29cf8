"""SIGKILL while a checkpoint is being written: every file under a final name can be read, and the run goes on.

One run is killed again and again within `save_checkpoint`, and each time goes on by itself from what it finds
(`--ckpt_path auto`). Processes are forked from one that has imported the libraries.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

import hornet_lit.cli_lightning  # noqa: F401  (before the fork)
from hornet_lit.cli import main
from hornet_lit.strategy import DurableCheckpointIO
from tests.faults.row import Row

BEGUN, DONE = b"b", b"d"
RECIPE = {
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1000,
        "limit_val_batches": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": "runs", "name": "kills", "version": "run"},
        },
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"every_n_train_steps": 1, "monitor": "step", "mode": "max", "save_top_k": 2}
                | {"save_last": True, "save_on_train_epoch_end": False},
            }
        ],
    },
    "model": {"in_chans": 1, "network_options": {"base_dim": 32, "depths": [1, 1, 2, 1]}, "warmup_epochs": 0},
    "data": {"class_path": "hornet_lit.data.DigitsDataModule", "init_args": {"batch_size": 8, "img_size": 32}},
}
START_WITHIN = 300  # seconds, on a busy machine


def rows(*, thorough: bool) -> Iterator[Row]:
    """50 kills with $TMPDIR on the run's file system and 50 with it on another; the fast subset: 2 on another."""
    there = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    for name, tmpdir, kills in (
        (("the same", None, 50), ("another", there, 50)) if thorough else (("another", there, 2),)
    ):
        with tempfile.TemporaryDirectory() as folder:
            if tmpdir is not None and os.stat(tmpdir).st_dev == os.stat(folder).st_dev:
                continue
            # In a process that has computed nothing yet: a fork of one that has may wait for OpenMP's threads for ever.
            command = [sys.executable, "-m", "tests.faults.kills", folder, str(kills), str(tmpdir or "")]
            done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr[-3000:])
            unreadable, resumed, median = json.loads(done.stdout.splitlines()[-1])
        yield Row(
            case=f"SIGKILL while saving, {kills} times, TMPDIR on {name} file system",
            outcome=f"{len(unreadable)} unreadable {unreadable[:3]}, {resumed} of {kills} resumed; "
            f"a checkpoint takes {1000 * median:.0f} ms",
            right=not unreadable and resumed == kills,
        )


def killed_run(folder: Path, *, kills: int, tmpdir: Path | None) -> tuple[list[str], int, float]:
    """(files under a final name that could not be read, times that the run went on, median seconds of a saving)."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    checkpoints = folder / "runs" / "kills" / "run" / "checkpoints"
    unreadable: list[str] = []
    seconds = [0.05]
    inside = resumed = step = 0
    was_inside = False
    while inside < kills or was_inside:  # the last kill has to be followed by a start as well
        first, durations, killed_inside = one_process(folder, tmpdir=tmpdir, delay=statistics.median(seconds))
        seconds += durations
        resumed += was_inside and first == step + 1
        was_inside = killed_inside and inside < kills
        inside += was_inside
        step = 0
        for path in checkpoints.glob("[!.]*.ckpt"):
            try:
                step = max(step, torch.load(path, map_location="cpu", weights_only=True)["global_step"])
            except Exception as error:
                unreadable.append(f"{path.name}: {error}")
    return unreadable, resumed, statistics.median(seconds)


def one_process(folder: Path, *, tmpdir: Path | None, delay: float) -> tuple[int, list[float], bool]:
    """Starts the run and kills it at a random moment of a saving.

    Args:
        folder: the run's.
        tmpdir: for $TMPDIR.
        delay: seconds that a saving takes.

    Returns:
        The step of its first saving, how long savings took, and whether the kill came within one.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        train(folder, tmpdir, writing)
    os.close(writing)
    wanted, begun_at = random.randint(1, 5), 0.0
    durations, steps, last = [], [], DONE
    try:
        while True:
            if not select.select([reading], [], [], START_WITHIN)[0]:
                raise RuntimeError(f"no saving begun: {(folder / 'log.txt').read_text()[-3000:]}")
            word = os.read(reading, 9)
            if not word:
                raise RuntimeError(f"the run ended by itself: {(folder / 'log.txt').read_text()[-3000:]}")
            last = word[:1]
            if last == DONE:
                durations.append(time.monotonic() - begun_at)
                continue
            begun_at = time.monotonic()
            steps.append(int(word[1:]))
            if len(steps) == wanted:
                time.sleep(random.uniform(0, 1.2 * delay))
                break
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        rest = os.read(reading, 900)
        os.close(reading)
    return steps[0], durations, (rest[-9:][:1] or last) == BEGUN


def train(folder: Path, tmpdir: Path | None, pipe: int) -> None:
    """The forked process; never returns."""
    save = DurableCheckpointIO.save_checkpoint

    def told(self: DurableCheckpointIO, checkpoint: dict, path: object, **options: object) -> None:
        os.write(pipe, BEGUN + b"%08d" % checkpoint["global_step"])
        save(self, checkpoint, path, **options)  # type: ignore[arg-type]
        os.write(pipe, DONE + b"%08d" % checkpoint["global_step"])

    DurableCheckpointIO.save_checkpoint = told  # type: ignore[method-assign]
    os.chdir(folder)
    if tmpdir is not None:
        tempfile.tempdir = os.environ["TMPDIR"] = str(tmpdir)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    try:
        main(["fit", "--config", "recipe.yaml", "--ckpt_path", "auto"])
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    run_folder, times, tmp = sys.argv[1:]
    print(json.dumps(killed_run(Path(run_folder), kills=int(times), tmpdir=Path(tmp) if tmp else None)))
