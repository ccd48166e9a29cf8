"""The Triton kernels in Triton's interpreter, on the CPU: run by test_triton.py in a process of its own, since Triton
decides on being imported whether it interprets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hornet_lit.network import depthwise
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


def main() -> None:
    depthwise.TRITON_DEVICE, depthwise.TRITON = "cpu", frozenset({"forward", "weight_grad"})
    assert type(depthwise._triton().convolve_kernel).__name__ == "InterpretedFunction"
    for dtype, tolerance in TOLERANCES.items():
        for (b, c, h, w), k in CASES:
            torch.manual_seed(0)
            x, grad = (torch.randn(b, c, h, w).to(dtype) for _ in range(2))
            if h == 9:  # as gnConv's q: some of the channels of a channels-last map
                x = torch.randn(b, c + 8, h, w).to(dtype).contiguous(memory_format=torch.channels_last)[:, 8:]
            weight, bias = torch.randn(c, 1, k, k).to(dtype), torch.randn(c).to(dtype)
            found = gradients(x, weight, bias, grad, ours=True)
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
    with torch.no_grad():
        y = depthwise_conv2d(x.float(), weight.float(), None)
        torch.testing.assert_close(y, F.conv2d(x.float(), weight.float(), None, padding=k // 2, groups=c))
    weight.requires_grad_()
    compiled = torch.compile(depthwise_conv2d, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, weight, bias), depthwise_conv2d(x, weight, bias))
    print("the same")


if __name__ == "__main__":
    main()
