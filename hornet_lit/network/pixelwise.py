"""What HorNet does within a pixel, in three fused CPU operations, forward and backward: LayerNorm and a linear layer;
gnConv's gated interactions and output projection; LayerNorm, MLP and residual. Where they may run: see `fused`.

Given ``steps``, where no gradient is recorded, they add their kernel's call to those and do not make it: the maps they
give are filled when the steps run.

Shapes: B batch, C channels, H height, W width, N hidden channels, P channels of gnConv's p_0, Q = 2C - P.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from timm.layers import LayerNorm2d
from torch import nn
from torch.autograd.function import once_differentiable

from hornet_lit.network.fused import (
    fitting_scale,
    fitting_weight,
    lowered,
    pointers,
    raised,
    room_for_tiles,
    typed_call,
    vector,
    weights_type,
    workers,
)
from hornet_lit.network.layers import needed
from hornet_lit.network.native.arguments import Gates, Linear, Mlp, Norm, Pointers, map_like, pointer, rows
from hornet_lit.network.native.steps import Call, Steps
from hornet_lit.network.operations import operation

NewMap = Callable[[torch.Tensor, int, torch.dtype], torch.Tensor]

# LayerNorm and a linear layer, whose output is split in two: P channels, and the rest. If a second norm follows upon
# the rest, its halves are maps of their own. Parameters: weight (N, C), bias, the norm's two, the second norm's two.


@operation("norm_linear")
def _norm_linear(
    x_BCHW: torch.Tensor, parameters: Sequence[torch.Tensor], eps: Sequence[float], first: int, keep: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    call, maps, kept = _linear_call(x_BCHW, parameters, eps, first, keep)
    call.run(_pixels(x_BCHW), torch.get_num_threads())
    return maps, kept


def _linear_call(
    x_BCHW: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    eps: Sequence[float],
    first: int,
    keep: bool,
    new_map: NewMap = map_like,
) -> tuple[Call, list[torch.Tensor], list[torch.Tensor]]:
    maps, kept = _linear_outputs(x_BCHW, parameters, first, keep, new_map)
    x = rows(x_BCHW)
    if kept:
        kept[1].fill_(torch.get_num_threads())
    arguments = _linear_arguments(x, parameters, eps, first, maps, kept)
    arguments.b = pointer(parameters[1])
    return typed_call("linear_forward", (x, maps[0]), arguments, x, parameters, maps), maps, kept


def _pixels(x_BCHW: torch.Tensor) -> int:
    b, _, h, w = x_BCHW.shape
    return b * h * w


@_norm_linear.register_fake
def _(x_BCHW, parameters, eps, first, keep):  # type: ignore[no-untyped-def]
    return _linear_outputs(x_BCHW, parameters, first, keep)


def _linear_outputs(
    x_BCHW: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    first: int,
    keep: bool,
    new_map: NewMap = map_like,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    weight_NC, twice = parameters[0], len(parameters) > 4
    rest = weight_NC.shape[0] - first
    widths = [first, rest - rest // 2, rest // 2] if twice else [first, rest]
    kept = room_for_tiles(x_BCHW, rest, weight_NC.dtype, keep and twice)
    return [new_map(x_BCHW, width, weight_NC.dtype) for width in widths], kept


def _linear_arguments(
    x: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    eps: Sequence[float],
    first: int,
    maps: Sequence[torch.Tensor],
    kept: Sequence[torch.Tensor],
) -> Linear:
    (weight_NC, _, *norms), (p, q, *r) = parameters, maps
    arguments = Linear(K=x.shape[-1], N=weight_NC.shape[0], P=first, **pointers(x=x, w=weight_NC, p=p, q=q))
    arguments.norm = Norm(*map(pointer, norms[:2]), eps[0])
    if r:
        arguments.r, arguments.then = pointer(r[0]), Norm(*map(pointer, norms[2:]), eps[1])
        arguments.kept = pointer(kept[0]) if kept else None
    return arguments


@operation("norm_linear_backward")
def _norm_linear_backward(
    dmaps: Sequence[torch.Tensor],
    x_BCHW: torch.Tensor,
    kept: Sequence[torch.Tensor],
    parameters: Sequence[torch.Tensor],
    eps: Sequence[float],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    weight_NC, x, maps = parameters[0], rows(x_BCHW), [rows(dmap_BCHW) for dmap_BCHW in dmaps]
    threads = int(kept[1]) if kept else torch.get_num_threads()
    dx_BCHW, lengths = map_like(x_BCHW, x.shape[-1]), [vector.shape[0] for vector in parameters[1:]]
    dvectors = x.new_empty(sum(lengths), dtype=torch.float32)
    dw_NC = torch.empty_like(weight_NC, dtype=torch.float32)
    arguments = _linear_arguments(x, parameters, eps, maps[0].shape[-1], maps, kept)
    arguments.dx, arguments.dw, arguments.dvectors = map(pointer, (dx_BCHW, dw_NC, dvectors))
    sizes = x.numel() // x.shape[-1], threads, workers([weight_NC], threads)
    typed_call("linear_backward", (x, weight_NC), arguments).run(*sizes)
    return dx_BCHW, [dw_NC, *torch.split_with_sizes_copy(dvectors, lengths)]


@_norm_linear_backward.register_fake
def _(dmaps, x_BCHW, kept, parameters, eps):  # type: ignore[no-untyped-def]
    return map_like(x_BCHW, x_BCHW.shape[1]), [torch.empty_like(p, dtype=torch.float32) for p in parameters]


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BCHW, eps, first, dtype, *parameters):  # type: ignore[no-untyped-def]
        ctx.eps, ctx.sizes = eps, [p.shape for p in parameters]
        parameters = [lowered(p, dtype) for p in parameters]
        maps, kept = _norm_linear(x_BCHW, parameters, eps, first, True)
        ctx.kept = len(kept)
        ctx.save_for_backward(x_BCHW, *kept, *parameters)
        return tuple(maps)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dmaps):  # type: ignore[no-untyped-def]
        x_BCHW, *others = ctx.saved_tensors
        kept, parameters = others[: ctx.kept], others[ctx.kept :]
        dx_BCHW, dparameters = _norm_linear_backward(dmaps, x_BCHW, kept, parameters, ctx.eps)
        return dx_BCHW, None, None, None, *raised(dparameters, ctx.sizes)


def norm_linear(
    x_BCHW: torch.Tensor,
    norm: LayerNorm2d,
    linear: nn.Conv2d,
    first: int,
    then: LayerNorm2d | None = None,
    steps: Steps | None = None,
) -> Sequence[torch.Tensor]:
    """``linear(norm(x))``, its first ``first`` channels and the rest, as maps of their own.

    With ``then``, a norm of the rest, what that gives is two halves in place of the rest. The backward pass keeps x,
    and the rest before that norm.
    """
    norms = (norm,) if then is None else (norm, then)
    channels = linear.weight.shape[0]
    if then is not None and then.weight.shape[0] != channels - first:
        raise ValueError(f"{linear} gives {channels - first} channels to a norm of {then.weight.shape[0]}")
    vectors = [linear.bias, *(v for n in norms for v in (n.weight, n.bias))]
    weight_NC, dtype = fitting_weight(linear, (channels, x_BCHW.shape[1])), weights_type(x_BCHW)
    parameters, eps = [weight_NC, *map(vector, vectors)], [n.eps for n in norms]
    if needed(x_BCHW, *parameters):
        return _NormLinear.apply(x_BCHW, eps, first, dtype, *parameters)
    parameters = [lowered(p, dtype) for p in parameters]
    if steps is None:
        return _norm_linear(x_BCHW, parameters, eps, first, False)[0]
    call, maps, _ = _linear_call(x_BCHW, parameters, eps, first, False, steps.map_like)
    steps.calls.append(call)
    return maps


# LayerNorm, MLP and residual. Parameters: w1 (N, C), b1, w2 (C, N), b2, the scale, the norm's two.


@operation("norm_mlp")
def _norm_mlp(
    x_BCHW: torch.Tensor, parameters: Sequence[torch.Tensor], eps: float, residual: bool, keep: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    call, y_BCHW, hidden = _mlp_call(x_BCHW, parameters, eps, residual, keep)
    call.run(_pixels(x_BCHW), torch.get_num_threads())
    return y_BCHW, hidden


def _mlp_call(
    x_BCHW: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    eps: float,
    residual: bool,
    keep: bool,
    new_map: NewMap = map_like,
) -> tuple[Call, torch.Tensor, list[torch.Tensor]]:
    (w1_NC, b1_N, w2_CN, b2_C, scale_C, *norm), x = parameters, rows(x_BCHW)
    n, c = w1_NC.shape[0], x_BCHW.shape[1]
    y_BCHW, hidden = new_map(x_BCHW, c, x_BCHW.dtype), room_for_tiles(x_BCHW, n, w1_NC.dtype, keep)
    fields = pointers(x=x, w1=w1_NC, b1=b1_N, w2=w2_CN, b2=b2_C, scale=scale_C, y=y_BCHW)
    if keep:
        hidden[1].fill_(torch.get_num_threads())
        fields["h"] = pointer(hidden[0])
    arguments = Mlp(C=c, N=n, residual=residual, norm=Norm(*map(pointer, norm), eps), **fields)
    return typed_call("mlp_forward", (x, w1_NC), arguments, x, parameters, y_BCHW), y_BCHW, hidden


@_norm_mlp.register_fake
def _(x_BCHW, parameters, eps, residual, keep):  # type: ignore[no-untyped-def]
    w1_NC = parameters[0]
    return map_like(x_BCHW, x_BCHW.shape[1]), room_for_tiles(x_BCHW, w1_NC.shape[0], w1_NC.dtype, keep)


@operation("norm_mlp_backward")
def _norm_mlp_backward(
    dy_BCHW: torch.Tensor,
    x_BCHW: torch.Tensor,
    hidden: Sequence[torch.Tensor],
    parameters: Sequence[torch.Tensor],
    eps: float,
    residual: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    (w1_NC, _, w2_CN, b2_C, scale_C, *norm), x, dy = parameters, rows(x_BCHW), rows(dy_BCHW)
    n, c, threads = w1_NC.shape[0], x_BCHW.shape[1], int(hidden[1])
    dx_BCHW, dvectors = map_like(x_BCHW, c), x_BCHW.new_empty(n + 3 * c, dtype=torch.float32)
    dw1_NC, dw2_CN, dscale_C = (torch.empty_like(t, dtype=torch.float32) for t in (w1_NC, w2_CN, scale_C))
    fields = pointers(x=x, w1=w1_NC, w2=w2_CN, b2=b2_C, scale=scale_C, h=hidden[0], dy=dy)
    fields |= pointers(dx=dx_BCHW, dw1=dw1_NC, dw2=dw2_CN, dvectors=dvectors, dscale=dscale_C)
    arguments = Mlp(C=c, N=n, residual=residual, norm=Norm(*map(pointer, norm), eps), **fields)
    sizes = x.numel() // c, threads, workers([w1_NC, w2_CN], threads)
    typed_call("mlp_backward", (x, w1_NC), arguments).run(*sizes)
    db1_N, db2_C, *dnorm = torch.split_with_sizes_copy(dvectors, [n, c, c, c])
    return dx_BCHW, [dw1_NC, db1_N, dw2_CN, db2_C, dscale_C, *dnorm]


@_norm_mlp_backward.register_fake
def _(dy_BCHW, x_BCHW, hidden, parameters, eps, residual):  # type: ignore[no-untyped-def]
    return map_like(x_BCHW, x_BCHW.shape[1]), [torch.empty_like(p, dtype=torch.float32) for p in parameters]


class _NormMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BCHW, eps, residual, dtype, *parameters):  # type: ignore[no-untyped-def]
        ctx.eps, ctx.residual, ctx.sizes = eps, residual, [p.shape for p in parameters]
        parameters = [lowered(p, dtype) for p in parameters]
        y_BCHW, hidden = _norm_mlp(x_BCHW, parameters, eps, residual, True)
        ctx.save_for_backward(x_BCHW, *hidden, *parameters)
        return y_BCHW

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BCHW):  # type: ignore[no-untyped-def]
        x_BCHW, tiles, threads, *parameters = ctx.saved_tensors
        hidden = tiles, threads
        dx_BCHW, dparameters = _norm_mlp_backward(dy_BCHW, x_BCHW, hidden, parameters, ctx.eps, ctx.residual)
        return dx_BCHW, None, None, None, *raised(dparameters, ctx.sizes)


def norm_mlp(
    x_BCHW: torch.Tensor,
    norm: LayerNorm2d,
    up: nn.Linear,
    down: nn.Linear,
    scale_C: torch.Tensor | None,
    *,
    residual: bool,
    steps: Steps | None = None,
) -> torch.Tensor:
    """``scale ⊙ down(GELU(up(norm(x))))``, plus x if ``residual``. The backward pass keeps x and up's output."""
    n, c = up.weight.shape[0], x_BCHW.shape[1]
    w1_NC, w2_CN, dtype = fitting_weight(up, (n, c)), fitting_weight(down, (c, n)), weights_type(x_BCHW)
    b1_N, b2_C, *norms = map(vector, (up.bias, down.bias, norm.weight, norm.bias))
    parameters = w1_NC, b1_N, w2_CN, b2_C, fitting_scale(scale_C, x_BCHW), *norms
    if needed(x_BCHW, *parameters):
        return _NormMlp.apply(x_BCHW, norm.eps, residual, dtype, *parameters)
    parameters = [lowered(p, dtype) for p in parameters]
    if steps is None:
        return _norm_mlp(x_BCHW, parameters, norm.eps, residual, False)[0]
    call, y_BCHW, _ = _mlp_call(x_BCHW, parameters, norm.eps, residual, False, steps.map_like)
    steps.calls.append(call)
    return y_BCHW


# gnConv's gated interactions and output projection. What the filter gave is one map, or two whose channels alternate
# and go through a norm first. Vectors: the layers' biases, the scale, the norm's two.


@operation("gates")
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
    call.run(_pixels(p_BPHW), torch.get_num_threads())
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


@operation("gates_backward")
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
    typed_call("gates_backward", (dy, p), arguments).run(_pixels(p_BPHW), threads, workers(weights, threads))
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
