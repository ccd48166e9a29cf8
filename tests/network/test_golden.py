"""The ten official networks against the authors' code: names, shapes, parameter counts, logits."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import timm
import torch
from torch import nn

import hornet_lit  # noqa: F401  (registers the networks)
from tests.conftest import GOLDEN, filled_by_rule, images

OFFICIAL = sorted(json.loads((GOLDEN / "state_dict.json").read_text()))
FORWARD = sorted(np.load(GOLDEN / "forward.npz").files)


@pytest.mark.parametrize("name", OFFICIAL)
def test_state_dict_is_the_official_one(name: str, golden) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
    expected = golden("state_dict.json")[name]
    assert {k: list(v.shape) for k, v in network.state_dict().items()} == expected["keys"]
    assert sum(p.numel() for p in network.parameters()) == expected["params"]


@functools.lru_cache(maxsize=1)  # the sizes of a network come one after another, and filling a large one takes longest
def filled(name: str) -> nn.Module:
    with torch.device("meta"):  # else its random initialisation would be made, and thrown away
        network = timm.create_model(name).eval()
    network.load_state_dict(filled_by_rule(network), strict=True, assign=True)
    return network


@pytest.mark.parametrize("key", FORWARD)
def test_logits_match_the_authors(key: str, golden) -> None:
    name, size = key.split("/")
    expected = golden("forward.npz")[key]
    with torch.inference_mode():
        logits = filled(name)(images(0, len(expected), 3, *map(int, size.split("x")))).numpy()
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
