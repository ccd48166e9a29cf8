"""LayerNorm and the convolution between stages in one operation, against the same in plain PyTorch and float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import nn

from hornet_lit.network.block import normed_and_strided
from hornet_lit.network.layers import StridedConv
from hornet_lit.network.pixelwise import norm_strided
from tests.network.conftest import assert_near, maps, needs_kernels, shaken, small_network, with_gradients
from tests.network.test_pixelwise import assert_same, in_all_layouts

pytestmark = [needs_kernels, pytest.mark.usefixtures("threads_as_found")]
# Side of a patch; batch, height, width: whole patches or not, one patch, several groups of tiles.
SIZES = [(2, (3, 4, 6)), (2, (1, 3, 2)), (2, (5, 27, 30)), (3, (2, 7, 11)), (4, (2, 4, 9))]


def step(channels: int, side: int, **options: bool) -> nn.Sequential:
    torch.manual_seed(0)
    conv = StridedConv(channels, channels + 5, side, stride=side, **options)
    return shaken(nn.Sequential(LayerNorm2d(channels, eps=0.3), conv))


@in_all_layouts
@pytest.mark.parametrize("channels", [5, 24])
@pytest.mark.parametrize("side,size", SIZES)
def test_values_and_gradients(side: int, size: tuple[int, int, int], channels: int, layout: str) -> None:
    fused, plain = (lambda m: lambda x: norm_strided(x, *m)), (lambda m: m)
    assert_same(fused, plain, step(channels, side), [maps(size[0], channels, *size[1:])], layout)


@pytest.mark.parametrize("mode", ["mixed", "bf16"])
@pytest.mark.parametrize("channels", [5, 24])
@pytest.mark.parametrize("side,size", SIZES)
def test_bfloat16(side: int, size: tuple[int, int, int], channels: int, mode: str) -> None:
    module, x_BCHW = step(channels, side), maps(size[0], channels, *size[1:])
    double = copy.deepcopy(module).double()
    if mode == "bf16":
        module, x_BCHW = module.bfloat16(), x_BCHW.bfloat16()

    def fused(x_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "mixed"):
            return normed_and_strided(module, x_BCHW)

    ours, exact = with_gradients(fused, module, x_BCHW), with_gradients(double, double, x_BCHW.double())
    assert ours[0].dtype == torch.bfloat16
    for a, b in zip(ours, exact, strict=True):
        assert_near(a, b, 2e-2)


def test_a_stage_after_the_first_begins_with_it(ran: list[str]) -> None:
    network, x_BCHW = small_network(), maps(2, 3, 16, 16)
    with torch.enable_grad():
        network(x_BCHW).sum().backward()
    assert [name for name in ran if name.startswith("linear")] == 3 * ["linear_forward_f32"] + 3 * [
        "linear_backward_f32"
    ]


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, output: 2 * output)


def doubled(module: nn.Module) -> None:
    module.forward = lambda x: 2 * type(module).forward(module, x)


@pytest.mark.parametrize("change", [hook, doubled])
@pytest.mark.parametrize("path", ["downsample_layers.1", "downsample_layers.1.0", "downsample_layers.1.1"])
def test_what_is_changed_computes_what_it_is(path: str, change: Callable[[nn.Module], None]) -> None:
    network, x_BCHW = small_network(), maps(2, 3, 16, 16)
    before, double = network(x_BCHW), copy.deepcopy(network).double()
    for each in (network, double):
        change(each.get_submodule(path))
    assert not torch.allclose(network(x_BCHW), before)
    assert_near(network(x_BCHW), double(x_BCHW.double()))


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 1},
        {"stride": 2, "padding": 1},
        {"stride": 2, "dilation": 2},
        {"stride": 2, "groups": 2},
        {"stride": 5},
    ],
)
def test_other_convolutions_are_left_to_the_library(options: dict[str, int]) -> None:
    side = 5 if options["stride"] == 5 else 2
    layers = nn.Sequential(LayerNorm2d(6), StridedConv(6, 8, side, **options))
    assert normed_and_strided(layers, maps(1, 6, 10, 10)) is None
    assert normed_and_strided(nn.Sequential(LayerNorm2d(6), nn.Conv2d(6, 8, 2, stride=2)), maps(1, 6, 8, 8)) is None


def test_a_map_smaller_than_a_patch_is_the_librarys_error() -> None:
    layers = nn.Sequential(LayerNorm2d(6, eps=1e-6), StridedConv(6, 12, 2, stride=2))
    x_BCHW = maps(2, 6, 1, 4)
    assert normed_and_strided(layers, x_BCHW) is None
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        layers(x_BCHW)


def test_layers_that_do_not_fit_are_errors_and_not_read() -> None:
    with pytest.raises(ValueError, match="a convolution of 5 channels belongs here"):
        norm_strided(maps(1, 5, 4, 4), LayerNorm2d(5), StridedConv(6, 8, 2, stride=2))


def test_a_patch_does_not_depend_on_its_neighbours_or_the_threads() -> None:
    module, x_BCHW = step(24, 2), maps(5, 24, 12, 14)
    torch.set_num_threads(1)
    alone = torch.cat([norm_strided(x, *module) for x in x_BCHW.split(1)])
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(norm_strided(x_BCHW, *module), alone)


def test_compiled_in_one_graph_for_all_batches() -> None:
    network = small_network()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 3):
        x_BCHW = maps(batch, 3, 16, 20)
        results = []
        for f in (network, compiled):
            network.zero_grad()
            results.append(with_gradients(f, network, x_BCHW))
        for a, b in zip(*results, strict=True):
            assert_near(a, b)
