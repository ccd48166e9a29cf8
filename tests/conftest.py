"""Shared by all tests: the rule that fills the golden networks, and the stored golden values."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

# torch imports setuptools when it first compiles. Once, late in a whole run, that failed on an assertion of setuptools
# that distutils is its own (cause not found; two threads importing it at once would explain it): so it comes first.
with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401

GOLDEN = Path(__file__).parent / "golden"
warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def filled_by_rule(network: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict for ``network`` filled by the rule under which the golden values were measured."""
    state = {}
    for key, value in network.state_dict().items():
        z = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(value.shape).astype(np.float32)
        parts = key.split(".")
        if parts[-1] in ("gamma1", "gamma2"):
            z = 0.5 + 0.1 * z
        elif "norm" in parts[-2] or (z.ndim == 1 and parts[-1] == "weight"):
            z = 1 + 0.1 * z if parts[-1] == "weight" else 0.1 * z
        elif parts[-1] == "complex_weight":
            z = 0.3 * z
        elif z.ndim == 1:
            z = 0.1 * z
        else:
            z = z / np.sqrt(np.prod(z.shape[1:]))
        state[key] = torch.from_numpy(np.asarray(z, dtype=np.float32))
    return state


def images(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


@pytest.fixture(autouse=True)
def environment_as_found() -> Iterator[None]:
    """Lightning leaves MASTER_PORT behind; a process started later would try to listen where this one still does."""
    os.environ.pop("MASTER_PORT", None)  # left by a fixture of a wider scope
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Any]:
    def load(name: str) -> Any:
        path = GOLDEN / name
        return json.loads(path.read_text()) if path.suffix == ".json" else np.load(path)

    return load


@pytest.fixture
def official_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint in the authors' format, Namespace included, with the network's weights filled by the rule."""

    def write(network: nn.Module, *, key: str = "model", name: str = "official.pth", **more: Any) -> Path:
        path = tmp_path / name
        args = argparse.Namespace(lr=4e-3, model="hornet", data_path="/somewhere")
        torch.save({key: filled_by_rule(network), "optimizer": {"state": {}}, "epoch": 299, "args": args, **more}, path)
        return path

    return write
