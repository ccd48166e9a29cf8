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
    one_for_all,
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


class Twice(nn.Module):
    """What it holds, twice, and its attributes, as wrappers of modules give them."""

    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.held, name)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return 2 * self.held(x_BCHW)


def without_epsilon(norm: LayerNorm2d) -> LayerNorm2d:
    norm.eps = 0.0
    return norm


NORMS = ("gnconv.dwconv.pre_norm", "gnconv.dwconv.post_norm")
GLOBAL_CHANGES = {
    f"{how} of {path}": doubled(path, how)
    for path in ("gnconv.dwconv", "gnconv.dwconv.pre_norm")  # its forward calls no other module
    for how in ("hook", "pre-hook", "forward")
} | {
    "no bias": replaced("gnconv.dwconv.pre_norm.bias", lambda _: None),
    "another norm": replaced("gnconv.dwconv.pre_norm", lambda norm: nn.BatchNorm2d(84).to(norm.weight.dtype)),
    "another class": lambda block: setattr(block.gnconv.dwconv, "__class__", TwiceFilter),
    "norms of its own": lambda block: setattr(block.gnconv.dwconv, "norms", nn.ModuleList()),
    "within another": replaced("gnconv.dwconv", lambda filter: Twice(filter)),
}
GLOBAL_CHANGES |= {f"no epsilon, {path}": replaced(path, without_epsilon) for path in NORMS}
GLOBAL_CHANGES |= {f"one value for all, {path}": replaced(f"{path}.weight", one_for_all) for path in NORMS}


@pytest.mark.parametrize("name", GLOBAL_CHANGES)
def test_a_changed_global_filter_computes_what_it_is(name: str) -> None:
    block, x_BCHW = small_block(48, 3, mixer=global_mixer(3)), maps(2, 48, 7, 5)
    exact = copy.deepcopy(block).double()
    for changed in (block, exact):
        GLOBAL_CHANGES[name](changed)
    for a, b in zip(with_gradients(block, block, x_BCHW), with_gradients(exact, exact, x_BCHW.double()), strict=True):
        assert_near(a, b, 2e-5)


def test_a_wrapped_mixer_computes_what_it_is() -> None:
    block, x_BCHW = small_block(48, 3, mixer=global_mixer(3)), maps(2, 48, 7, 5)
    block.gnconv = Twice(block.gnconv)
    assert_near(block(x_BCHW), copy.deepcopy(block).double()(x_BCHW.double()))


@needs_kernels
@pytest.mark.parametrize("outputs", [95, 97, 128])
def test_a_projection_of_another_width_is_an_error_and_not_read(outputs: int) -> None:
    block = small_block(48, 3, mixer=global_mixer(3))
    block.gnconv.proj_in = nn.Conv2d(48, outputs, 1)
    with pytest.raises(ValueError, match=f"{outputs - 12} channels to a norm of 84"):
        block(maps(2, 48, 7, 5))


@pytest.mark.parametrize("path", [*NORMS, "norm1"])
def test_weights_without_values_are_an_error(path: str) -> None:
    block = small_block(48, 3, mixer=global_mixer(3))
    block.get_submodule(path).to("meta")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        block(maps(2, 48, 7, 5))
