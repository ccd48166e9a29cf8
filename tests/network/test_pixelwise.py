"""The fused CPU operations against the same in plain PyTorch and float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from hornet_lit.network import fused, pixelwise
from hornet_lit.network.gated import gated
from hornet_lit.network.layers import ChannelLinear
from hornet_lit.network.pixelwise import norm_linear, norm_mlp
from tests.network.conftest import (
    GLOBAL,
    assert_exact,
    assert_near,
    global_mixer,
    maps,
    needs_kernels,
    shaken,
    small_block,
    with_gradients,
)

pytestmark = [needs_kernels, pytest.mark.usefixtures("threads_as_found")]
LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "contiguous": lambda t: t.contiguous(),
    "strided": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
}
# As `mean` and `sum` give them; the same for all pixels, so only for gradients.
GRADIENT_LAYOUTS = LAYOUTS | {"expanded": lambda t: t.mean((0, 3), keepdim=True).expand(t.shape)}
SIZES = [(1, 1, 1), (3, 3, 5), (1, 4, 4), (3, 13, 17)]  # batch, height, width; the last: several groups of tiles each

in_all_layouts = pytest.mark.parametrize("layout", GRADIENT_LAYOUTS)
of_all_sizes = pytest.mark.parametrize("size", SIZES)


class Scaled(nn.ModuleList):
    """Modules and perhaps γ."""

    def __init__(self, modules: Sequence[nn.Module], channels: int | None) -> None:
        super().__init__(modules)
        self.scale = nn.Parameter(torch.ones(channels)) if channels else None

    def times(self, y_BCHW: torch.Tensor) -> torch.Tensor:
        return y_BCHW if self.scale is None else y_BCHW * self.scale.view(-1, 1, 1)


def assert_same(fused: Callable, plain: Callable, modules: nn.Module, inputs: list[torch.Tensor], layout: str) -> None:
    """``fused(modules)`` against ``plain`` of the same modules in float64: values and all gradients."""
    laid_out = LAYOUTS.get(layout, LAYOUTS["contiguous"])
    inputs, exact = [laid_out(t) for t in inputs], copy.deepcopy(modules).double()
    ours = with_gradients(fused(modules), modules, *inputs, layout=GRADIENT_LAYOUTS[layout])
    doubles = [t.double() for t in inputs]
    for a, b in zip(ours, with_gradients(plain(exact), exact, *doubles, layout=GRADIENT_LAYOUTS[layout]), strict=True):
        assert_near(a, b)


@of_all_sizes
@in_all_layouts
@pytest.mark.parametrize("channels,first", [(6, 3), (20, 5), (32, 32), (96, 6)])
def test_norm_linear(channels: int, first: int, size: tuple[int, ...], layout: str) -> None:
    torch.manual_seed(0)
    assert_same(
        lambda m: lambda x: norm_linear(x, m[0], m[1], first),
        lambda m: lambda x: m[1](m[0](x)).split([first, 2 * channels - first], dim=1),
        shaken(nn.ModuleList([LayerNorm2d(channels), nn.Conv2d(channels, 2 * channels, 1)])),
        [maps(size[0], channels, *size[1:])],
        layout,
    )


@of_all_sizes
@in_all_layouts
@pytest.mark.parametrize("channels,first", [(6, 2), (48, 6)])
def test_norm_linear_and_a_second_norm(channels: int, first: int, size: tuple[int, ...], layout: str) -> None:
    def plain(m: nn.ModuleList) -> Callable:
        def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            p, rest = m[1](m[0](x)).split([first, 2 * channels - first], dim=1)
            return p, *m[2](rest).chunk(2, dim=1)

        return function

    torch.manual_seed(0)
    norms = LayerNorm2d(channels, eps=0.3), LayerNorm2d(2 * channels - first, eps=1.7)
    modules = norms[0], nn.Conv2d(channels, 2 * channels, 1), norms[1]
    assert_same(
        lambda m: lambda x: norm_linear(x, m[0], m[1], first, then=m[2]),
        plain,
        shaken(nn.ModuleList(modules)),
        [maps(size[0], channels, *size[1:])],
        layout,
    )


@of_all_sizes
@in_all_layouts
@pytest.mark.parametrize("channels,hidden,residual,scaled", [(6, 19, True, True), (20, 80, False, False)])
def test_norm_mlp(channels: int, hidden: int, residual: bool, scaled: bool, size: tuple[int, ...], layout: str) -> None:
    torch.manual_seed(0)
    layers = LayerNorm2d(channels), ChannelLinear(channels, hidden), ChannelLinear(hidden, channels)
    assert_same(
        lambda m: lambda x: norm_mlp(x, *m, m.scale, residual=residual),
        lambda m: lambda x: m.times(m[2](F.gelu(m[1](m[0](x))))) + (x if residual else 0),
        shaken(Scaled(layers, channels if scaled else None)),
        [maps(size[0], channels, *size[1:])],
        layout,
    )


@of_all_sizes
@in_all_layouts
@pytest.mark.parametrize(
    "order,channels,residual,scaled",
    [(1, 6, True, True), (2, 20, False, True), (3, 20, True, False), (4, 96, False, False), (5, 16, True, True)],
)
def test_gated(order: int, channels: int, residual: bool, scaled: bool, size: tuple[int, ...], layout: str) -> None:
    widths = [channels // 2 ** (order - 1 - k) for k in range(order)]

    def plain(m: Scaled) -> Callable:
        def function(p: torch.Tensor, gates: torch.Tensor, *x: torch.Tensor) -> torch.Tensor:
            gate, *gates = gates.split(widths, dim=1)
            p = p * gate
            for linear, gate in zip(list(m)[:-1], gates, strict=True):
                p = linear(p) * gate
            return m.times(m[-1](p)) + (x[0] if residual else 0)

        return function

    torch.manual_seed(0)
    linears = [nn.Conv2d(c, 2 * c, 1) for c in widths[:-1]] + [nn.Conv2d(channels, channels, 1)]
    p_like = maps(size[0], channels, *size[1:])  # stands for x where there is no residual
    inputs = [maps(size[0], c, *size[1:], seed=c) for c in (widths[0], sum(widths), channels)[: 2 + residual]]
    assert_same(
        lambda m: lambda p, gates, x=p_like: gated(x, p, [gates], list(m), m.scale, residual=residual),
        plain,
        shaken(Scaled(linears, channels if scaled else None)),
        inputs,
        layout,
    )


@of_all_sizes
@in_all_layouts
@pytest.mark.parametrize("channels,residual", [(8, True), (48, False)])
def test_gated_after_a_norm(channels: int, residual: bool, size: tuple[int, ...], layout: str) -> None:
    """Of two maps whose channels alternate."""
    widths, filtered = [channels // 2, channels], 3 * channels // 2

    def plain(m: Scaled) -> Callable:
        def function(p: torch.Tensor, even: torch.Tensor, odd: torch.Tensor, *x: torch.Tensor) -> torch.Tensor:
            gates = 0.7 * m[2](torch.stack([even, odd], dim=2).flatten(1, 2))
            first, second = gates.split(widths, dim=1)
            return m.times(m[1](m[0](p * first) * second)) + (x[0] if residual else 0)

        return function

    def fused(m: Scaled) -> Callable:
        def function(p: torch.Tensor, even: torch.Tensor, odd: torch.Tensor, x: torch.Tensor = p_like) -> torch.Tensor:
            options = {"residual": residual, "norm": m[2], "factor": 0.7}
            return gated(x, p, [even, odd], [m[0], m[1]], m.scale, **options)

        return function

    torch.manual_seed(0)
    p_like = maps(size[0], channels, *size[1:])  # stands for x where there is no residual
    layers = nn.Conv2d(widths[0], channels, 1), nn.Conv2d(channels, channels, 1), LayerNorm2d(filtered, eps=1.7)
    all_widths = (widths[0], filtered // 2, filtered // 2, channels)[: 3 + residual]
    inputs = [maps(size[0], width, *size[1:], seed=seed) for seed, width in enumerate(all_widths)]
    assert_same(fused, plain, shaken(Scaled(layers, channels)), inputs, layout)


def test_gelu_and_its_slope_are_exact_however_large_the_activation() -> None:
    """LayerNorm gives its bias alone here, and the linear layers change nothing."""
    h = torch.cat([torch.linspace(-9, 9, 501), torch.tensor([-1e2, -1e4, -1e30, 1e2, 1e4])])
    norm, up, down = LayerNorm2d(len(h)), *(ChannelLinear(len(h), len(h)) for _ in range(2))
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.copy_(h)
        for layer in (up, down):
            layer.weight.copy_(torch.eye(len(h)))
            layer.bias.zero_()
    y = norm_mlp(torch.randn(1, len(h), 1, 1), norm, up, down, None, residual=False)
    y.sum().backward()
    exact = h.double().requires_grad_()
    F.gelu(exact).sum().backward()
    torch.testing.assert_close(y.double().flatten(), F.gelu(exact), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm.bias.grad.double(), exact.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("channels", [20, 768])
def test_norms_are_as_exact_as_the_librarys(channels: int, mean: float) -> None:
    norm, linear, x_BCHW = LayerNorm2d(channels), nn.Conv2d(channels, channels, 1), maps(2, channels, 5, 5) + mean
    nn.init.dirac_(linear.weight)
    nn.init.zeros_(linear.bias)
    ours, library = torch.cat(norm_linear(x_BCHW, norm, linear, 5), dim=1), norm(x_BCHW)
    exact = norm.double()(x_BCHW.double())
    assert (ours - exact).abs().max() < 2 * (library - exact).abs().max()


def test_a_pixels_values_depend_on_no_other_and_not_on_threads() -> None:
    block, between, x_BCHW = small_block(order=2), shaken(LayerNorm2d(30)), maps(3, 20, 7, 5)
    bad_BCHW, good = x_BCHW.clone(), torch.ones(3, 20, 7, 5, dtype=torch.bool)
    bad_BCHW[1, :, 2, 2], good[1, :, 1:4, 1:4] = math.nan, False  # the filter is 3×3

    def computed(x_BCHW: torch.Tensor) -> list[torch.Tensor]:
        """Values and gradient, with filters that are exact as well."""
        norm, mixer = block.norm1, block.gnconv
        leaf = x_BCHW.detach().requires_grad_()
        linears, options = [*mixer.pws, mixer.proj_out], {"residual": True}
        p_BPHW, q_BQHW = norm_linear(leaf, norm, mixer.proj_in, mixer.widths[0])
        y_BCHW = gated(leaf, p_BPHW, [q_BQHW], linears, block.gamma1, **options)
        p_BPHW, *halves = norm_linear(y_BCHW, norm, mixer.proj_in, mixer.widths[0], then=between)
        y_BCHW = gated(y_BCHW, p_BPHW, halves, linears, block.gamma1, norm=between, **options)
        z_BCHW = norm_mlp(y_BCHW, block.norm2, block.pwconv1, block.pwconv2, block.gamma2, residual=True)
        z_BCHW.square().sum().backward()
        return [z_BCHW.detach(), leaf.grad]

    torch.set_num_threads(1)
    alone = [torch.cat(parts) for parts in zip(*map(computed, x_BCHW.split(1)), strict=True)]
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert all(map(torch.equal, computed(x_BCHW), alone))
        for ours, exact in zip(computed(bad_BCHW), alone, strict=True):
            assert torch.equal(ours[good], exact[good]) and ours[1, :, 2, 2].isnan().all()


@pytest.mark.parametrize("forward,backward", [(1, 1), (2, 2), (3, 3), (1, 2), (3, 1)])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("options", [{}, GLOBAL])
def test_gradients_hardly_depend_on_threads(forward: int, backward: int, checkpointed: bool, options: dict) -> None:
    block = small_block(**options)
    x_BCHW = maps(3, block.norm1.weight.numel(), 11, 7)
    exact = copy.deepcopy(block).double()
    exact(x_BCHW.double()).square().sum().backward()
    torch.set_num_threads(forward)
    y_BCHW = checkpoint(block, x_BCHW, use_reentrant=False) if checkpointed else block(x_BCHW)
    torch.set_num_threads(backward)
    y_BCHW.square().sum().backward()
    for p, e in zip(block.parameters(), exact.parameters(), strict=True):
        assert_near(p.grad, e.grad)


@pytest.mark.parametrize("bound", [1, 2**40])
def test_however_few_threads_have_sums_of_their_own(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "MOST_BYTES", bound)
    torch.set_num_threads(3)
    assert_exact(small_block(**GLOBAL), maps(3, 24, 11, 7))


@pytest.mark.parametrize("options", [{}, GLOBAL])
def test_nothing_is_kept_without_gradients(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, room = [], pixelwise.room_for_tiles
    monkeypatch.setattr(pixelwise, "room_for_tiles", lambda *arguments: kept.append(room(*arguments)) or kept[-1])
    block = small_block(**options)
    x_BCHW = maps(3, block.norm1.weight.numel(), 11, 7)
    with torch.no_grad():
        block(x_BCHW)
    assert kept == [[], []]
    block(x_BCHW)
    assert all(t.numel() for tensors in kept[3:] for t in tensors)


@pytest.mark.parametrize("options", [{}, GLOBAL])
def test_an_empty_batch_has_gradients_of_zero(options: dict) -> None:
    block = small_block(**options)
    shape = 0, block.norm1.weight.numel(), 11, 7
    y_BCHW = block(maps(*shape))
    assert y_BCHW.shape == shape
    garbage = [torch.full((n,), math.nan) for n in range(1, 200)]  # what is freed may be what gradients are made of
    del garbage
    y_BCHW.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


@pytest.mark.parametrize("options", [{}, {"mixer": global_mixer(1)}])
def test_the_operations_keep_to_what_pytorch_expects_of_them(options: dict[str, Callable]) -> None:
    """With the arguments of a real step, so that the operations of the backward pass are checked too."""
    calls = {}

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def]
            if function.namespace == "hornet_lit":
                calls[function] = tree_map_only(torch.Tensor, lambda t: t.detach().clone(), arguments)
            return function(*arguments, **(keywords or {}))

    with Recording():
        small_block(dim=6, order=2, **options)(maps(2, 6, 3, 3)).sum().backward()
    names = {function.name().split("::")[1] for function in calls}
    assert names >= {f"{name}{way}" for name in ("norm_linear", "gates", "norm_mlp") for way in ("", "_backward")}
    for function, arguments in calls.items():
        torch.library.opcheck(function, arguments)


def test_what_was_kept_in_float32_may_come_back_rounded() -> None:
    """Hooks on saved tensors that convert floats make gradients less exact, and no worse."""
    block, x_BCHW = small_block(**GLOBAL), maps(3, 24, 11, 7)
    exact = copy.deepcopy(block).double()
    exact(x_BCHW.double()).square().sum().backward()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.bfloat16() if t.is_floating_point() else t, lambda t: t.float() if t.is_floating_point() else t
    ):
        y_BCHW = block(x_BCHW)
    y_BCHW.square().sum().backward()
    for p, e in zip(block.parameters(), exact.parameters(), strict=True):
        assert_near(p.grad, e.grad, 0.03)


@pytest.mark.parametrize("options", [{}, GLOBAL])
def test_what_was_kept_may_come_back_elsewhere_in_memory(options: dict) -> None:
    """Hooks on saved tensors (to disk, to another device) give copies, at any address."""

    def moved(t: torch.Tensor) -> torch.Tensor:
        return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)

    grads = []
    for unpack in (moved, lambda t: t):
        block = small_block(**options)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y_BCHW = block(maps(3, options.get("dim", 20), 11, 7))
        y_BCHW.square().sum().backward()
        grads.append([p.grad for p in block.parameters()])
    for a, b in zip(*grads, strict=True):
        assert_near(a, b)
