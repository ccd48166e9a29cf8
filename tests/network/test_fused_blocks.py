"""Blocks and networks with the fused CPU operations, and all that must keep those away: against the same in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from hornet_lit.network import GnConv, fused, native
from hornet_lit.network.layers import GELU, ChannelLinear
from tests.network.conftest import (
    FORWARD,
    assert_exact,
    assert_near,
    doubled,
    global_mixer,
    maps,
    needs_kernels,
    one_for_all,
    replaced,
    small_block,
    small_network,
    with_gradients,
)


@needs_kernels
def test_all_of_a_block_within_a_pixel_is_fused(ran: list[str]) -> None:
    small_block()(maps(2, 20, 7, 5)).sum().backward()
    assert ran == [*FORWARD, "mlp_backward_f32", "gates_backward_f32", "linear_backward_f32"]


def without(_: nn.Parameter) -> None:
    return None


def strided(p: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(p.detach().repeat_interleave(2, dim=0)[::2])


def turned(p: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(p.detach().transpose(0, 1).contiguous().transpose(0, 1))


class TwiceConv(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class TwiceMixer(GnConv):
    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x_BCHW)


HOOKED = ("gnconv", "gnconv.proj_in", "gnconv.pws.1", "gnconv.proj_out", "norm1", "norm2", "pwconv1", "pwconv2", "act")
LINEAR = ("pwconv1", "pwconv2", "gnconv.proj_in", "gnconv.proj_out", "gnconv.pws.0")
CHANGES = {f"{how} of {path}": doubled(path, how) for path in HOOKED for how in ("hook", "pre-hook", "forward")}
CHANGES |= {f"{path} without bias": replaced(f"{path}.bias", without) for path in (*LINEAR, "norm1", "norm2")}
CHANGES |= {f"turned weight of {path}": replaced(f"{path}.weight", turned) for path in LINEAR}
CHANGES |= {f"strided {p}": replaced(p, strided) for p in ("gamma1", "gamma2", "norm1.weight", "pwconv1.bias")}
CHANGES |= {f"one value for all of {p}": replaced(p, one_for_all) for p in ("gamma1", "gnconv.proj_in.bias")}
CHANGES |= {f"parametrised {path}": lambda b, path=path: weight_norm(b.get_submodule(path)) for path in LINEAR}
CHANGES |= {
    "another activation": replaced("act", lambda _: nn.ReLU()),
    "another GELU": replaced("act", lambda _: GELU(approximate="tanh")),
    "a convolution of another class": replaced("gnconv.proj_in", lambda _: TwiceConv(20, 40, 1)),
    "groups": replaced("gnconv.proj_in", lambda _: nn.Conv2d(20, 40, 1, groups=2)),
    "a larger kernel": replaced("gnconv.proj_out", lambda _: nn.Conv2d(20, 20, 3, padding=1)),
    "steps and padding": replaced("gnconv.proj_in", lambda _: nn.Conv2d(20, 40, 1, stride=(3, 3), padding=(7, 5))),
    "a norm without weights": replaced("norm1", lambda _: LayerNorm2d(20, affine=False)),
    "a mixer of another class": lambda block: setattr(block.gnconv, "__class__", TwiceMixer),
    "another mixer": replaced("gnconv", lambda _: nn.Conv2d(20, 20, 3, padding=1)),
    "weights channels-last": lambda block: block.to(memory_format=torch.channels_last),
    "one gamma less": lambda block: setattr(block, "gamma1", None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_block_computes_what_it_is(name: str) -> None:
    blocks, x_BCHW = (small_block(), small_block()), maps(2, 20, 7, 5)
    for block in blocks:
        CHANGES[name](block)
    exact = with_gradients(blocks[1].double(), blocks[1], x_BCHW.double())
    for a, b in zip(with_gradients(blocks[0], blocks[0], x_BCHW), exact, strict=True):
        assert_near(a, b, 2e-5)


def test_backward_hooks_hear_of_every_module() -> None:
    x_BCHW = maps(2, 20, 7, 5)
    names, heard = [n for n, _ in small_block().named_modules() if n not in ("drop_path", "gnconv.pws")], []
    for name in names:
        block = small_block()
        block.get_submodule(name).register_full_backward_hook(lambda *_, name=name: heard.append(name))
        block(x_BCHW.clone().requires_grad_()).sum().backward()
    assert heard == names
    of_all = nn.modules.module
    for register in (of_all.register_module_full_backward_hook, of_all.register_module_full_backward_pre_hook):
        heard.clear()
        handle = register(lambda module, *_: heard.append(module))
        try:
            small_block()(x_BCHW.clone().requires_grad_()).sum().backward()
        finally:
            handle.remove()
        assert len(set(heard)) == len(names)


def test_flops_are_counted_as_without_the_operations() -> None:
    counts = []
    for dtype in (torch.float32, torch.double):
        block = small_block().to(dtype)
        with FlopCounterMode(display=False) as counter:
            block(maps(2, 20, 7, 5).to(dtype)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_maps_that_do_not_fit_are_errors_and_not_read() -> None:
    for channels in (10, 40):
        with pytest.raises(RuntimeError, match=r"normalized_shape=\[20\]"):
            small_block()(maps(2, channels, 7, 5))
    for other in (nn.AvgPool2d(2), nn.Conv2d(35, 20, 1)):
        block = small_block()
        block.gnconv.dwconv = other
        with pytest.raises((RuntimeError, ValueError, AssertionError), match=r"shape|size"):
            block(maps(2, 20, 7, 5))


@pytest.mark.parametrize(
    "path,make",
    [
        ("pwconv2", lambda _: ChannelLinear(90, 20)),
        ("pwconv1", lambda _: ChannelLinear(21, 80)),
        ("gnconv.proj_in", lambda _: nn.Conv2d(20, 44, 1)),
        ("gnconv.pws.0", lambda _: nn.Conv2d(5, 8, 1)),
        ("gnconv.proj_out", lambda _: nn.Conv2d(30, 20, 1)),
        ("gnconv.proj_in.weight", lambda _: nn.Parameter(torch.ones(40, 20, 3, 3))),
        ("gamma1", lambda _: nn.Parameter(torch.ones(19))),
        ("gamma2", lambda _: nn.Parameter(torch.ones(2, 20))),
        ("norm2.bias", lambda _: nn.Parameter(torch.ones(19))),
    ],
)
def test_layers_that_do_not_fit_are_errors_and_not_read(path: str, make: Callable) -> None:
    block = small_block()
    replaced(path, make)(block)
    with pytest.raises((RuntimeError, ValueError), match=r"channels|fit|shape|size"):
        block(maps(2, 20, 7, 5))


@pytest.mark.parametrize("shape", [(1, 20), (20, 1, 1), (4, 5), (1,)])
def test_a_scale_has_any_shape_that_pytorch_takes(shape: tuple[int, ...]) -> None:
    block = small_block()
    for path in ("gamma1", "gamma2"):
        replaced(path, lambda _: nn.Parameter(torch.randn(shape)))(block)
    assert_exact(block, maps(2, 20, 7, 5))


@pytest.mark.parametrize(
    "path,make",
    [("act", lambda _: ChannelLinear(80, 80)), ("norm1", lambda _: nn.Conv2d(20, 20, 1))]
    + [(path, lambda _: GELU()) for path in ("gnconv.proj_out", "norm2")],
)
def test_modules_of_another_ones_kind_are_not_taken_for_it(path: str, make: Callable) -> None:
    block, x_BCHW = small_block(), maps(2, 20, 7, 5)
    replaced(path, make)(block)
    assert_near(block(x_BCHW), copy.deepcopy(block).double()(x_BCHW.double()))


@pytest.mark.parametrize("mixed", [False, True])
def test_norms_without_epsilon(mixed: bool) -> None:
    block = small_block()
    block.norm1.eps = block.norm2.eps = 0.0
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        y_BCHW = block(maps(1, 20, 3, 1))
    y_BCHW.sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())


def test_autocast() -> None:
    block, x_BCHW = small_block(), maps(2, 20, 7, 5)
    exact = block(x_BCHW)
    with torch.autocast("cpu", torch.bfloat16):
        y_BCHW = block(x_BCHW)
    assert_near(y_BCHW, exact, 0.03)
    y_BCHW.sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_traced_and_exported_networks_hold_pytorchs_own_operations() -> None:
    network, x_BCHW, others_BCHW = small_network().eval(), maps(2, 3, 16, 16), maps(3, 3, 16, 16, seed=4)
    with torch.no_grad():
        traced = torch.jit.trace(network, x_BCHW)
        exact = copy.deepcopy(network).double()(others_BCHW.double())
    exported = torch.export.export(network, (x_BCHW,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    targets = {str(node.target) for node in exported.graph.nodes}
    for names, module in ((kinds, traced), (targets, exported.module())):
        assert any("conv" in name for name in names)
        assert not any("hornet_lit" in name or "PythonOp" in name for name in names), names
        assert_near(module(others_BCHW), exact)


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # of torch's own table of derivatives
def test_functional_calls_vmap_and_forward_derivatives() -> None:
    networks, x_BCHW = [small_network(ls_init_value=v).eval() for v in (0.5, 2.0)], maps(2, 3, 16, 16)
    exact = torch.stack([copy.deepcopy(network).double()(x_BCHW.double()) for network in networks])
    state = [{k: v.detach() for k, v in part.items()} for part in torch.func.stack_module_state(networks)]
    by_vmap = torch.vmap(lambda *state: torch.func.functional_call(networks[0], state, (x_BCHW,)))(*state)
    assert_near(by_vmap, exact)
    swapped = torch.func.functional_call(networks[0], dict(networks[1].named_parameters()), (x_BCHW,))
    assert_near(swapped, exact[1])
    network = networks[0].requires_grad_(False)
    double, x_double = copy.deepcopy(network).double(), x_BCHW.double()
    exact = torch.func.jvp(double, (x_double,), (x_double,))[1]
    assert_near(torch.func.jvp(network, (x_BCHW,), (x_BCHW,))[1], exact)
    with torch.autograd.forward_ad.dual_level():
        dual = network(torch.autograd.forward_ad.make_dual(x_BCHW, x_BCHW))
        assert_near(torch.autograd.forward_ad.unpack_dual(dual).tangent, exact)


def test_switched_off(monkeypatch: pytest.MonkeyPatch, ran: list[str]) -> None:
    by_kernels = small_block()(maps(2, 20, 7, 5))
    ran.clear()
    monkeypatch.setenv("HORNET_LIT_NATIVE", "0")
    native.library.cache_clear()
    try:
        assert_near(small_block()(maps(2, 20, 7, 5)), by_kernels)
        assert not fused._built(True) and not ran
    finally:
        native.library.cache_clear()


@needs_kernels
@pytest.mark.parametrize(
    "order,side,flags",
    [(1, 3, "-mno-avx512f"), (4, 9, "-mno-avx512f"), (4, 9, "-mno-avx512f -Ofast -ffast-math -fvisibility=hidden -O1")],
)
def test_with_other_flags(order: int, side: int, flags: str, monkeypatch: pytest.MonkeyPatch, ran: list[str]) -> None:
    """Vectors of half the length, other tiles, fast math asked for: the same values and gradients."""
    monkeypatch.setenv("CXXFLAGS", flags)
    for cached in (native.library, native._builds):
        cached.cache_clear()
    try:
        assert native.lanes("pixelwise") == 8
        block = small_block(48, order, mixer=global_mixer(order))
        assert_exact(block, maps(3, 48, side, side))
        assert ran == [*FORWARD, "mlp_backward_f32", "gates_backward_f32", "linear_backward_f32"]
    finally:
        for cached in (native.library, native._builds):
            cached.cache_clear()


@needs_kernels
@pytest.mark.parametrize("channels_last", [False, True])
def test_maps_larger_than_the_caches(channels_last: bool) -> None:
    """They are written past them, if their pixels are whole lines of memory."""
    block, x_BCHW = small_block(64, 2), maps(2, 64, 60, 61)
    assert_exact(block, x_BCHW if channels_last else x_BCHW.contiguous())


@needs_kernels
def test_compiled_in_one_graph_for_all_batches(ran: list[str]) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    block, counter = small_block(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for batch in (3, 2, 5):
        results = []
        for f in (block, compiled):
            block.zero_grad()
            results.append(with_gradients(f, block, maps(batch, 20, 7, 5)))
        for a, b in zip(*results, strict=True):
            assert_near(a, b, 1e-6)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1], "compiled again for another batch"
    assert ran.count("mlp_backward_f32") == 6, "compiled, it left the fused operations out"
    with torch.no_grad():
        assert_near(compiled(maps(4, 20, 7, 5)), block(maps(4, 20, 7, 5)), 1e-6)


TRAINED = {
    "nothing": lambda name: False,
    "biases": lambda name: name.endswith("bias"),
    "weights": lambda name: name.endswith("weight"),
    "mixer": lambda name: name.startswith("gnconv"),
    "gammas": lambda name: name.startswith("gamma"),
    "first layers": lambda name: name.startswith(("norm", "pwconv1", "gnconv.proj_in")),
}


@needs_kernels
@pytest.mark.parametrize("input_too", [False, True])
@pytest.mark.parametrize("trained", TRAINED)
def test_gradients_of_what_is_not_frozen(trained: str, input_too: bool, ran: list[str]) -> None:
    grads, block = [], small_block()
    for name, p in block.named_parameters():
        p.requires_grad_(TRAINED[trained](name))
    for dtype in (torch.float32, torch.double):
        block, x_BCHW = copy.deepcopy(block).to(dtype), maps(2, 20, 7, 5).to(dtype).requires_grad_(input_too)
        y_BCHW = block(x_BCHW)
        assert y_BCHW.requires_grad == (input_too or trained != "nothing")
        if y_BCHW.requires_grad:
            y_BCHW.square().sum().backward()
        grads.append([x_BCHW.grad, *(p.grad for p in block.parameters())])
    for a, b in zip(*grads, strict=True):
        assert_near(a, b)
    assert ran[:3] == FORWARD


@needs_kernels
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_values_are_the_same(mode: Callable, ran: list[str]) -> None:
    block, x_BCHW = small_block(), maps(2, 20, 7, 5)
    with mode():
        y_BCHW = block(x_BCHW)
    assert ran == FORWARD and not y_BCHW.requires_grad
    assert_near(y_BCHW, block(x_BCHW), 1e-6)


@pytest.mark.parametrize("gamma", [0.5, None])
@pytest.mark.parametrize("recompute,checkpointed", [(False, False), (True, False), (False, True)])
def test_training_with_stochastic_depth(gamma: float | None, recompute: bool, checkpointed: bool) -> None:
    network, results = small_network(drop_path_rate=0.5, ls_init_value=gamma).train(), []
    network.set_recompute(recompute)
    network.set_grad_checkpointing(checkpointed)
    for dtype in (torch.float32, torch.double):
        network = copy.deepcopy(network).to(dtype)
        torch.manual_seed(5)
        results.append(with_gradients(network, network, maps(8, 3, 16, 16).to(dtype)))
    for a, b in zip(*results, strict=True):
        assert_near(a, b, 3e-5)
