"""The global filter between fused CPU operations, which take its norms over, and all that must keep them away."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import nn

from hornet_lit.network import GlobalLocalFilter
from tests.network.conftest import (
    assert_near,
    doubled,
    global_mixer,
    maps,
    needs_kernels,
    replaced,
    small_block,
    with_gradients,
)


@needs_kernels
@pytest.mark.parametrize("size", [(7, 5), (14, 14)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_global_filters_norms_are_fused_too(
    size: tuple[int, int], channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, x_BCHW = small_block(48, 3, mixer=global_mixer(3), size=size), maps(3, 48, *size)
    exact, x_BCHW = copy.deepcopy(block).double(), x_BCHW if channels_last else x_BCHW.contiguous()
    results = [with_gradients(exact, exact, x_BCHW.double())]
    monkeypatch.setattr(torch.nn.functional, "layer_norm", None)  # the library's would have to call that
    results.append(with_gradients(block, block, x_BCHW))
    for a, b in zip(*reversed(results), strict=True):
        assert_near(a, b)


class TwiceFilter(GlobalLocalFilter):
    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x_BCHW)


def one_for_all(p: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(p.detach()[:1].expand(p.shape))


def without_epsilon(norm: LayerNorm2d) -> LayerNorm2d:
    norm.eps = 0.0
    return norm


GLOBAL_CHANGES = {
    f"{how} of {path}": doubled(f"gnconv.{path}", how)
    for path in ("dwconv", "dwconv.pre_norm", "dwconv.post_norm")
    for how in ("hook", "pre-hook", "forward")
} | {
    "no bias": replaced("gnconv.dwconv.pre_norm.bias", lambda _: None),
    "no epsilon": replaced("gnconv.dwconv.pre_norm", without_epsilon),
    "another norm": replaced("gnconv.dwconv.pre_norm", lambda norm: nn.BatchNorm2d(84).to(norm.weight.dtype)),
    "another class": lambda block: setattr(block.gnconv.dwconv, "__class__", TwiceFilter),
    "one value for all": replaced("gnconv.dwconv.pre_norm.weight", one_for_all),
}


@pytest.mark.parametrize("name", GLOBAL_CHANGES)
def test_a_changed_global_filter_computes_what_it_is(name: str) -> None:
    block, x_BCHW = small_block(48, 3, mixer=global_mixer(3)), maps(2, 48, 7, 5)
    exact = copy.deepcopy(block).double()
    for changed in (block, exact):
        GLOBAL_CHANGES[name](changed)
    for a, b in zip(with_gradients(block, block, x_BCHW), with_gradients(exact, exact, x_BCHW.double()), strict=True):
        assert_near(a, b, 2e-5)
