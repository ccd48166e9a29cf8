"""--ckpt_path: what comes from it, what may be changed, what is refused, and what a run leaves behind."""

from __future__ import annotations

import csv
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hornet_lit.data.digits import save_images

from .conftest import ON_CPU, SHORT, SMALL_NETWORK, Run


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


# ---- what comes from the checkpoint


def test_validate_and_test_with_the_checkpoint_alone(run: Run, checkpoint: Path) -> None:
    for command, metric in (("validate", "val/acc1"), ("test", "test/acc1")):
        result = run(command, "--ckpt_path", checkpoint, *ON_CPU)
        assert result.code == 0, result.err[-2000:]
        assert metric in result.out
        assert [path.name for path in Path().iterdir()] == ["test_report"] * (command == "test")  # and nothing else


def test_predict_with_the_checkpoint_alone(run: Run, checkpoint: Path) -> None:
    save_images("digits", 5)
    words = ["--data.predict_path", "digits", "--prediction.output", "out.csv", "--prediction.top_k", "3"]
    result = run("predict", "--ckpt_path", checkpoint, *words, *ON_CPU)
    assert result.code == 0, result.err[-2000:]
    with open("out.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == sorted(path.name for path in Path("digits").iterdir())
    assert "class_3" in rows[0] and "class_4" not in rows[0]
    assert sorted(path.name for path in Path().iterdir()) == ["digits", "out.csv"]


def test_the_checkpoint_notes_its_data(checkpoint: Path) -> None:
    note = load(checkpoint)["hornet_lit"]
    assert note["data"]["class_path"] == "hornet_lit.data.DigitsDataModule"
    assert note["data"]["init_args"]["img_size"] == 32
    assert "_instantiator" not in load(checkpoint)["hyper_parameters"]


def test_data_options_change_the_checkpoints(run: Run, checkpoint: Path) -> None:
    result = run("validate", "--ckpt_path", checkpoint, "--data.eval_batch_sise", "8")
    assert "did you mean '--data.eval_batch_size'" in " ".join(result.error)
    assert run("validate", "--ckpt_path", checkpoint, "--data.eval_batch_size", "8", *ON_CPU).code == 0


def test_other_options_win_when_evaluating(run: Run, checkpoint: Path) -> None:
    """The checkpoint has no averaged weights, so that asking for them is an error: the option arrived."""
    save_images("digits", 1)
    words = ["predict", "--ckpt_path", checkpoint, "--data.predict_path", "digits", *ON_CPU]
    result = run(*words, "--model.predict_weights", "ema")
    assert result.code == 2 and "no averaged weights" in result.error[0]
    assert run(*words, "--model.predict_weights", "raw").code == 0


# ---- conflicts


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize(
    ("option", "value", "stored"),
    [
        ("network", "hornet_nano_32", "hornet_pico_32"),
        ("num_classes", "7", "10"),
        ("in_chans", "3", "1"),
        ("img_size", "64", "32"),
        ("network_options", '{"base_dim": 8}', "'base_dim': 16"),
    ],
)
def test_another_architecture_is_refused(
    command: str, option: str, value: str, stored: str, run: Run, checkpoint: Path
) -> None:
    result = run(command, "--ckpt_path", checkpoint, f"--model.{option}", value)
    assert result.code == 2 and len(result.error) <= 5
    assert result.error[0].startswith(f"model.{option} is ")
    assert stored in result.error[0] and str(checkpoint) in result.error[0]
    assert f"--model.{option}" in result.error[1]


def test_a_recipe_of_another_network_is_refused(run: Run, checkpoint: Path) -> None:
    result = run("validate", "--config", "hornet_t_in1k", "--ckpt_path", checkpoint)
    assert result.code == 2 and "model.network is 'hornet_tiny_7x7'" in result.error[0]


def resume_words(checkpoint: Path) -> list[str | Path]:
    return ["fit", "--config", "digits", *SMALL_NETWORK, *SHORT, "--ckpt_path", checkpoint]


def test_resuming_keeps_the_settings(run: Run, checkpoint: Path) -> None:
    result = run(*resume_words(checkpoint), "--model.lr", "0.5")
    assert result.code == 2
    assert "model.lr is 0.5 by your options, 0.004 in" in result.error[0]
    assert "--model.lr 0.004" in result.error[1] and "--model.weights" in result.error[1]


def test_resuming_with_the_same_recipe(run: Run, checkpoint: Path) -> None:
    words = [*resume_words(checkpoint), "--trainer.max_epochs", "2", "--model.compile", "false"]
    result = run(*words)
    assert result.code == 0, result.err[-2000:]
    after = load(Path("runs/digits/version_0/checkpoints/last.ckpt"))
    assert after["global_step"] == load(checkpoint)["global_step"] + 2


def test_null_in_a_recipe_takes_the_checkpoints_value(run: Run, checkpoint: Path) -> None:
    Path("mine.yaml").write_text("model:\n  num_classes: null\n  img_size: null\n  network_options: null\n")
    assert run("validate", "--ckpt_path", checkpoint, "--config", "mine.yaml", *ON_CPU).code == 0


def test_two_sources_of_weights(run: Run, checkpoint: Path, weights: Path) -> None:
    result = run("validate", "--ckpt_path", checkpoint, "--model.weights", weights)
    assert result.code == 2 and "both give weights" in result.error[0]
    Path("mine.yaml").write_text("model:\n  weights: not_here.pth\n")  # as finetune_folder has: the checkpoint wins
    assert run("validate", "--ckpt_path", checkpoint, "--config", "mine.yaml", *ON_CPU).code == 0


# ---- without weights


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
@pytest.mark.parametrize("more", [[], ["--config", "digits"], ["--config", "digits", "--model.weights", "null"]])
def test_refused_without_weights(command: str, more: list[str], run: Run) -> None:
    result = run(command, *more)
    assert result.code == 2
    assert result.error[0] == f"{command} needs trained weights, or it would use random ones"


def test_model_weights_suffice(run: Run, images: Path, weights: Path) -> None:
    words = [*SMALL_NETWORK, *ON_CPU, "--model.weights", weights, "--data.root", images]
    result = run("validate", "--config", "cifar10", *words, "--trainer.logger", "false")
    assert result.code == 0, result.err[-2000:]


# ---- files


def test_last_and_best(run: Run, checkpoint: Path) -> None:
    result = run("validate", "--config", "digits", "--ckpt_path", "last")
    assert result.code == 2 and "no checkpoint below runs/digits" in result.error[0]
    folder = Path("runs/digits/version_3/checkpoints")
    shutil.copytree(checkpoint.parent, folder)
    older = Path("runs/digits/version_2/checkpoints")
    shutil.copytree(checkpoint.parent, older)
    os.utime(older / "last.ckpt", (1, 1))
    for which, name in (("last", "last.ckpt"), ("best", "epoch000-step2.ckpt")):
        result = run("validate", "--ckpt_path", which, *ON_CPU)
        assert result.code == 0, result.err[-2000:]
        assert f"--ckpt_path {which}: {folder / name}" in result.err
    last = folder / "last.ckpt"
    whole = last.read_bytes()
    last.write_bytes(whole[:-100])
    result = run("validate", "--ckpt_path", "last", *ON_CPU)
    assert result.code == 0, result.err[-2000:]
    assert f"skipped: --ckpt_path {last} cannot be read" in result.err
    assert f"--ckpt_path last: {folder / 'epoch000-step2.ckpt'}" in result.err
    last.write_bytes(whole)
    (folder / "epoch000-step2.ckpt").unlink()
    result = run("validate", "--ckpt_path", "best")
    assert result.code == 2 and "names no best checkpoint that still exists" in result.error[0]


@pytest.mark.parametrize("url", ["https://a.b/c.ckpt", "s3://bucket/c.ckpt", "file:///c.ckpt"])
def test_urls_are_refused(url: str, run: Run) -> None:
    for command in ("fit", "validate", "predict"):
        result = run(command, "--config", "digits", "--ckpt_path", url)
        assert result.code == 2 and "URLs are refused" in result.error[0]


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("forced", [False, True])
def test_a_checkpoint_cannot_run_code(forced: bool, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    proof, hostile, plain = tmp_path / "proof", tmp_path / "hostile.ckpt", tmp_path / "plain.ckpt"
    torch.save({"hyper_parameters": {}, "x": Payload(proof)}, hostile)
    plain.write_bytes(pickle.dumps(Payload(proof)))
    for command in ("fit", "validate", "predict"):
        for path in (hostile, plain):
            result = run(command, "--config", "digits", "--ckpt_path", path)
            assert result.code == 2 and "cannot be read" in result.error[0]
    assert not proof.exists()


def test_a_checkpoint_cannot_choose_a_class_to_import(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    state = load(checkpoint)
    state["hornet_lit"]["data"]["class_path"] = "antigravity.Module"
    torch.save(state, tmp_path / "odd.ckpt")
    result = run("validate", "--ckpt_path", tmp_path / "odd.ckpt")
    assert result.code == 2 and "not one of hornet-lit's" in result.error[0]


def test_files_that_are_no_checkpoints(run: Run, weights: Path, checkpoint: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.ckpt"
    short.write_bytes(checkpoint.read_bytes()[:5000])
    for path, message in (
        (weights, "was not written by hornet-lit"),
        (tmp_path / "nope.ckpt", "no such file"),
        (tmp_path, "is a folder"),
        (short, "cannot be read"),
    ):
        result = run("validate", "--ckpt_path", path)
        assert result.code == 2 and message in result.error[0] and str(path) in result.error[0]


# ---- what a run leaves behind


def test_a_second_run_in_the_same_folder(run: Run) -> None:
    words = ["fit", "--config", "digits", *SMALL_NETWORK, *SHORT, "--trainer.logger.init_args.version", "one"]
    assert run(*words).code == 0
    first = Path("runs/digits/one/config.yaml").read_text("utf-8")
    assert run(*words).code == 0
    assert sorted(path.name for path in Path("runs/digits/one").glob("config*.yaml")) == ["config.yaml"]
    assert run(*words, "--model.lr", "0.001").code == 0
    assert Path("runs/digits/one/config.yaml").read_text("utf-8") == first
    assert "lr: 0.001" in Path("runs/digits/one/config_2.yaml").read_text("utf-8")


def test_the_saved_config_is_a_recipe(run: Run, checkpoint: Path) -> None:
    config = checkpoint.parents[1] / "config.yaml"
    assert run("fit", "--config", config, "--ckpt_path", checkpoint, "--trainer.max_epochs", "2").code == 0
    assert run("validate", "--config", config, "--ckpt_path", checkpoint, "--trainer.logger", "false").code == 0


def test_no_logger_no_config_in_the_current_folder(run: Run) -> None:
    words = ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false", "--trainer.callbacks", "null"]
    result = run("fit", "--config", "digits", *SMALL_NETWORK, *SHORT, *words)
    assert result.code == 0, result.err[-2000:]
    assert list(Path().iterdir()) == []
