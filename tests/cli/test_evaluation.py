"""Evaluation sets, views and the report through the command line, with weights and with checkpoints."""

from __future__ import annotations

import csv
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from hornet_lit.cli_errors import MAX_LINES
from hornet_lit.module import ImageClassifier
from hornet_lit.network.build import build_network

from .conftest import ON_CPU, SMALL, SMALL_NETWORK, Result, Run

SIZES = {"num_classes": 1000, "img_size": 32}


def listed(name: str) -> list[str]:
    return (pkgutil.get_data("timm.data", f"_info/{name}.txt") or b"").decode().split()


@pytest.fixture(scope="session")
def imagenet_r(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 class folders with a noise image each."""
    root, noise = tmp_path_factory.mktemp("sets") / "imagenet-r", np.random.default_rng(0)
    for wnid in listed("imagenet_r_synsets"):
        (root / wnid).mkdir(parents=True)
        Image.fromarray(noise.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(root / wnid / "art_0.jpg")
    return root


@pytest.fixture(scope="session")
def weights_1000(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that finds all classes equally probable."""
    state = build_network("hornet_pico_32", **SIZES, options=SMALL).state_dict()
    path = tmp_path_factory.mktemp("weights") / "imagenet.pth"
    torch.save({"model": state | {name: torch.zeros_like(state[name]) for name in ("head.weight", "head.bias")}}, path)
    return path


def scores(result: Result) -> dict[str, float]:
    assert result.code == 0, result.err[-2000:]
    return {name: float(value) for name, value in re.findall(r"(test/\w+) +│ +([-\d.e]+)", result.out)}


def classes(folder: str = "test_report") -> list[dict[str, str]]:
    with open(Path(folder, "classes.csv"), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_weights_on_an_evaluation_set(run: Run, imagenet_r: Path, weights_1000: Path) -> None:
    words = ["--config", "hornet_t_in1k", "--config", "imagenet_r", "--model.weights", weights_1000, *SMALL_NETWORK]
    words += ["--data.root", imagenet_r, "--data.img_size", "32", "--data.num_workers", "0", *ON_CPU]
    found = scores(run("test", *words, "--trainer.logger", "false", "--report.output", "mine"))
    assert found.keys() == {"test/loss", "test/acc1", "test/acc5", "test/ece"}
    assert found["test/loss"] == pytest.approx(np.log(200), rel=1e-6) and found["test/acc1"] == pytest.approx(1 / 200)
    rows = classes("mine")
    assert [row["name"].split()[0] for row in rows] == sorted(listed("imagenet_r_synsets"))
    assert [(row["images"], row["correct"]) for row in rows] == [("1", "1"), *[("1", "0")] * 199]


def test_a_checkpoint_on_an_evaluation_set(run: Run, imagenet_r: Path, weights_1000: Path, tmp_path: Path) -> None:
    """Its own data settings stay, but for what the overlay states."""
    module = ImageClassifier(network="hornet_pico_32", network_options=SMALL, weights=str(weights_1000), **SIZES)
    module.class_names = listed("imagenet_synsets")
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.configure_model()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    checkpoint = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    data = {"img_size": 32, "num_workers": 0, "crop_pct": 1.0, "root": "/where/it/was"}
    checkpoint["hornet_lit"] = {"data": {"class_path": "hornet_lit.data.ImageNetDataModule", "init_args": data}}
    torch.save(checkpoint, tmp_path / "it.ckpt")
    words = ["--ckpt_path", tmp_path / "it.ckpt", "--config", "imagenet_r", "--data.root", imagenet_r, *ON_CPU]
    found = scores(run("test", *words))
    assert found["test/loss"] == pytest.approx(np.log(200), rel=1e-6) and len(classes()) == 200

    module.class_names = ["cat", "dog"] * 500
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    torch.save(
        torch.load(tmp_path / "saved.ckpt", weights_only=True) | {"hornet_lit": checkpoint["hornet_lit"]}, words[1]
    )
    result = run("test", *words)
    assert result.code == 2 and len(result.error) <= MAX_LINES
    assert "1000 classes" in result.error[0] and "trained on" in result.error[0]


def test_a_checkpoint_of_other_classes_is_refused(run: Run, checkpoint: Path, imagenet_r: Path) -> None:
    words = [
        "--ckpt_path",
        checkpoint,
        "--config",
        "hornet_t_in1k",
        "--config",
        "imagenet_r",
        "--data.root",
        imagenet_r,
    ]
    result = run("test", *words, *ON_CPU)
    assert result.code == 2 and len(result.error) <= MAX_LINES


def test_views_of_a_checkpoints_own_data(run: Run, checkpoint: Path) -> None:
    center, flip = (
        scores(run("test", "--ckpt_path", checkpoint, "--data.views", v, *ON_CPU)) for v in ("center", "flip")
    )
    assert center.keys() == flip.keys() and center["test/loss"] != flip["test/loss"]
    rows = classes()
    assert sum(int(row["images"]) for row in rows) == 360
    assert sum(int(row["correct"]) for row in rows) / 360 == pytest.approx(flip["test/acc1"], abs=1e-6)
    result = run("test", "--ckpt_path", checkpoint, "--data.views", "five_crop", *ON_CPU)
    assert result.code == 2 and "center, flip" in result.error[0]
