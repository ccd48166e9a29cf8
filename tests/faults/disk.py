"""A full disk: the checkpoint before is whole, the message names the path, nothing partial is left behind.

The disk is a small tmpfs, mounted in a namespace of its own; where the system allows nobody that, there is no row.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.faults.row import Row

ROOT = Path(__file__).parents[2]
SIZE = 32 * 2**20
FIT = [
    *(sys.executable, "-m", "hornet_lit", "fit", "--config", "digits", "--ckpt_path", "auto"),
    *("--trainer.logger.version", "run", "--trainer.accelerator", "cpu", "--trainer.limit_train_batches", "2"),
    *("--trainer.limit_val_batches", "1", "--trainer.check_val_every_n_epoch", "1", "--model.warmup_epochs", "0"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
]
SHARDED = {"class_path": "FullyShardedStrategy", "init_args": {"save_distributed_checkpoint": True}}
CASES = {
    "one file": [],
    "one file, TMPDIR elsewhere": [],
    "sharded, FSDP2 on two processes": ["--trainer.strategy", json.dumps(SHARDED), "--trainer.devices", "2"],
}


def rows(*, thorough: bool) -> Iterator[Row]:
    """One per kind of checkpoint; none in the fast subset: tests/training/test_durable.py has a disk made of words."""
    for case in CASES if thorough else ():
        with tempfile.TemporaryDirectory() as disk:
            for namespace in (["unshare", "-m"], ["unshare", "-Urm"]):
                command = [*namespace, sys.executable, "-m", "tests.faults.disk", case, disk]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                if done.returncode == 0:
                    found = json.loads(done.stdout.splitlines()[-1])
                    yield Row(case=f"disk full while saving ({case})", **found)
                    break
                if "unshare" not in done.stderr and "mount" not in done.stderr:
                    raise RuntimeError(done.stderr[-3000:])


def measure(case: str, disk: Path) -> dict[str, object]:
    """Within the namespace: trains an epoch, fills the disk, trains another, and goes on once there is room again."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", disk], check=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["TMPDIR"] = tempfile.gettempdir() if "elsewhere" in case else str(disk)

    def fit(epochs: int) -> subprocess.CompletedProcess[str]:
        command = [*FIT, *CASES[case], "--trainer.max_epochs", str(epochs)]
        return subprocess.run(command, cwd=disk, env=environment, capture_output=True, text=True)

    first = fit(1)
    assert first.returncode == 0, first.stderr
    checkpoints = disk / "runs" / "digits" / "run" / "checkpoints"
    before = digests(checkpoints)
    size = sum(path.stat().st_size for path in (checkpoints / "last.ckpt", *(checkpoints / "last.ckpt").rglob("*")))
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler = disk / "filler"
    filler.write_bytes(bytes(max(0, free - size // 2)))  # room for half a checkpoint
    full = fit(2)
    message = full.stderr[full.stderr.find("hornet-lit: error: ") :].splitlines()[:5]
    after = digests(checkpoints)
    filler.unlink()
    again = fit(2)
    left = [name for name in after if "writing" in name]
    named = bool(message) and str(checkpoints.relative_to(disk)) in message[0] and "No space left" in message[0]
    right = full.returncode == 1 and named and after == before and again.returncode == 0
    outcome = (
        f"exit {full.returncode}; {message[0] if message else full.stderr[-1500:]}; "
        f"{len(set(before.items()) & set(after.items()))} of {len(before)} files as before, partial: {left or 'none'}; "
        f"with room again exit {again.returncode}"
    )
    return {"outcome": outcome, "right": right}


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
