"""Stages whose threads take their images through all blocks: the values of the blocks one by one, to the last bit."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hornet_lit.network import GnConv, HorNet, fused
from hornet_lit.network.block import Block, in_turn
from hornet_lit.network.filters import DepthwiseConv, GlobalLocalFilter
from hornet_lit.network.native.steps import Call, Steps
from tests.network.conftest import (
    FORWARD,
    GLOBAL,
    assert_near,
    global_mixer,
    maps,
    needs_kernels,
    shaken,
    small_block,
    small_network,
)
from tests.network.test_fused_blocks import CHANGES

pytestmark = pytest.mark.usefixtures("threads_as_found")
KINDS = ["float32", "bfloat16", "autocast"]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many calls each run of steps has made."""
    counts, run = [], Steps.run

    def counted(steps: Steps, x_BCHW: torch.Tensor) -> None:
        counts.append(len(steps.calls))
        run(steps, x_BCHW)

    monkeypatch.setattr(Steps, "run", counted)
    return counts


def stage_of(*blocks: Block) -> nn.Sequential:
    return nn.Sequential(*blocks).eval()


def one_by_one(stage: nn.Sequential, x_BCHW: torch.Tensor) -> torch.Tensor:
    for block in stage:
        x_BCHW = block(x_BCHW)
    return x_BCHW


def of_kind(kind: str, stage: nn.Module, x_BCHW: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    return (stage.bfloat16(), x_BCHW.bfloat16()) if kind == "bfloat16" else (stage, x_BCHW)


def context(kind: str) -> torch.autocast | nullcontext:
    return torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else nullcontext()


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads,batch", [(1, 1), (1, 3), (2, 2), (2, 8), (3, 6), (2, 33)])
@pytest.mark.parametrize(
    "dim,options,size",
    [
        (20, {}, (7, 5)),
        (13, {"order": 1}, (1, 1)),
        (64, {"mlp_ratio": 2.0, "ls_init_value": None}, (9, 16)),
        (24, {"mixer": global_mixer(3), "size": (11, 7)}, (11, 7)),
        (24, {"mixer": global_mixer(2), "size": (11, 7)}, (4, 1)),
    ],
)
def test_bit_for_bit_as_the_blocks_one_by_one(
    dim: int, options: dict, size: tuple[int, int], threads: int, batch: int, kind: str, made: list[int]
) -> None:
    torch.set_num_threads(threads)
    stage = stage_of(*(shaken(small_block(dim, **options)) for _ in range(3)))
    stage, x_BCHW = of_kind(kind, stage, maps(batch, dim, *size))
    before = x_BCHW.clone()
    with torch.inference_mode(), context(kind):
        assert fused.may_take_turns(x_BCHW)
        y_BCHW = in_turn(stage, x_BCHW)
        assert made == [3 * (5 if "mixer" in options else 4)], "not all of it ran in turn"
        assert torch.equal(y_BCHW, one_by_one(stage, x_BCHW))
    assert torch.equal(x_BCHW, before)


@needs_kernels
def test_a_map_without_pixels(made: list[int]) -> None:
    torch.set_num_threads(2)
    with torch.no_grad():
        y_BCHW = in_turn(stage_of(small_block(), small_block()), maps(2, 20, 0, 5))
    assert y_BCHW.shape == (2, 20, 0, 5) and made == [8]


@needs_kernels
@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("name", CHANGES)
def test_a_stage_with_a_changed_block(name: str, place: int) -> None:
    blocks = [small_block() for _ in range(3)]
    CHANGES[name](blocks[place])
    stage, x_BCHW = stage_of(*blocks), maps(2, 20, 7, 5)
    torch.set_num_threads(2)
    with torch.no_grad():
        y_BCHW = in_turn(stage, x_BCHW)
        assert torch.equal(y_BCHW, one_by_one(stage, x_BCHW))
        for i, block in enumerate(blocks):
            blocks[i] = block.double()  # never fused; in place, since hooks are not copied
        assert_near(y_BCHW, one_by_one(stage_of(*blocks), x_BCHW.double()), 5e-5)


@needs_kernels
def test_hooks_on_blocks_and_stages_are_heard() -> None:
    network, x_BCHW, heard = small_network(depths=(2, 2)).eval(), maps(2, 3, 16, 16), []
    for name, module in network.named_modules():
        if name.startswith("stages"):
            module.register_forward_hook(lambda module, inputs, output, name=name: heard.append(name))
    with torch.no_grad():
        network(x_BCHW)
    expected = {name for name, _ in network.named_modules() if name.startswith("stages.")}
    assert set(heard) == {name for name in expected if not name.endswith(("drop_path", "pws", "stages"))}
    heard.clear()
    network = small_network(depths=(2, 2)).eval()
    network.stages[0][1].register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0].clone()))
    with torch.no_grad():
        network(x_BCHW)
        assert torch.equal(heard[0], network.stages[0][0](network.downsample_layers[0](x_BCHW)))


@needs_kernels
def test_where_it_would_not_serve_it_does_not_run(made: list[int]) -> None:
    torch.set_num_threads(2)
    network, x_BCHW = small_network().eval(), maps(2, 3, 16, 16)
    network(x_BCHW)
    with torch.no_grad():
        network(maps(3, 3, 16, 16))
        with FlopCounterMode(display=False):
            network(x_BCHW)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            network(x_BCHW)
        assert not made
        network(x_BCHW)
        assert made == [4, 4]
        made.clear()
        network.train()(x_BCHW)
        assert made == [4, 4]
        made.clear()
        small_network(drop_path_rate=0.5)(x_BCHW)
        assert sum(made) == 4  # only the last block drops


@needs_kernels
def test_whole_networks_and_their_intermediates(made: list[int]) -> None:
    """What a stage gave is not overwritten by the next stage, or by the next images."""
    torch.set_num_threads(2)
    mixers = [partial(GnConv, order=o, filter=partial(DepthwiseConv, kernel_size=5)) for o in (2, 3)]
    torch.manual_seed(0)
    network = shaken(HorNet(mixers=mixers, depths=(2, 3), base_dim=12, img_size=32, stem_stride=2, num_classes=5))
    network.eval()
    images = [maps(4, 3, 32, 32, seed=seed) for seed in (3, 4)]
    with torch.no_grad():
        found = [network.forward_intermediates(x_BCHW) for x_BCHW in images]
    assert made == 2 * [8, 12]
    double = copy.deepcopy(network).double()
    for x_BCHW, (last_BCHW, stages) in zip(images, found, strict=True):
        exact, exact_stages = double.forward_intermediates(x_BCHW.double())
        for ours, theirs in zip([last_BCHW, *stages], [exact, *exact_stages], strict=True):
            assert_near(ours, theirs)


def test_blocks_share_their_maps() -> None:
    steps, x_BCHW, outputs = Steps(), maps(2, 20, 7, 5), []
    with torch.no_grad():
        for _ in range(4):
            y_BCHW = small_block().eval().in_turn(x_BCHW, steps)
            if y_BCHW is None:
                pytest.skip("no kernels")
            assert y_BCHW is not x_BCHW and len(steps.maps) == 5
            outputs.append(y_BCHW)
            x_BCHW = y_BCHW
    assert len(steps.calls) == 16
    assert outputs[0] is outputs[2] and outputs[1] is outputs[3], "they take turns"


@needs_kernels
@pytest.mark.parametrize("seed", range(4))
def test_blocks_of_all_kinds_in_one_stage(seed: int, made: list[int]) -> None:
    """Where one block has a map for its filter the next may have one for its output."""
    convolution = partial(GnConv, filter=partial(DepthwiseConv, kernel_size=3))
    kinds = [partial(convolution, order=order) for order in (1, 2, 3)] + [global_mixer(order) for order in (1, 2, 3)]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed)) % 6
    stage = stage_of(*(small_block(24, mixer=kinds[k], size=(11, 7)) for k in order))
    torch.set_num_threads(2)
    with torch.no_grad():
        y_BCHW = in_turn(stage, maps(4, 24, 11, 7))
        assert len(made) == 1 and torch.equal(y_BCHW, one_by_one(stage, maps(4, 24, 11, 7)))


@needs_kernels
def test_several_threads_of_python(ran: list[str]) -> None:
    network, images = small_network().eval(), [maps(2, 3, 16, 16, seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected, found = [network(x_BCHW) for x_BCHW in images], [None] * 4

    def predict(i: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                found[i] = network(images[i])

    threads = [threading.Thread(target=predict, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs)
    assert ran[:3] == FORWARD


@needs_kernels
def test_a_filter_of_ones_own_gets_maps_that_are_there(made: list[int]) -> None:
    class Doubling(DepthwiseConv):
        def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x_BCHW)

    mixers: list[Callable] = [
        partial(GnConv, order=2, filter=lambda channels, size: nn.Identity()),
        partial(GnConv, order=2, filter=Doubling),
    ]
    for mixer in mixers:
        stage, x_BCHW = stage_of(*(small_block(mixer=mixer) for _ in range(2))), maps(2, 20, 7, 5)
        with torch.no_grad():
            y_BCHW = in_turn(stage, x_BCHW)
            assert_near(y_BCHW, one_by_one(copy.deepcopy(stage).double(), x_BCHW.double()))
    assert set(made) <= {0}


class OtherBlock(Block):
    def _mlp(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return 2 * super()._mlp(x_BCHW)

    def _fused_mlp(self, *arguments, **options) -> None:  # type: ignore[no-untyped-def]
        return None


class OtherMixer(GnConv):
    def normed(self, *arguments, **options) -> torch.Tensor:  # type: ignore[no-untyped-def]
        return 2 * super().normed(*arguments, **options)


class OtherFilter(GlobalLocalFilter):
    def filtered(self, *maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        local_BCHW, global_BCHW = super().filtered(*maps)
        return 2 * local_BCHW, global_BCHW


@needs_kernels
@pytest.mark.parametrize("other", ["block", "mixer", "filter"])
def test_what_a_subclass_does_otherwise_is_done(other: str) -> None:
    block, x_BCHW = small_block(**GLOBAL), maps(2, 24, 11, 7)
    if other == "block":
        block.__class__ = OtherBlock
    elif other == "mixer":
        block.gnconv.__class__ = OtherMixer
    else:
        block.gnconv.dwconv.__class__ = OtherFilter
    torch.set_num_threads(2)
    expected = block(x_BCHW)
    with torch.no_grad():
        assert torch.equal(in_turn(stage_of(block), x_BCHW), block(x_BCHW))
        assert_near(block(x_BCHW), expected.double())


@needs_kernels
@pytest.mark.parametrize("path", ["stages.0", "stages.1.0", "stages.0.0.gnconv", "stages.0.0.norm2"])
def test_modules_compiled_in_place_are_called(path: str, made: list[int]) -> None:
    network, x_BCHW, called = small_network().eval(), maps(2, 3, 16, 16), []
    module = network.get_submodule(path)

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        def run(*arguments: torch.Tensor) -> object:
            called.append(path)
            return graph(*arguments)

        return run

    torch.set_num_threads(2)
    with torch.no_grad():
        expected = network(x_BCHW)
        torch._dynamo.reset()
        module.compile(backend=backend)
        assert_near(network(x_BCHW), expected.double())
    assert called


@needs_kernels
def test_hooks_on_all_modules_are_heard() -> None:
    network, x_BCHW, heard = small_network().eval(), maps(2, 3, 16, 16), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: heard.append(module))
    try:
        with torch.no_grad():
            network(x_BCHW)
    finally:
        handle.remove()
    assert {*network.stages, *(block for stage in network.stages for block in stage)} <= set(heard)


def test_a_call_keeps_what_it_points_to() -> None:
    steps, x_BCHW = Steps(), maps(2, 20, 7, 5)
    with torch.no_grad():
        if small_block().eval().in_turn(x_BCHW.contiguous(), steps) is None:
            pytest.skip("no kernels")
    assert all(isinstance(call, Call) and call.tensors for call in steps.calls)
