"""Maps and weights whose memory is not what they hold, or that have none: PyTorch's own operations serve those."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from hornet_lit.network import DepthwiseConv, GlobalLocalFilter
from hornet_lit.network.block import Block, in_turn
from tests.network.conftest import GLOBAL, assert_near, global_mixer, maps, shaken, small_block, small_network


class Halved(torch.Tensor):
    """Is twice what its memory holds, as quantised weights are something else."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> torch.Tensor:
        options = {"dtype": inner.dtype, "strides": inner.stride()}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **options)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def]
        if function is torch.ops.aten.detach.default:
            return Halved(arguments[0].inner)
        arguments, keywords = tree_map(
            lambda t: 2 * t.inner if isinstance(t, Halved) else t, (arguments, keywords or {})
        )
        return function(*arguments, **keywords)


def negated(values: torch.Tensor) -> torch.Tensor:
    """The same values, of which memory holds the negatives."""
    return torch._neg_view((-values).contiguous())


PLACES = ["gamma1", "gamma2", "norm1.weight", "gnconv.proj_in.weight", "pwconv2.bias"]
OF_FILTERS = {
    "gnconv.dwconv.weight": {},
    "gnconv.dwconv.bias": {},
    "gnconv.dwconv.dw.weight": GLOBAL,
    "gnconv.dwconv.complex_weight": GLOBAL,
    "gnconv.dwconv.pre_norm.weight": GLOBAL,
}
CASES = [(name, options) for name in PLACES for options in ({}, GLOBAL)] + list(OF_FILTERS.items())


def with_parameter(block: Block, name: str, value: nn.Parameter) -> Block:
    parent, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(parent), leaf, value)
    return block.requires_grad_(False)


def block_and_map(options: dict) -> tuple[Block, torch.Tensor]:
    block = small_block(**options).eval()
    return block, maps(2, block.norm1.weight.shape[0], *options.get("size", (7, 5)))


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("name,options", CASES)
def test_weights_of_a_type_of_their_own(name: str, options: dict, turns: bool) -> None:
    block, x_BCHW = block_and_map(options)
    exact = copy.deepcopy(block).double()
    weight = block.get_parameter(name).detach()
    with_parameter(block, name, nn.Parameter(Halved(weight / 2), requires_grad=False))
    with torch.no_grad():
        y_BCHW = in_turn(nn.Sequential(block), x_BCHW) if turns else block(x_BCHW)
        assert_near(y_BCHW, exact(x_BCHW.double()))


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("name,options", CASES)
def test_weights_still_to_be_negated(name: str, options: dict, turns: bool) -> None:
    block, x_BCHW = block_and_map(options)
    exact = copy.deepcopy(block).double()
    with_parameter(block, name, nn.Parameter(negated(block.get_parameter(name).detach()), requires_grad=False))
    with torch.no_grad():
        y_BCHW = in_turn(nn.Sequential(block), x_BCHW) if turns else block(x_BCHW)
        assert_near(y_BCHW, exact(x_BCHW.double()))


def halved(values: torch.Tensor) -> torch.Tensor:
    return Halved(values / 2)


@pytest.mark.parametrize("make", [negated, halved])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("options", [{}, GLOBAL])
def test_such_maps(options: dict, recorded: bool, layout: torch.memory_format, make: Callable) -> None:
    block, x_BCHW = block_and_map(options)
    x_BCHW = x_BCHW.contiguous(memory_format=layout)
    if make is halved:
        block.requires_grad_(False)
    with torch.set_grad_enabled(recorded):
        assert_near(block(made_like(x_BCHW, make)), copy.deepcopy(block).double()(x_BCHW.double()))


def made_like(x_BCHW: torch.Tensor, make: Callable) -> torch.Tensor:
    x_BHWC = x_BCHW.permute(0, 2, 3, 1)
    return make(x_BHWC).permute(0, 3, 1, 2) if x_BHWC.is_contiguous() else make(x_BCHW)


class Unusual(DepthwiseConv):
    make: Callable

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return made_like(super().forward(x_BCHW), self.make)


@pytest.mark.parametrize("make", [negated, halved])
def test_what_a_filter_gives(make: Callable) -> None:
    block, x_BCHW = block_and_map({})
    exact = copy.deepcopy(block).double()
    block.gnconv.dwconv.__class__ = type("Other", (Unusual,), {"make": staticmethod(make)})
    with torch.no_grad():
        assert_near(block(x_BCHW), exact(x_BCHW.double()))


@pytest.mark.parametrize("options", [{}, GLOBAL])
@pytest.mark.parametrize("name", ["gamma1", "norm2.weight"])
def test_weights_without_data_are_errors_and_not_read(name: str, options: dict) -> None:
    block, x_BCHW = block_and_map(options)
    with_parameter(block, name, nn.Parameter(block.get_parameter(name).to("meta"), requires_grad=False))
    with torch.no_grad(), pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        block(x_BCHW)


@pytest.mark.parametrize("options", [{}, {"mixers": [global_mixer(2), global_mixer(3)]}])
def test_networks_without_data(options: dict) -> None:
    network = small_network(**options).to("meta")
    loss = network(torch.empty(2, 3, 16, 16, device="meta")).sum()
    loss.backward()
    assert loss.is_meta and all(p.grad.is_meta for p in network.parameters())


@pytest.mark.parametrize(
    "module,channels", [(DepthwiseConv(6, size=(7, 5)), 6), (GlobalLocalFilter(6, size=(7, 5)), 6)]
)
def test_gradients_of_many_at_once(module: nn.Module, channels: int) -> None:
    """Batched, their memory is all of theirs."""
    module, x_BCHW = shaken(module), maps(1, channels, 7, 5).requires_grad_()
    dy_NBCHW = torch.randn(3, *x_BCHW.shape, generator=torch.Generator().manual_seed(5))
    (found,) = torch.autograd.grad(module(x_BCHW), x_BCHW, dy_NBCHW, is_grads_batched=True)
    for dx_BCHW, dy_BCHW in zip(found, dy_NBCHW, strict=True):
        (expected,) = torch.autograd.grad(module(x_BCHW), x_BCHW, dy_BCHW)
        assert_near(dx_BCHW, expected.double())
