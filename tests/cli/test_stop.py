"""Signals to a training, and going on in its folder: nothing is lost, logged twice or left out."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from hornet_lit.cli_process import Process
from hornet_lit.cli_stop import GracefulStop
from hornet_lit.writers.drawing import read_metrics
from hornet_lit.writers.metrics import MetricsWriter

from .conftest import ON_CPU, SMALL_NETWORK, Run


class Signal(pl.Callback):
    """Sends this process a signal when an optimizer step count, or within the validation after it, is reached."""

    def __init__(self, signum: int, step: int, where: str = "train") -> None:
        self.signum, self.step, self.where, self.sent = signum, step, where, False

    def _send(self, trainer: pl.Trainer, where: str) -> None:
        here = (trainer.global_step, where) == (self.step, self.where) and not trainer.sanity_checking
        if here and not self.sent:  # a second one would end it at once
            self.sent = True
            os.kill(os.getpid(), self.signum)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._send(trainer, "train")

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._send(trainer, "validation")


def words(version: str | None, *more: str, signum: int = 0, step: int = 0, where: str = "train") -> list[str]:
    """Two epochs of three steps of two batches each, with everything random that the digits have."""
    given = ["fit", "--config", "digits", *SMALL_NETWORK, *ON_CPU, "--ckpt_path", "auto", *more]
    given += ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "6", "--trainer.limit_val_batches", "2"]
    given += ["--trainer.check_val_every_n_epoch", "1", "--data.eval_batch_size", "16", "--data.batch_size", "16"]
    given += ["--data.batch_size_per_device", "8", "--trainer.log_every_n_steps", "1", "--model.warmup_epochs", "0"]
    given += ["--model.ema_decay", "0.9", "--model.drop_path_rate", "0.2", "--trainer.enable_model_summary", "false"]
    if version is not None:
        given += ["--trainer.logger.version", version]
    return given + (["--config", signalled(signum, step, where)] if signum else [])


def signalled(signum: int, step: int, where: str) -> str:
    init_args = {"signum": int(signum), "step": step, "where": where}
    callback = {"class_path": f"{__name__}.Signal", "init_args": init_args}
    Path("signal.yaml").write_text(json.dumps({"trainer": {"callbacks+": [callback]}}))
    return "signal.yaml"


def folder(version: str) -> Path:
    return Path("runs/digits", version)


def weights(version: str) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder(version) / "checkpoints" / "last.ckpt", weights_only=True)
    averages = {f"ema.{k}": v for k, v in checkpoint["ema"]["state_dict"].items()}
    return checkpoint["state_dict"] | averages | {"step": torch.tensor(checkpoint["global_step"])}


def metrics(version: str) -> list[dict[str, str]]:
    with open(folder(version) / "metrics.csv", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_an_ended_run_goes_on_as_if_it_never_had(run: Run) -> None:
    """After a step in the middle of an epoch, after its last step, and within the validation."""
    assert run(*words("whole")).code == 0
    whole, steps = weights("whole"), {row["step"] for row in metrics("whole")}
    assert steps == {str(step) for step in range(6)}
    for name, signum, code, step, where, saved in (
        ("middle", signal.SIGUSR1, 143, 1, "train", 2),
        ("last", signal.SIGTERM, 143, 2, "train", 3),
        ("validating", signal.SIGINT, 130, 3, "validation", 3),
    ):
        result = run(*words(name, signum=signum, step=step, where=where))
        last = folder(name) / "checkpoints" / "last.ckpt"
        assert result.code == code
        assert f"{signum.name}: ended after step {saved}; go on with --ckpt_path {last}" in result.err
        assert weights(name)["step"] == saved
        result = run(*words(name))
        assert result.code == 0 and f"--ckpt_path auto: {last}" in result.err, result.err[-2000:]
        resumed = weights(name)
        assert all(resumed[key].equal(value) for key, value in whole.items())
        assert metrics(name) == metrics("whole")
        files = [sorted(str(p.relative_to(folder(v))) for p in folder(v).rglob("*")) for v in (name, "whole")]
        assert [f for f in files[0] if f != "config_2.yaml"] == files[1]  # of the start that had the callback
    curves, _ = read_metrics(folder("middle") / "metrics.csv")
    assert len(curves["train/loss"].steps) == 6 and len(curves["val/acc1_ema"].steps) == 2


def test_before_the_first_step_nothing_is_saved(run: Run) -> None:
    result = run(*words("early", signum=signal.SIGINT, step=0))
    assert result.code == 130 and "ended by SIGINT" in result.err and "Traceback" not in result.err
    assert not list(folder("early").rglob("*.ckpt"))
    result = run(*words("early", signum=signal.SIGTERM, step=1))
    assert result.code == 143 and f"nothing in {folder('early')} yet: from the start" in result.err


def test_other_commands_end_at_once(run: Run, checkpoint: Path) -> None:
    ending = ["--config", signalled(signal.SIGTERM, 0, "validation")]
    result = run("validate", "--config", "digits", *SMALL_NETWORK, "--ckpt_path", checkpoint, *ON_CPU, *ending)
    assert result.code == 143 and "ended by SIGTERM" in result.err
    assert "Traceback" not in result.err and "val/acc1" not in result.out


def test_auto_is_never_another_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(*words(None))
    assert result.code == 2 and "needs a run folder that is the same at every start" in result.error[0]
    assert "--trainer.logger.version NAME" in result.error[1]
    result = run("validate", "--config", "digits", "--ckpt_path", "auto")
    assert result.code == 2 and "--ckpt_path auto is for fit" in result.error[0]
    elsewhere = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "elsewhere"}}
    Path("mine.yaml").write_text(json.dumps({"trainer": {"callbacks": [elsewhere]}}))
    result = run(*words("one", "--config", "mine.yaml"))
    assert result.code == 2 and "ModelCheckpoint writes to" in result.error[0]
    for name, value in {"NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "a"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    Path("hpc_ckpt_1.ckpt").touch()  # Lightning's own way to requeue leaves such files
    result = run(*words("one"))
    assert result.code == 2 and "Lightning would go on from" in result.error[0]


def test_processes_must_find_the_same_checkpoint() -> None:
    stop = GracefulStop(Process())
    stop.resumed = "new.ckpt"
    trainer = SimpleNamespace(global_rank=1, strategy=SimpleNamespace(broadcast=lambda mine: "old.ckpt"))
    with pytest.raises(ValueError, match=r"process 1 would go on from new.ckpt, process 0 from old.ckpt"):
        stop.setup(trainer, None, "fit")


def test_auto_skips_what_cannot_be_read(run: Run, checkpoint: Path) -> None:
    checkpoints = folder("one") / "checkpoints"
    shutil.copytree(checkpoint.parent, checkpoints)
    (checkpoints / "last.ckpt").write_bytes(checkpoint.read_bytes()[:5000])
    given = ["fit", "--config", "digits", *SMALL_NETWORK, *ON_CPU, "--model.warmup_epochs", "0"]
    given += ["--ckpt_path", "auto", "--trainer.logger.version", "one", "--trainer.max_epochs", "1"]
    result = run(*given)
    assert result.code == 0, result.err[-2000:]
    assert f"skipped: --ckpt_path {checkpoints / 'last.ckpt'} cannot be read" in result.err
    assert f"--ckpt_path auto: {checkpoints / 'epoch000-step2.ckpt'}" in result.err
    for path in checkpoints.iterdir():
        path.write_bytes(b"")
    result = run(*given)
    assert result.code == 2 and "none of the 2 checkpoints" in result.error[0]


def test_metrics_of_a_killed_process(tmp_path: Path) -> None:
    """Rows that were logged after the checkpoint go, and so does half a line at the end."""
    writer = ExperimentWriter(str(tmp_path))
    for step in range(5):
        writer.log_metrics({"train/loss": step / 10, "epoch": 0}, step)
    writer.log_metrics({"val/acc1": 0.5, "epoch": 0}, 2)
    writer.save()
    path = tmp_path / "metrics.csv"
    path.write_bytes(path.read_bytes() + b"0,5,0.")
    for validated, expected in ((True, ["0", "1", "2", "2"]), (False, ["0", "1", "2"])):
        resumed = MetricsWriter(str(tmp_path))
        resumed.keep_before(3, validated=validated)
        with path.open(encoding="utf-8") as file:
            assert [row["step"] for row in csv.DictReader(file)] == expected
    resumed.log_metrics({"train/loss": 0.3, "train/new": 1.0}, 3)
    resumed.save()
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"] and rows[3]["train/new"] == "1.0"
    MetricsWriter(str(tmp_path)).keep_before(0, validated=True)
    assert not path.exists()


def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    process, before = Process(), signal.getsignal(signal.SIGTERM)
    ends: list[int] = []
    monkeypatch.setattr(process, "_end", ends.append)
    with process.signals():
        process.noting = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert process.noted == signal.SIGTERM and not ends
        os.kill(os.getpid(), signal.SIGINT)
        assert ends == [130]
    assert signal.getsignal(signal.SIGTERM) == before
