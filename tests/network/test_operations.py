"""Operations of our own: called as they are, and as custom ops by whoever must see them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from hornet_lit.network.operations import operation

NAME = "hornet_lit::scaled_for_tests"


@pytest.fixture(scope="module")
def scaled() -> Callable[[torch.Tensor, float], torch.Tensor]:
    @operation("scaled_for_tests")
    def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
        called.append(type(x))
        return x * factor

    @scaled.register_fake
    def _(x: torch.Tensor, factor: float) -> torch.Tensor:
        return torch.empty_like(x)

    return scaled


called: list[type] = []


def test_a_plain_call_is_no_custom_op(scaled: Callable) -> None:
    called.clear()
    with torch.no_grad():
        assert torch.equal(scaled(torch.ones(3), 2.0), torch.full((3,), 2.0))
    assert called == [torch.Tensor]


def test_modes_and_profilers_see_the_custom_op(scaled: Callable) -> None:
    seen = []

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def]
            seen.append(function.name())
            return function(*arguments, **(keywords or {}))

    x = torch.ones(3)
    with Seeing():
        scaled(x, 2.0)
    assert seen[0] == NAME
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        scaled(torch.ones(3), 2.0)
    assert NAME in {event.key for event in profile.key_averages()}


def test_graphs_hold_the_custom_op(scaled: Callable) -> None:
    graph = make_fx(lambda x: scaled(x, 2.0))(torch.ones(3)).graph
    assert NAME.replace("::", ".") + ".default" in {str(node.target) for node in graph.nodes}
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: scaled(x, 2.0) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 3.0))


def test_tensors_without_data_are_not_touched(scaled: Callable) -> None:
    called.clear()
    with FakeTensorMode():
        fake = torch.empty(3)
        assert scaled(fake, 2.0).shape == (3,)
    assert scaled(fake, 2.0).shape == (3,)  # the mode is off, the tensor still of its type
    assert scaled(torch.empty(3, device="meta"), 2.0).shape == (3,)
    assert not called
