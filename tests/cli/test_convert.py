"""Sharded checkpoints and `hornet-lit convert`: whole or refused, never run as code, one file on request."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open

from hornet_lit import sharded
from hornet_lit.cli import main
from hornet_lit.data.digits import save_images

from .conftest import ON_CPU, SHORT, SMALL_NETWORK, Run
from .test_checkpoints import Payload

FIT = ["fit", "--config", "digits", *SMALL_NETWORK, *SHORT, "--model.ema_decay", "0.5"]
SHARDED = ["--config", "fsdp", "--trainer.strategy.init_args.save_distributed_checkpoint", "true"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The last checkpoint, sharded, of two steps on the digits with averaged weights."""
    root = tmp_path_factory.mktemp("trained_sharded")
    before = dict(os.environ)
    assert main([*FIT, *SHARDED, "--trainer.logger.init_args.save_dir", str(root)]) == 0
    yield root / "digits" / "version_0" / "checkpoints" / "last.ckpt"
    os.environ.clear()  # Lightning tells itself there what torchrun would
    os.environ.update(before)


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(trained, tmp_path / "copy.ckpt")


# ---- one file


def test_a_whole_checkpoint(run: Run, trained: Path) -> None:
    assert run("convert", trained, "whole.ckpt").out == "whole.ckpt\n"
    assert run("validate", "--ckpt_path", "whole.ckpt", *ON_CPU).code == 0
    result = run(*FIT, "--trainer.max_epochs", "2", "--ckpt_path", "whole.ckpt")
    assert result.code == 0, result.err[-2000:]
    assert os.listdir() and not [name for name in os.listdir() if name.startswith(".")]  # no temporary file stays


def test_weights_alone_predict_what_the_checkpoint_predicts(run: Run, trained: Path) -> None:
    save_images("digits", 5)
    assert run("convert", trained, "whole.ckpt").code == 0
    predict = ["predict", "--config", "digits", "--data.predict_path", "digits", *SMALL_NETWORK, *ON_CPU]
    for which in ("ema", "raw"):
        result = run("convert", "whole.ckpt", f"{which}.safetensors", "--weights", which)
        assert result.code == 0, result.err
        words = ["--ckpt_path", "whole.ckpt", "--model.predict_weights", which]
        assert run(*predict, *words, "--prediction.output", "one.csv").code == 0
        words = ["--model.weights", f"{which}.safetensors"]
        assert run(*predict, *words, "--prediction.output", "other.csv").code == 0
        assert Path("one.csv").read_bytes() == Path("other.csv").read_bytes()
    assert run("convert", trained, "auto.safetensors").code == 0
    with safe_open("auto.safetensors", "pt") as auto, safe_open("ema.safetensors", "pt") as ema:
        assert all(torch.equal(auto.get_tensor(key), ema.get_tensor(key)) for key in ema.keys())  # noqa: SIM118
        notes = ema.metadata()
    assert json.loads(notes["network"]) == "hornet_pico_32" and json.loads(notes["num_classes"]) == 10
    assert json.loads(notes["class_names"]) == list("0123456789")


def test_weights_come_with_their_digest(run: Run, checkpoint: Path) -> None:
    assert run("convert", checkpoint, "w.safetensors").code == 0
    assert sorted(os.listdir()) == ["w.safetensors", "w.safetensors.sha256"]
    digest = hashlib.sha256(Path("w.safetensors").read_bytes()).hexdigest()
    assert Path("w.safetensors.sha256").read_text() == f"{digest}  w.safetensors\n"
    words = ["validate", "--config", "digits", *SMALL_NETWORK, *ON_CPU, "--model.weights", "w.safetensors"]
    assert run(*words).code == 0
    damaged = bytearray(Path("w.safetensors").read_bytes())
    damaged[-1] ^= 1
    Path("w.safetensors").write_bytes(damaged)
    result = run(*words)
    assert result.code == 2 and "is not the file that was published" in result.error[0] and digest in result.error[0]


def test_convert_says_what_it_does_not_do(run: Run, trained: Path, checkpoint: Path) -> None:
    Path("there.safetensors").touch()
    for words, message in (
        ([trained, "x.pth"], "must end in .ckpt or .safetensors"),
        ([trained, "there.safetensors"], "exists and is not overwritten"),
        ([trained, "nowhere/x.ckpt"], "no such folder nowhere"),
        ([trained, "x.ckpt", "--weights", "raw"], "--weights is for *.safetensors"),
        ([checkpoint, "x.ckpt"], "is one file already"),
        ([checkpoint, "x.safetensors", "--weights", "ema"], "has no EMA weights"),
        (["nope.ckpt", "x.ckpt"], "nope.ckpt: no such file"),
        ([trained], "the following arguments are required: OUTPUT"),
        ([trained, "x.safetensors", "--weights", "best"], "invalid choice: 'best'"),
    ):
        result = run("convert", *words)
        assert result.code == 2 and message in result.error[0], result.err
        assert os.listdir() == ["there.safetensors"] and not Path("there.safetensors").stat().st_size


def test_a_sharded_checkpoint_needs_fsdp2(run: Run, trained: Path) -> None:
    for words in (["validate", *ON_CPU], FIT):
        result = run(*words, "--ckpt_path", trained)
        assert result.code == 2 and "which only --config fsdp reads" in result.error[0]
        assert f"`hornet-lit convert {trained} whole.ckpt`" in result.error[1]
    result = run("validate", "--ckpt_path", trained, *ON_CPU, "--config", "fsdp")
    assert result.code == 0 and "val/acc1_ema" in result.out, result.err[-2000:]
    result = run("validate", "--config", "digits", "--model.weights", trained, *ON_CPU)
    assert result.code == 2 and "hornet-lit convert" in result.err


# ---- half-written ones


@pytest.mark.parametrize("damage", ["no marker", "no part", "short part", "no metadata", "no meta", "marker"])
def test_what_is_not_whole_is_refused(damage: str, run: Run, folder: Path) -> None:
    part = folder / "__0_0.distcp"
    match damage:
        case "no marker":
            (folder / sharded.MARKER).unlink()
        case "no part":
            part.unlink()
        case "short part":
            part.write_bytes(part.read_bytes()[:-1])
        case "no metadata":
            (folder / ".metadata").unlink()
        case "no meta":
            (folder / "meta.pt").unlink()
        case "marker":
            (folder / sharded.MARKER).write_text("{")
    named = {"no marker": sharded.MARKER, "no metadata": ".metadata", "no meta": "meta.pt", "marker": sharded.MARKER}
    for words in (["convert", folder, "x.ckpt"], ["fit", "--config", "digits", "--ckpt_path", folder]):
        result = run(*words)
        assert result.code == 2 and named.get(damage, part.name) in result.error[0], result.err
        assert str(folder) in result.error[0] and "another checkpoint" in " ".join(result.error)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("moment", "left"),
    [
        ("before the marker", {"last.ckpt": 1}),
        ("before the first rename", {"last.ckpt": 1, "last.ckpt.writing": 2}),
        ("between the renames", {"last.ckpt.previous": 1, "last.ckpt.writing": 2}),
        ("after the renames", {"last.ckpt": 2, "last.ckpt.previous": 1}),
    ],
)
def test_killed_while_it_replaces_a_checkpoint(
    moment: str, left: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever can be read is of one step, and something can."""
    path = tmp_path / "last.ckpt"

    def write(step: int) -> None:
        tensors = {"state_dict": {"w": torch.full((4,), float(step))}}
        sharded.write(path, tensors=tensors, rest={"step": step}, rank=0, world=1, barrier=lambda: None)

    write(1)
    with monkeypatch.context() as patched:
        rename, flush = Path.rename, sharded.flush_folder

        def dying(now: bool, then: Any, *arguments: Any) -> Any:
            if now:
                raise Killed
            return then(*arguments)

        if moment == "before the marker":
            patched.setattr(json, "dump", lambda *_, **__: dying(True, None))
        victim = {"before the first rename": path, "between the renames": tmp_path / "last.ckpt.writing"}.get(moment)
        patched.setattr(Path, "rename", lambda p, to: dying(p == victim, rename, p, to))
        last = tmp_path if moment == "after the renames" else None
        patched.setattr(sharded, "flush_folder", lambda p: dying(p == last, flush, p))
        with pytest.raises(Killed):
            write(2)
    whole = {}
    for candidate in tmp_path.iterdir():
        try:
            checkpoint = sharded.read_whole(candidate)
        except ValueError:
            continue
        whole[candidate.name] = checkpoint["step"]
        assert checkpoint["state_dict"]["w"].tolist() == [checkpoint["step"]] * 4
    assert whole == left
    write(3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"] and sharded.read_meta(path) == {"step": 3}


# ---- hostile ones


def mark(folder: Path) -> None:
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != sharded.MARKER}
    (folder / sharded.MARKER).write_text(json.dumps({"version": 1, "processes": 1, "files": files}))


@pytest.mark.parametrize("where", ["metadata", "entry", "meta"])
@pytest.mark.parametrize("forced", [False, True])
def test_a_sharded_checkpoint_cannot_run_code(
    where: str, forced: bool, run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    payload = Payload(tmp_path / "proof")
    if where == "metadata":
        (folder / ".metadata").write_bytes(pickle.dumps(payload))
    elif where == "meta":
        torch.save({"hyper_parameters": {}, "x": payload}, folder / "meta.pt")
    else:  # a group's option, where the checkpoint has a number
        whole = sharded.read_whole(folder)
        (optimizer,) = whole["optimizer_states"]
        optimizer["param_groups"][0]["eps"] = payload
        names = iter(key for key in whole["state_dict"])
        renamed = {number: next(names) for number in optimizer["state"]}
        optimizer["state"] = {renamed[number]: value for number, value in optimizer["state"].items()}
        for group in optimizer["param_groups"]:
            group["params"] = [renamed[number] for number in group["params"]]
        dcp.save(
            {"state_dict": whole["state_dict"], "optimizer_0": optimizer},
            storage_writer=dcp.FileSystemWriter(folder),
        )
    mark(folder)
    for words in (["convert", folder, "x.ckpt"], [*FIT, *SHARDED, "--trainer.max_epochs", "2", "--ckpt_path", folder]):
        result = run(*words)
        assert result.code == 2, result.err
        assert "cannot be read" in result.err or "was not loaded" in result.err, result.err
    assert not (tmp_path / "proof").exists()


def test_parts_are_only_read_within_the_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "__0_0.distcp").rename(tmp_path / "outside.distcp")
    marker = json.loads((folder / sharded.MARKER).read_text())
    marker["files"]["../outside.distcp"] = marker["files"].pop("__0_0.distcp")
    (folder / sharded.MARKER).write_text(json.dumps(marker))
    with pytest.raises(ValueError, match="is not whole"):
        sharded.check(folder)
