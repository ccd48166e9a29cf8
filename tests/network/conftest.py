"""What the tests of the fused CPU operations share: blocks, maps, comparisons with float64, which is never fused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import pytest
import torch
from torch import nn

from hornet_lit.network import DepthwiseConv, GlobalLocalFilter, GnConv, HorNet, fused
from hornet_lit.network.block import Block
from hornet_lit.network.native.steps import Call, Steps

needs_kernels = pytest.mark.skipif(not fused._built(True), reason="no compiler, or neither AVX2 nor AVX-512")
FORWARD = ["linear_forward_f32", "gates_forward_f32", "mlp_forward_f32"]
M = TypeVar("M", bound=nn.Module)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels of what stays within a pixel that were called, at once or in turn."""
    names, run, run_all = [], Call.run, Steps.run

    def note(call: Call) -> None:
        if call.name.startswith("pixelwise"):
            names.append(call.kernel)

    def noted(call: Call, *sizes: int) -> None:
        note(call)
        run(call, *sizes)

    def all_noted(steps: Steps, x_BCHW: torch.Tensor) -> None:
        for call in steps.calls:
            note(call)
        run_all(steps, x_BCHW)

    monkeypatch.setattr(Call, "run", noted)
    monkeypatch.setattr(Steps, "run", all_noted)
    return names


@pytest.fixture
def threads_as_found() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def shaken(module: M) -> M:
    """No weight at its initial value, so that none drops out of a result."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1 if p.ndim == 1 else 0.3 * p[0].numel() ** -0.5)
    return module


def small_block(dim: int = 20, order: int = 3, **options) -> Block:
    torch.manual_seed(0)
    mixer = partial(GnConv, order=order, filter=partial(DepthwiseConv, kernel_size=3))
    return shaken(Block(dim, **{"size": (7, 5), "mixer": mixer, "ls_init_value": 0.5} | options))


def global_mixer(order: int) -> Callable[..., GnConv]:
    return partial(GnConv, order=order, filter=partial(GlobalLocalFilter, scale=0.7))


GLOBAL = {"dim": 24, "mixer": global_mixer(3), "size": (11, 7)}  # for `small_block`


def small_network(**options) -> HorNet:
    torch.manual_seed(0)
    mixers = [partial(GnConv, order=o, filter=DepthwiseConv) for o in (2, 3)]
    defaults = {"depths": (1, 1), "base_dim": 12, "img_size": 16, "num_classes": 5, "ls_init_value": 0.5}
    return shaken(HorNet(**{"mixers": mixers, "stem_stride": 2} | defaults | options))


def maps(*shape: int, seed: int = 2) -> torch.Tensor:
    """A channels-last map of random numbers, always the same."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.contiguous(memory_format=torch.channels_last)


def doubled(path: str, how: str) -> Callable[[Block], None]:
    """Doubles what a module of the block takes or gives, by a hook or a ``forward`` of its own."""

    def change(block: Block) -> None:
        module = block.get_submodule(path)
        if how == "hook":
            module.register_forward_hook(lambda module, inputs, output: 2 * output)
        elif how == "pre-hook":
            module.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
        else:
            module.forward = lambda x, **options: 2 * type(module).forward(module, x, **options)

    return change


def replaced(path: str, make: Callable) -> Callable[[Block], None]:
    """Puts ``make(what was there)`` into the block."""

    def change(block: Block) -> None:
        parent, _, name = path.rpartition(".")
        module = block.get_submodule(parent)
        torch.manual_seed(0)
        new = make(getattr(module, name))
        setattr(module, name, shaken(new) if isinstance(new, nn.Module) else new)

    return change


def one_for_all(p: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(p.detach()[:1].expand(p.shape))


def assert_near(ours: torch.Tensor | None, exact: torch.Tensor | None, tolerance: float = 1e-5) -> None:
    """Up to ``tolerance`` of the largest value."""
    assert (ours is None) == (exact is None)
    if ours is not None:
        assert ours.shape == exact.shape
        scale = exact.abs().max().item() if exact.numel() else 0.0
        torch.testing.assert_close(ours.double(), exact.double(), rtol=0, atol=tolerance * scale + 1e-12)


def with_gradients(
    f: Callable, module: nn.Module, *inputs: torch.Tensor, layout: Callable[[torch.Tensor], torch.Tensor] = lambda t: t
) -> list[torch.Tensor]:
    """What ``f(*inputs)`` gives, and the gradients of all inputs and parameters for one of ``layout``."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = f(*leaves)
    outputs: Sequence[torch.Tensor] = outputs if isinstance(outputs, tuple | list) else (outputs,)
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, [layout(g) for g in grads])
    return [*(y.detach() for y in outputs), *(t.grad for t in leaves), *(p.grad for p in module.parameters())]


def assert_exact(module: nn.Module, x_BCHW: torch.Tensor) -> None:
    """Values and all gradients against those of the same module in float64."""
    double = copy.deepcopy(module).double()
    ours, exact = with_gradients(module, module, x_BCHW), with_gradients(double, double, x_BCHW.double())
    for a, b in zip(ours, exact, strict=True):
        assert_near(a, b)
