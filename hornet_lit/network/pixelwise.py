"""What HorNet does within a pixel, in fused CPU operations, forward and backward: LayerNorm and a linear layer;
LayerNorm, MLP and residual. The third is `gated`. Where they may run: see `fused`.

Given ``steps``, where no gradient is recorded, they add their kernel's call to those and do not make it: the maps they
give are filled when the steps run.

Shapes: B batch, C channels, H height, W width, N channels out or hidden, P channels of gnConv's p_0.
"""

from __future__ import annotations

import math
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
    pointers,
    raised,
    room_for_tiles,
    typed_call,
    vector,
    weights_type,
    workers,
)
from hornet_lit.network.layers import needed
from hornet_lit.network.native.arguments import Linear, Mlp, NewMap, Norm, map_like, pointer, rows
from hornet_lit.network.native.steps import Call, Steps
from hornet_lit.network.operations import operation

# LayerNorm and a linear layer, whose output is split in two: P channels, and the rest. If a second norm follows upon
# the rest, its halves are maps of their own. The layer may take the S × S pixels of a patch side by side, each normed
# by itself. Parameters: weight (N, K = S²C), bias, the norm's two, the second norm's two.


@operation("norm_linear")
def _norm_linear(
    x_BCHW: torch.Tensor, parameters: Sequence[torch.Tensor], eps: Sequence[float], first: int, keep: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    call, maps, kept = _linear_call(x_BCHW, parameters, eps, first, keep)
    call.run(pixels(maps[0]), torch.get_num_threads())
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
    weight_NK, twice = parameters[0], len(parameters) > 4
    rest = weight_NK.shape[0] - first
    widths = [first, rest - rest // 2, rest // 2] if twice else [first, rest]
    kept = room_for_tiles(x_BCHW, rest, weight_NK.dtype, keep and twice)
    side = _side(weight_NK, x_BCHW.shape[1])
    if side > 1:  # a map of the patches' size
        height, width = (length // side * side for length in x_BCHW.shape[2:])
        x_BCHW = x_BCHW[..., :height:side, :width:side]
    return [new_map(x_BCHW, width, weight_NK.dtype) for width in widths], kept


def _side(weight_NK: torch.Tensor, channels: int) -> int:
    """S; a 0 that makes a row whole does not matter."""
    return math.isqrt(weight_NK.shape[1] // channels)


def _linear_arguments(
    x: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    eps: Sequence[float],
    first: int,
    maps: Sequence[torch.Tensor],
    kept: Sequence[torch.Tensor],
) -> Linear:
    (weight_NK, _, *norms), (p, q, *r), (_, height, width, channels) = parameters, maps, x.shape
    sizes = {"K": channels, "S": _side(weight_NK, channels), "N": weight_NK.shape[0], "P": first}
    arguments = Linear(height=height, width=width, **sizes, **pointers(x=x, w=weight_NK, p=p, q=q))
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
    weight_NK, x, maps = parameters[0], rows(x_BCHW), [rows(dmap_BCHW) for dmap_BCHW in dmaps]
    threads = int(kept[1]) if kept else torch.get_num_threads()
    dx_BCHW, lengths = map_like(x_BCHW, x.shape[-1]), [vector.shape[0] for vector in parameters[1:]]
    side = _side(weight_NK, x.shape[-1])
    if x.shape[1] % side or x.shape[2] % side:  # no patch has those
        dx_BCHW.zero_()
    dvectors = x.new_empty(sum(lengths), dtype=torch.float32)
    dw_NK = torch.empty_like(weight_NK, dtype=torch.float32)
    arguments = _linear_arguments(x, parameters, eps, maps[0].shape[-1], maps, kept)
    arguments.dx, arguments.dw, arguments.dvectors = map(pointer, (dx_BCHW, dw_NK, dvectors))
    sizes = pixels(dmaps[0]), threads, workers([weight_NK], threads)
    typed_call("linear_backward", (x, weight_NK), arguments).run(*sizes)
    return dx_BCHW, [dw_NK, *torch.split_with_sizes_copy(dvectors, lengths)]


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
    return _linear_maps(x_BCHW, fitting_weight(linear, (channels, x_BCHW.shape[1])), linear.bias, norms, first, steps)


def norm_strided(x_BCHW: torch.Tensor, norm: LayerNorm2d, conv: nn.Conv2d) -> torch.Tensor:
    """``conv(norm(x))`` for a convolution whose patches lie side by side, see `fused.usable`."""
    channels, side = conv.weight.shape[0], conv.kernel_size[0]
    if conv.weight.shape[1:] != (x_BCHW.shape[1], side, side):
        raise ValueError(f"a convolution of {x_BCHW.shape[1]} channels belongs here, not {conv}")
    weight_NK = conv.weight.permute(0, 2, 3, 1).flatten(1)
    return _linear_maps(x_BCHW, weight_NK, conv.bias, (norm,), channels)[0]


def _linear_maps(
    x_BCHW: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor,
    norms: Sequence[LayerNorm2d],
    first: int,
    steps: Steps | None = None,
) -> Sequence[torch.Tensor]:
    vectors, dtype = [bias_N, *(v for n in norms for v in (n.weight, n.bias))], weights_type(x_BCHW)
    parameters, eps = [weight_NK, *map(vector, vectors)], [n.eps for n in norms]
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
    call.run(pixels(x_BCHW), torch.get_num_threads())
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
