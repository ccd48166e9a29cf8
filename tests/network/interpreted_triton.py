"""The Triton kernels in Triton's interpreter, on the CPU: run by test_triton.py in a process of its own, since Triton
decides on being imported whether it interprets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import Mock, patch

import torch
import torch.nn.functional as F
from torch import Tensor

from hornet_lit.network import depthwise, triton_depthwise
from hornet_lit.network.depthwise import depthwise_conv2d

TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
# B, C, H, W and K: channels that fill no tile, single pixels, kernels wider than the map, more pixels than one share.
CASES = [((2, 40, 9, 5), 7), ((1, 17, 12, 3), 5), ((2, 1, 1, 1), 3), ((1, 3, 4, 1), 3), ((1, 33, 8, 13), 11)]
CASES += [((1, 32, 24, 24), 3)]


def gradients(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, *, ours: bool) -> list[Tensor]:
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)]
    k = weight.shape[-1]
    y = depthwise_conv2d(*leaves) if ours else F.conv2d(*leaves, padding=k // 2, groups=len(weight))
    y.backward(grad)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@contextmanager
def calls() -> Iterator[tuple[Mock, Mock]]:
    names = ("convolve", "weight_grad")
    convolve, weight_grad = (Mock(wraps=getattr(triton_depthwise, name)) for name in names)
    with patch.multiple(triton_depthwise, convolve=convolve, weight_grad=weight_grad):
        yield convolve, weight_grad


def main() -> None:
    depthwise.TRITON_DEVICE, depthwise.TRITON = "cpu", frozenset({"forward", "weight_grad"})
    assert type(triton_depthwise.convolve_kernel).__name__ == "InterpretedFunction"
    for dtype, tolerance in TOLERANCES.items():
        for (b, c, h, w), k in CASES if dtype == torch.float32 else CASES[:2]:
            torch.manual_seed(0)
            x, grad = (torch.randn(b, c, h, w).to(dtype) for _ in range(2))
            if h == 9:  # as gnConv's q: some of the channels of a channels-last map
                x = torch.randn(b, c + 8, h, w).to(dtype).contiguous(memory_format=torch.channels_last)[:, 8:]
            weight, bias = torch.randn(c, 1, k, k).to(dtype), torch.randn(c).to(dtype)
            with calls() as (convolve, weight_grad):
                found = gradients(x, weight, bias, grad, ours=True)
            assert (convolve.call_count, weight_grad.call_count) == (2, 1), "the library's values"
            exact = gradients(*(t.double() for t in (x, weight, bias, grad)), ours=False)
            for name, a, e in zip(("y", "x", "weight", "bias"), found, exact, strict=True):
                error = ((a.double() - e).abs().max() / e.abs().max()).item()
                assert a.dtype == dtype and a.shape == e.shape and error <= tolerance, (
                    name,
                    dtype,
                    b,
                    c,
                    h,
                    w,
                    k,
                    error,
                )
    x, weight, bias = (t.detach().float() for t in (x, weight, bias))
    expected = F.conv2d(x, weight, bias, padding=k // 2, groups=c)
    compiled = torch.compile(depthwise_conv2d, backend="aot_eager", fullgraph=True)
    for function, trained in ((depthwise_conv2d, False), (depthwise_conv2d, True), (compiled, False), (compiled, True)):
        with calls() as (convolve, _):
            y = function(x, weight.requires_grad_(trained), bias)
        assert convolve.call_count == 1
        torch.testing.assert_close(y, expected)
    depthwise_conv2d(x, weight.requires_grad_(False), bias.requires_grad_()).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full_like(bias, y[:, 0].numel()))
    print("the same")


if __name__ == "__main__":
    main()
