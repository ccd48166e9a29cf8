"""The stored loss curve and the checkpoints of earlier versions (see stored.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

import hornet_lit
from tests.training import stored

RECIPES = sorted(stored.CHECKPOINTS.glob("*.yaml"))


def test_loss_curve_of_tiny_gf(tmp_path: Path) -> None:
    expected, found = stored.rows(stored.CURVE), stored.curve(tmp_path)
    assert len(found) == len(expected) == stored.STEPS
    assert expected[-1]["loss"] < 0.8 * expected[0]["loss"]
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4), f"loss of step {step}"
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3), f"gradient norm of step {step}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_checkpoint_of_every_version_resumes(recipe: Path, tmp_path: Path) -> None:
    checkpoint = recipe.with_suffix(".ckpt")
    start = torch.load(checkpoint, weights_only=True)["global_step"]
    expected = [row for row in stored.rows(recipe.with_suffix(".csv")) if row["step"] >= start]
    found = stored.resume(recipe, checkpoint, tmp_path)
    assert len(found) == len(expected) > 5
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4), f"step {other['step']:.0f}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_checkpoint_of_every_version_gives_its_weights(recipe: Path) -> None:
    options = {"base_dim": 8, "depths": [1, 1, 1, 1], "mlp_ratio": 1}
    network = timm.create_model("hornet_nano_gf_32", num_classes=10, in_chans=1, img_size=16, **options)
    raw = hornet_lit.load_weights(network, recipe.with_suffix(".ckpt"), ema=False, verbose=False)
    averaged = hornet_lit.load_weights(network, recipe.with_suffix(".ckpt"), verbose=False)
    assert (raw.weights, averaged.weights) == ("raw", "EMA")
    assert raw.loaded == averaged.loaded == len(network.state_dict())
    assert not raw.initialised + averaged.initialised
