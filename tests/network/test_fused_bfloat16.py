"""The fused CPU operations in bfloat16: alone, and under autocast beside float32 maps and parameters ("mixed")."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from hornet_lit.network import fused
from tests.network.conftest import FORWARD, GLOBAL, assert_near, maps, needs_kernels, small_block, with_gradients

pytestmark = [needs_kernels, pytest.mark.usefixtures("threads_as_found")]
MIXED = [name.replace("f32", "mixed") for name in FORWARD]
BACK = [name.replace("forward", "backward") for name in reversed(MIXED)]
# Channels, order, hidden over outer width: even; odd to the first gate; an odd map; odd hidden channels.
SIZES = [(20, 1, 4.0), (48, 4, 4.0), (6, 2, 4.0), (7, 1, 4.0), (6, 2, 3.2)]


def in_both_ways(computed: Callable[[], list[torch.Tensor]], patch: pytest.MonkeyPatch) -> list[list[torch.Tensor]]:
    """``computed()`` by the kernels, and by the library."""
    ours = computed()
    with patch.context() as context:
        context.setattr(fused, "_built", lambda low: False)
        return [ours, computed()]


def autocast(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(x_BCHW)

    return forward


def gradients(
    block: nn.Module, x_BCHW: torch.Tensor, patch: pytest.MonkeyPatch, mode: str = "mixed"
) -> list[list[torch.Tensor]]:
    """Values and gradients by the kernels and by the library, and in float64."""
    double, low = copy.deepcopy(block).double(), copy.deepcopy(block).bfloat16()

    def computed() -> list[torch.Tensor]:
        block.zero_grad()
        low.zero_grad()
        if mode == "bf16":
            return with_gradients(low, low, x_BCHW.bfloat16())
        return with_gradients(autocast(block), block, x_BCHW)

    return [*in_both_ways(computed, patch), with_gradients(double, double, x_BCHW.double())]


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Of all tensors alike, small and large ones."""
    assert all(torch.isfinite(t).all() for t in found)
    each = [((f.double() - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True)]
    return sum(each) / len(each)


@pytest.mark.parametrize("mode", ["bf16", "mixed"])
@pytest.mark.parametrize("dim,order,ratio", SIZES)
def test_values_err_no_more_than_the_librarys(
    dim: int, order: int, ratio: float, mode: str, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, x_BCHW = small_block(dim, order, mlp_ratio=ratio), maps(3, dim, 7, 5)
    exact = copy.deepcopy(block).double()(x_BCHW.double())
    forward = copy.deepcopy(block).bfloat16() if mode == "bf16" else autocast(block)
    inputs = x_BCHW.bfloat16() if mode == "bf16" else x_BCHW
    with torch.no_grad():
        ours, theirs = in_both_ways(lambda: [forward(inputs)], monkeypatch)
    assert ours[0].dtype == theirs[0].dtype == (torch.bfloat16 if mode == "bf16" else torch.float32)
    assert error(ours, [exact]) < min(1e-2, 1.1 * error(theirs, [exact]))
    assert ran == [name.replace("mixed", mode) for name in MIXED]


@pytest.mark.parametrize("mode", ["bf16", "mixed"])
@pytest.mark.parametrize("dim,order,ratio", SIZES)
def test_gradients_err_no_more_than_the_librarys(
    dim: int, order: int, ratio: float, mode: str, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, x_BCHW = small_block(dim, order, mlp_ratio=ratio), maps(5, dim, 14, 13)
    ours, theirs, exact = gradients(block, x_BCHW, monkeypatch, mode)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    assert error(ours, exact) < min(2e-2, 1.1 * error(theirs, exact))
    assert ran == [name.replace("mixed", mode) for name in MIXED + BACK]


def test_gradients_of_weights_are_not_rounded() -> None:
    """Autocast's own are, to bfloat16 on their way back to a float32 parameter."""
    block = small_block(7, 1)
    autocast(block)(maps(5, 7, 14, 13)).square().sum().backward()
    for name in ("gnconv.proj_in", "gnconv.proj_out", "pwconv1", "pwconv2"):
        grad = block.get_submodule(name).weight.grad
        assert grad.dtype == torch.float32 and (grad != grad.bfloat16()).float().mean() > 0.9


def test_weights_may_be_in_autocasts_type_already(ran: list[str]) -> None:
    """As those of linear layers are that FSDP2 gathers in bfloat16."""
    results = []
    for gathered in (False, True):
        block = small_block()
        for module in block.modules():
            if gathered and (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)):
                module.bfloat16()
        results.append(with_gradients(autocast(block), block, maps(3, 20, 7, 5)))
    assert ran == 2 * (MIXED + BACK)
    assert {t.dtype for t in results[1]} == {torch.float32, torch.bfloat16}
    for a, b in zip(*results, strict=True):
        assert_near(a, b, 0.01)


def test_maps_larger_than_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are written past them, if their pixels are whole lines of memory."""
    block, x_BCHW = small_block(64, 2), maps(1, 64, 130, 131)
    ours, theirs, exact = gradients(block, x_BCHW, monkeypatch)
    assert error(ours, exact) < min(2e-2, 1.1 * error(theirs, exact))


@pytest.mark.parametrize("mode", ["bf16", "mixed"])
def test_a_global_filter(mode: str, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    block, x_BCHW = small_block(**GLOBAL), maps(5, 24, 11, 7)
    ours, theirs, exact = gradients(block, x_BCHW, monkeypatch, mode)
    assert error(ours, exact) < min(2e-2, 1.1 * error(theirs, exact))
    assert ran == [name.replace("mixed", mode) for name in MIXED + BACK]


@pytest.mark.parametrize("gamma", [0.5, None])
def test_a_stages_first_map_is_promoted_as_the_residual_would_be(
    gamma: float | None, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast a convolution's output is bfloat16, and only γ promotes the sum."""
    block, x_BCHW = small_block(ls_init_value=gamma), maps(3, 20, 7, 5).bfloat16()
    ours, theirs, exact = gradients(block, x_BCHW, monkeypatch)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    assert error(ours, exact) < min(2e-2, 1.1 * error(theirs, exact))
    assert ran == (MIXED + BACK if gamma else [])


@pytest.mark.parametrize("trained", ["gamma1", "gamma2", "gnconv.dwconv.weight", "pwconv1.bias", "gnconv.pws.0.weight"])
@pytest.mark.parametrize("mode", ["bf16", "mixed"])
def test_gradients_of_little(trained: str, mode: str) -> None:
    block, x_BCHW = small_block(48), maps(2, 48, 7, 5)
    for name, p in block.named_parameters():
        p.requires_grad_(name == trained)
    exact = copy.deepcopy(block).double()
    exact(x_BCHW.double()).square().sum().backward()
    y_BCHW = block.bfloat16()(x_BCHW.bfloat16()) if mode == "bf16" else autocast(block)(x_BCHW)
    y_BCHW.float().square().sum().backward()
    assert_near(block.get_parameter(trained).grad, exact.get_parameter(trained).grad, 0.05)


def test_a_pixel_does_not_depend_on_its_neighbours_or_the_threads() -> None:
    block, x_BCHW = small_block(), maps(3, 20, 11, 7)
    forward = autocast(small_block(mixer=lambda dim, size: nn.Conv2d(dim, dim, 1)))  # its MLP alone is fused
    torch.set_num_threads(1)
    alone = torch.cat([forward(x) for x in x_BCHW.split(1)])
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(forward(x_BCHW), alone)
        y_BCHW = autocast(block)(x_BCHW)
        y_BCHW.square().sum().backward()
    assert torch.isfinite(block.pwconv1.weight.grad).all()


@pytest.mark.parametrize("mode", ["bf16", "mixed"])
def test_compiled_in_one_graph(mode: str, ran: list[str]) -> None:
    block, x_BCHW, results = small_block(6, 2), maps(3, 6, 7, 5), []
    block, x_BCHW = (block.bfloat16(), x_BCHW.bfloat16()) if mode == "bf16" else (block, x_BCHW)
    for f in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
        block.zero_grad()
        results.append(with_gradients(f if mode == "bf16" else autocast(f), block, x_BCHW))
    for a, b in zip(*results, strict=True):
        assert_near(a, b, 1e-5)
    assert ran == 2 * [name.replace("mixed", mode) for name in MIXED + BACK]


@pytest.mark.parametrize("options", [{}, GLOBAL])
def test_what_was_kept_may_come_back_elsewhere_in_memory(options: dict) -> None:
    grads = []
    for unpack in (lambda t: torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t), lambda t: t):
        block = small_block(**options)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y_BCHW = autocast(block)(maps(3, options.get("dim", 20), 11, 7))
        y_BCHW.square().sum().backward()
        grads.append([p.grad for p in block.parameters()])
    for a, b in zip(*grads, strict=True):
        assert_near(a, b)
