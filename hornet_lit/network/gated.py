"""gnConv's gated interactions and output projection, in one fused CPU operation, forward and backward.

Where it may run: see `fused`; what ``steps`` are: see `pixelwise`.

Shapes: B batch, C channels, H height, W width, P channels of gnConv's p_0, Q = 2C - P.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import LayerNorm2d
from torch import nn
from torch.autograd.function import once_differentiable

from hornet_lit.network.fused import (
    fitting_scale,
    fitting_weight,
    lowered,
    pixels,
    raised,
    typed_call,
    vector,
    workers,
)
from hornet_lit.network.layers import needed
from hornet_lit.network.native.arguments import Gates, NewMap, Norm, Pointers, map_like, pointer, rows
from hornet_lit.network.native.steps import Call, Steps
from hornet_lit.network.operations import operation

# What the filter gave is one map, or two whose channels alternate and go through a norm first. Vectors: the layers'
# biases, the scale, the norm's two.


@operation("gates", maps=2)
def _gates(
    p_BPHW: torch.Tensor,
    gates: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    vectors: Sequence[torch.Tensor],
    eps: float,
    x_BCHW: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    call, y_BCHW = _gates_call(p_BPHW, gates, weights, vectors, eps, x_BCHW, dtype)
    call.run(pixels(p_BPHW), torch.get_num_threads())
    return y_BCHW


def _gates_call(
    p_BPHW: torch.Tensor,
    gates: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    vectors: Sequence[torch.Tensor],
    eps: float,
    x_BCHW: torch.Tensor | None,
    dtype: torch.dtype,
    new_map: NewMap = map_like,
) -> tuple[Call, torch.Tensor]:
    p, each, x = rows(p_BPHW), [rows(gate) for gate in gates], None if x_BCHW is None else rows(x_BCHW)
    y_BCHW = new_map(p_BPHW, weights[-1].shape[0], dtype)
    arguments = _gates_arguments(p, each, weights, vectors, eps)
    arguments.x, arguments.y = pointer(x), pointer(y_BCHW)
    return typed_call("gates_forward", (y_BCHW, p), arguments, p, each, weights, vectors, x, y_BCHW), y_BCHW


@_gates.register_fake
def _(p_BPHW, gates, weights, vectors, eps, x_BCHW, dtype):  # type: ignore[no-untyped-def]
    return map_like(p_BPHW, weights[-1].shape[0], dtype)


def _gates_arguments(
    p: torch.Tensor,
    gates: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    vectors: Sequence[torch.Tensor],
    eps: float,
) -> Gates:
    *biases, scale_C = vectors[: len(weights) + 1]
    arguments = Gates(C=scale_C.shape[0], order=len(weights), first=p.shape[-1], scale=pointer(scale_C))
    arguments.p, arguments.gates = pointer(p), pointer(gates[0])
    arguments.w, arguments.b = Pointers(*map(pointer, weights)), Pointers(*map(pointer, biases))
    if norm := vectors[len(weights) + 1 :]:
        arguments.others, arguments.norm = pointer(gates[1]), Norm(*map(pointer, norm), eps)
    return arguments


@operation("gates_backward", maps=3)
def _gates_backward(
    dy_BCHW: torch.Tensor,
    p_BPHW: torch.Tensor,
    gates: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    vectors: Sequence[torch.Tensor],
    eps: float,
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    p, each, dy, threads = rows(p_BPHW), [rows(gate) for gate in gates], rows(dy_BCHW), torch.get_num_threads()
    dmaps = [map_like(p_BPHW, t.shape[-1]) for t in (p, *each)]
    dws, order = [torch.empty_like(w, dtype=torch.float32) for w in weights], len(weights)
    biases, norm = [b.shape[0] for b in vectors[:order]], [v.shape[0] for v in vectors[order + 1 :]]
    dvectors, dscale_C = dy.new_empty(sum(biases + norm), dtype=torch.float32), torch.empty_like(vectors[order])
    arguments = _gates_arguments(p, each, weights, vectors, eps)
    arguments.dy, arguments.dp, arguments.dgates = pointer(dy), pointer(dmaps[0]), pointer(dmaps[1])
    arguments.dothers = pointer(dmaps[2]) if norm else None
    arguments.dw = Pointers(*map(pointer, dws))
    arguments.dvectors, arguments.dscale = pointer(dvectors), pointer(dscale_C)
    typed_call("gates_backward", (dy, p), arguments).run(pixels(p_BPHW), threads, workers(weights, threads))
    each_vector = list(torch.split_with_sizes_copy(dvectors, biases + norm))
    each_vector.insert(order, dscale_C)
    return dmaps, dws, each_vector


@_gates_backward.register_fake
def _(dy_BCHW, p_BPHW, gates, weights, vectors, eps):  # type: ignore[no-untyped-def]
    dmaps = [map_like(p_BPHW, t.shape[1]) for t in (p_BPHW, *gates)]
    dws = [torch.empty_like(w, dtype=torch.float32) for w in weights]
    return dmaps, dws, [torch.empty_like(v) for v in vectors]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sizes, eps, x_BCHW, p_BPHW, dtype, *others):  # type: ignore[no-untyped-def]
        ctx.sizes, ctx.eps, ctx.residual = sizes, eps, x_BCHW is not None
        gates, weights, vectors = _parted(others, sizes)
        ctx.weights = [w.shape for w in weights]
        weights = [lowered(w, p_BPHW.dtype) for w in weights]
        ctx.save_for_backward(p_BPHW, *gates, *weights, *vectors)
        return _gates(p_BPHW, gates, weights, vectors, eps, x_BCHW, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BCHW):  # type: ignore[no-untyped-def]
        p_BPHW, *others = ctx.saved_tensors
        (dp_BPHW, *dgates), dws, dvectors = _gates_backward(dy_BCHW, p_BPHW, *_parted(others, ctx.sizes), ctx.eps)
        dx_BCHW = dy_BCHW if ctx.residual else None
        return None, None, dx_BCHW, dp_BPHW, None, *dgates, *raised(dws, ctx.weights), *dvectors


def _parted(tensors: Sequence[torch.Tensor], sizes: tuple[int, int]) -> list[Sequence[torch.Tensor]]:
    """Gates, weights and vectors."""
    maps, layers = sizes
    return [tensors[:maps], tensors[maps : maps + layers], tensors[maps + layers :]]


def gated(
    x_BCHW: torch.Tensor,
    p_BPHW: torch.Tensor,
    gates: Sequence[torch.Tensor],
    linears: Sequence[nn.Conv2d],
    scale_C: torch.Tensor | None,
    *,
    residual: bool,
    norm: LayerNorm2d | None = None,
    factor: float = 1.0,
    steps: Steps | None = None,
) -> torch.Tensor:
    """gnConv's equation (3.4) from p_0 and all filtered q on: gates, ``linears`` g_1 … and φ_out, times ``scale``.

    Plus x if ``residual``; in any case of x's type. ``gates`` is the map (B, Q, H, W), or with ``norm`` two whose
    channels alternate, which go through that norm and times ``factor`` first. The backward pass keeps p_0 and
    ``gates``, and computes the rest again.
    """
    expected = x_BCHW.shape[0], (2 * x_BCHW.shape[1] - p_BPHW.shape[1]) // len(gates), *x_BCHW.shape[2:]
    for gate in gates:
        if gate.shape != expected:
            raise ValueError(f"a filter must keep its map's shape {expected}, this one gave {tuple(gate.shape)}")
    if norm is not None and norm.weight.shape[0] != len(gates) * expected[1]:
        raise ValueError(f"{len(gates) * expected[1]} channels do not fit a norm of {norm.weight.shape[0]}")
    widths = [p_BPHW.shape[1] << k for k in range(len(linears))]
    sizes = [*zip(widths[1:], widths[:-1], strict=True), (x_BCHW.shape[1], widths[-1])]
    weights = [fitting_weight(m, size) for m, size in zip(linears, sizes, strict=True)]
    vectors = [*(vector(m.bias) for m in linears), fitting_scale(scale_C, x_BCHW)]
    if norm is not None:
        vectors += [vector(norm.weight * factor), vector(norm.bias * factor)]
    gates, eps = [gate.to(p_BPHW.dtype) for gate in gates], 0.0 if norm is None else norm.eps
    stream, dtype = x_BCHW if residual else None, x_BCHW.dtype
    if needed(x_BCHW, p_BPHW, *gates, *weights, *vectors):
        counts = len(gates), len(weights)
        return _Gated.apply(counts, eps, stream, p_BPHW, dtype, *gates, *weights, *vectors)
    weights = [lowered(w, p_BPHW.dtype) for w in weights]
    if steps is None:
        return _gates(p_BPHW, gates, weights, vectors, eps, stream, dtype)
    call, y_BCHW = _gates_call(p_BPHW, gates, weights, vectors, eps, stream, dtype, steps.map_like)
    steps.calls.append(call)
    return y_BCHW
