"""For the command line's tests: running a command in an empty folder, tiny data in its formats, a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

# Imported within a test, Lightning would keep that test's stderr for its messages, and fail on them in all later ones.
import hornet_lit.cli_lightning  # noqa: F401
from hornet_lit.cli import main
from hornet_lit.network.build import build_network

SMALL = {"base_dim": 16, "depths": [1, 1, 1, 1]}
SMALL_NETWORK = [
    *("--model.network", "hornet_pico_32", "--model.img_size", "32"),
    *("--model.network_options", '{"base_dim": 16, "depths": [1, 1, 1, 1]}'),
]
ON_CPU = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"]
SHORT = [
    *ON_CPU,
    *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"),
    *("--trainer.check_val_every_n_epoch", "1"),
    *("--trainer.enable_model_summary", "false", "--trainer.log_every_n_steps", "1", "--model.warmup_epochs", "0"),
]  # two steps and a validation, where nothing accumulates


@dataclass(frozen=True, kw_only=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def error(self) -> list[str]:
        """The lines of the error message."""
        found = re.search(r"^hornet-lit: error: .*\Z", self.err, flags=re.MULTILINE | re.DOTALL)
        assert found, f"no error message in {self.err!r}"
        return found[0].removeprefix("hornet-lit: error: ").strip().splitlines()


Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendering takes longer than all else in a fit of two steps; what pictures show, tests/writers looks at."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: path.touch())


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `hornet-lit` with the given words, in an empty folder."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def run_(*words: str | Path) -> Result:
        capfd.readouterr()
        code = main([str(word) for word in words])
        captured = capfd.readouterr()
        return Result(code=code, out=captured.out, err=captured.err)

    return run_


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/, val/ and test/ with 10 classes of CIFAR's names, 4 PNGs of 32×32 each."""
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    for split in ("train", "val", "test"):
        for name in names:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i:04d}.png")
    return root


@pytest.fixture(scope="session")
def cifar100(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and test/ with CIFAR-100's classes, one PNG each."""
    from hornet_lit.data.cifar_names import NAMES

    root = tmp_path_factory.mktemp("cifar100")
    noise = np.random.default_rng(1)
    for split in ("train", "test"):
        for name in NAMES[100]:
            folder = root / split / name
            folder.mkdir(parents=True)
            Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "0000.png")
    return root


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the small network with 10 classes, in the authors' format."""
    network = build_network("hornet_pico_32", num_classes=10, img_size=32, options=SMALL)
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save({"model": network.state_dict()}, path)
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of two steps on the digits with the small network."""
    root = tmp_path_factory.mktemp("trained")
    words = ["fit", "--config", "digits", *SMALL_NETWORK, *SHORT, "--trainer.logger.init_args.save_dir", str(root)]
    assert main(words) == 0
    return root / "digits" / "version_0" / "checkpoints" / "last.ckpt"
