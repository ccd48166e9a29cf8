"""Checkpoints that are whole or not there; killed processes and real full disks: tests/faults."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from hornet_lit.durable import WRITING
from hornet_lit.strategy import DurableCheckpointIO


@pytest.fixture
def checkpoint() -> dict[str, Any]:
    return {"state_dict": {str(i): torch.full((50_000,), float(i)) for i in range(4)}, "global_step": 7}


def save(checkpoint: dict[str, Any], path: Path) -> None:
    DurableCheckpointIO().save_checkpoint(checkpoint, path)


def test_a_checkpoint_is_what_was_saved(tmp_path: Path, checkpoint: dict[str, Any]) -> None:
    path = tmp_path / "new" / "last.ckpt"
    save(checkpoint, path)
    loaded = torch.load(path, weights_only=True)
    assert loaded["global_step"] == 7
    assert all(loaded["state_dict"][name].equal(value) for name, value in checkpoint["state_dict"].items())
    assert [each.name for each in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("room", [0, 1_000, 500_000])
def test_a_full_disk(tmp_path: Path, checkpoint: dict[str, Any], room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    save({"global_step": 1}, path)
    before = path.read_bytes()

    class Full(io.FileIO):
        written = 0

        def write(self, data: Any) -> int:
            Full.written += len(data)
            if Full.written > room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode: Full(self, mode) if mode == "wb" else real(self, mode))
    with pytest.raises(OSError, match="No space left on device") as caught:
        save(checkpoint, path)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path, checkpoint: dict[str, Any]) -> None:
    """But not what another process is writing, nor what another machine may be."""
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    host = os.uname().nodename
    names = {"gone": f".a.ckpt.{host}.{child}{WRITING}", "alive": f".a.ckpt.{host}.{os.getppid()}{WRITING}"}
    names["elsewhere"] = f".a.ckpt.another.{child}{WRITING}"
    for name in names.values():
        (tmp_path / name).touch()
    save(checkpoint, tmp_path / "b.ckpt")
    assert {each.name for each in tmp_path.iterdir()} == {"b.ckpt", names["alive"], names["elsewhere"]}
