"""What HorNet does within a pixel, in three fused CPU operations, forward and backward: LayerNorm and a linear layer;
gnConv's gated interactions and output projection; LayerNorm, MLP and residual.

They run in C++ (native/pixelwise.cpp) where that could be built and the processor has AVX2 or AVX-512: in float32 and,
with AVX-512's bfloat16, under its autocast; forward alone in bfloat16. Elsewhere `usable` says no, and the caller
computes the same with PyTorch's own operations.

Shapes: B batch, C channels, H height, W width, N hidden channels, P channels of gnConv's p_0, Q = 2C - P.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn
from torch.autograd.function import once_differentiable

from hornet_lit.network import native
from hornet_lit.network.layers import GELU, ChannelLinear, changed, observed
from hornet_lit.network.native.arguments import Gates, Int, Linear, Mlp, Norm, Pointers, map_like, pointer, rows

MOST_BYTES = 2**30  # for all threads' sums in a backward kernel: few threads for wide layers on large machines
LINEAR = (nn.Conv2d, ChannelLinear)


def usable(x_BCHW: torch.Tensor, norm: nn.Module, *linears: nn.Module, act: nn.Module | None = None) -> bool:
    """Whether the fused operations may stand for these modules here: nobody can look in between or has changed them."""
    if x_BCHW.device.type != "cpu" or x_BCHW.ndim != 4 or observed():
        return False
    autocast = torch.is_autocast_enabled("cpu")
    pairs = autocast or x_BCHW.dtype == torch.bfloat16
    if x_BCHW.dtype not in (torch.float32, torch.bfloat16) or not _built(pairs):
        return False
    if autocast and (x_BCHW.dtype != torch.float32 or torch.get_autocast_dtype("cpu") != torch.bfloat16):
        return False
    if x_BCHW.dtype == torch.bfloat16 and torch.is_grad_enabled():  # backward kernels are for float32 maps alone
        return False
    if not _plain(norm, x_BCHW.dtype, LayerNorm2d) or not all(_plain(m, x_BCHW.dtype, *LINEAR) for m in linears):
        return False
    if act is not None and (type(act) is not GELU or changed(act) or act.approximate != "none"):
        return False
    if norm.eps <= 0:  # a tile's missing pixels, all 0, would spoil the sums of gradients
        return False
    return len(norm.weight) == x_BCHW.shape[1]  # else the library's own error is the clearest


def promoted(x_BCHW: torch.Tensor, scale_C: torch.Tensor | None) -> torch.Tensor:
    """x as ``x + scale ⊙ …`` would promote it: what autocast's convolutions between stages give in bfloat16 becomes
    float32, for which alone there are kernels under autocast."""
    mixed = torch.is_autocast_enabled("cpu") and x_BCHW.device.type == "cpu" and x_BCHW.dtype == torch.bfloat16
    return x_BCHW.float() if mixed and scale_C is not None and scale_C.dtype == torch.float32 else x_BCHW


def _plain(module: nn.Module, dtype: torch.dtype, *types: type[nn.Module]) -> bool:
    if type(module) not in types or changed(module):
        return False
    if isinstance(module, nn.Conv2d):
        size = module.kernel_size, module.stride, module.padding, module.groups
        if size != ((1, 1), (1, 1), (0, 0), 1):
            return False
    if module.bias is None or module.bias.shape != module.weight.shape[:1]:
        return False
    return all(type(p) in (torch.Tensor, nn.Parameter) and p.dtype == dtype for p in (module.weight, module.bias))


def _built(pairs: bool) -> bool:
    return native.offers("pixelwise", "mlp_forward_bf16" if pairs else "mlp_forward_f32")


def _run(name: str, arguments: ctypes.Structure, *sizes: int) -> None:
    getattr(native.library("pixelwise"), name)(ctypes.byref(arguments), *map(Int, sizes))


def _pointers(**tensors: torch.Tensor) -> dict[str, int | None]:
    return {name: pointer(tensor) for name, tensor in tensors.items()}


def _type(x: torch.Tensor, weight: torch.Tensor) -> str:
    """The kernel's suffix for the residual stream's type and the weights'."""
    if x.dtype != weight.dtype:
        return "mixed"
    return "f32" if x.dtype == torch.float32 else "bf16"


def _weights_type(x_BCHW: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x_BCHW.dtype


def _weight(linear: nn.Conv2d | nn.Linear, x_BCHW: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    weight_NK = linear.weight.flatten(1)
    if tuple(weight_NK.shape) != size:
        raise ValueError(f"a layer of {size[1]} channels in and {size[0]} out belongs here, not {linear}")
    weight_NK = weight_NK.to(_weights_type(x_BCHW))
    if weight_NK.dtype == torch.bfloat16 and size[1] % 2:
        weight_NK = F.pad(weight_NK, (0, 1))  # the kernels multiply pairs
    return weight_NK.contiguous()


def _vector(vector: torch.Tensor) -> torch.Tensor:
    return vector.float().contiguous()


def _scale(scale_C: torch.Tensor | None, x_BCHW: torch.Tensor) -> torch.Tensor:
    channels = x_BCHW.shape[1]
    if scale_C is None:
        return x_BCHW.new_ones(channels, dtype=torch.float32)
    if tuple(scale_C.shape) != (channels,):
        raise ValueError(f"a scale of {tuple(scale_C.shape)} does not fit {channels} channels")
    return _vector(scale_C)


def _workers(weights: Sequence[torch.Tensor], threads: int) -> int:
    """How many threads a backward kernel may give gradients of their own."""
    each = sum(4 * w.shape[0] * (w.shape[1] + native.lanes("pixelwise")) for w in weights)
    return max(1, min(threads, MOST_BYTES // each))


# LayerNorm and a linear layer whose output is split in two. Parameters: weight (N, C), bias, the norm's two.


@torch.library.custom_op("hornet_lit::norm_linear", mutates_args=())
def _norm_linear(
    x_BCHW: torch.Tensor, parameters: Sequence[torch.Tensor], eps: float, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    (weight_NC, bias_N, *norm), x = parameters, rows(x_BCHW)
    n, c = len(weight_NC), x_BCHW.shape[1]
    p_BPHW, q_BQHW = (map_like(x_BCHW, width, weight_NC.dtype) for width in (first, n - first))
    pointers = _pointers(x=x, w=weight_NC, b=bias_N, p=p_BPHW, q=q_BQHW)
    arguments = Linear(K=c, N=n, P=first, norm=Norm(*map(pointer, norm), eps), **pointers)
    _run(f"linear_forward_{_type(x_BCHW, weight_NC)}", arguments, x.numel() // c, torch.get_num_threads())
    return p_BPHW, q_BQHW


@_norm_linear.register_fake
def _(x_BCHW, parameters, eps, first):  # type: ignore[no-untyped-def]
    p_BPHW, q_BQHW = (map_like(x_BCHW, width, parameters[0].dtype) for width in (first, len(parameters[0]) - first))
    return p_BPHW, q_BQHW


@torch.library.custom_op("hornet_lit::norm_linear_backward", mutates_args=())
def _norm_linear_backward(
    dp_BPHW: torch.Tensor, dq_BQHW: torch.Tensor, x_BCHW: torch.Tensor, parameters: Sequence[torch.Tensor], eps: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    (weight_NC, _, *norm), x, threads = parameters, rows(x_BCHW), torch.get_num_threads()
    n, c, dp, dq = len(weight_NC), x_BCHW.shape[1], rows(dp_BPHW), rows(dq_BQHW)
    dx_BCHW, dvectors = map_like(x_BCHW, c), x_BCHW.new_empty(n + 2 * c)
    dw_NC = torch.empty_like(weight_NC, dtype=torch.float32)
    pointers = _pointers(x=x, w=weight_NC, p=dp, q=dq, dx=dx_BCHW, dw=dw_NC, dvectors=dvectors)
    arguments = Linear(K=c, N=n, P=dp.shape[-1], norm=Norm(*map(pointer, norm), eps), **pointers)
    name = f"linear_backward_{_type(x_BCHW, weight_NC)}"
    _run(name, arguments, x.numel() // c, threads, _workers([weight_NC], threads))
    return dx_BCHW, [dw_NC.to(weight_NC.dtype), *(v.clone() for v in dvectors.split([n, c, c]))]


@_norm_linear_backward.register_fake
def _(dp_BPHW, dq_BQHW, x_BCHW, parameters, eps):  # type: ignore[no-untyped-def]
    return map_like(x_BCHW, x_BCHW.shape[1]), [torch.empty_like(p) for p in parameters]


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BCHW, eps, first, *parameters):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x_BCHW, *parameters)
        ctx.eps = eps
        return _norm_linear(x_BCHW, parameters, eps, first)

    @staticmethod
    @once_differentiable
    def backward(ctx, dp_BPHW, dq_BQHW):  # type: ignore[no-untyped-def]
        x_BCHW, *parameters = ctx.saved_tensors
        dx_BCHW, dparameters = _norm_linear_backward(dp_BPHW, dq_BQHW, x_BCHW, parameters, ctx.eps)
        return dx_BCHW, None, None, *dparameters


def norm_linear(
    x_BCHW: torch.Tensor, norm: LayerNorm2d, linear: nn.Conv2d, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``linear(norm(x))``, its first ``first`` channels and the rest, as maps of their own."""
    weight_NC = _weight(linear, x_BCHW, (len(linear.weight), x_BCHW.shape[1]))
    vectors = map(_vector, (linear.bias, norm.weight, norm.bias))
    return _NormLinear.apply(x_BCHW, norm.eps, first, weight_NC, *vectors)


# LayerNorm, MLP and residual. Parameters: w1 (N, C), b1, w2 (C, N), b2, the scale, the norm's two.


@torch.library.custom_op("hornet_lit::norm_mlp", mutates_args=())
def _norm_mlp(
    x_BCHW: torch.Tensor, parameters: Sequence[torch.Tensor], eps: float, residual: bool, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    (w1_NC, b1_N, w2_CN, b2_C, scale_C, *norm), x, threads = parameters, rows(x_BCHW), torch.get_num_threads()
    n, c = len(w1_NC), x_BCHW.shape[1]
    y_BCHW, hidden = map_like(x_BCHW, c), _hidden(x_BCHW, w1_NC, keep)
    pointers = _pointers(x=x, w1=w1_NC, b1=b1_N, w2=w2_CN, b2=b2_C, scale=scale_C, y=y_BCHW)
    if keep:
        hidden[-1] = threads
        pointers["h"] = pointer(hidden)
    arguments = Mlp(C=c, N=n, residual=residual, norm=Norm(*map(pointer, norm), eps), **pointers)
    _run(f"mlp_forward_{_type(x_BCHW, w1_NC)}", arguments, x.numel() // c, threads)
    return y_BCHW, hidden


@_norm_mlp.register_fake
def _(x_BCHW, parameters, eps, residual, keep):  # type: ignore[no-untyped-def]
    return map_like(x_BCHW, x_BCHW.shape[1]), _hidden(x_BCHW, parameters[0], keep)


def _hidden(x_BCHW: torch.Tensor, w1_NC: torch.Tensor, keep: bool) -> torch.Tensor:
    """Room for the hidden activations, of the weights' type and in the kernel's own order, which depends on the number
    of threads: that is the last element."""
    b, _, h, w = x_BCHW.shape
    lanes = native.lanes("pixelwise")
    elements = (b * h * w + lanes - 1) // lanes * lanes * len(w1_NC)
    floats = elements * w1_NC.element_size() // 4 + 1 if keep else 0
    return x_BCHW.new_empty(floats, dtype=torch.float32)


@torch.library.custom_op("hornet_lit::norm_mlp_backward", mutates_args=())
def _norm_mlp_backward(
    dy_BCHW: torch.Tensor,
    x_BCHW: torch.Tensor,
    hidden: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    eps: float,
    residual: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    (w1_NC, _, w2_CN, b2_C, scale_C, *norm), x, dy = parameters, rows(x_BCHW), rows(dy_BCHW)
    n, c, threads = len(w1_NC), x_BCHW.shape[1], int(hidden[-1])
    dx_BCHW, dvectors = map_like(x_BCHW, c), x_BCHW.new_empty(n + 3 * c)
    dw1_NC, dw2_CN, dscale_C = (torch.empty_like(t, dtype=torch.float32) for t in (w1_NC, w2_CN, scale_C))
    pointers = _pointers(x=x, w1=w1_NC, w2=w2_CN, b2=b2_C, scale=scale_C, h=hidden, dy=dy)
    pointers |= _pointers(dx=dx_BCHW, dw1=dw1_NC, dw2=dw2_CN, dvectors=dvectors, dscale=dscale_C)
    arguments = Mlp(C=c, N=n, residual=residual, norm=Norm(*map(pointer, norm), eps), **pointers)
    name = f"mlp_backward_{_type(x_BCHW, w1_NC)}"
    _run(name, arguments, x.numel() // c, threads, _workers([w1_NC, w2_CN], threads))
    db1_N, db2_C, *dnorm = (v.clone() for v in dvectors.split([n, c, c, c]))
    return dx_BCHW, [dw1_NC.to(w1_NC.dtype), db1_N, dw2_CN.to(w2_CN.dtype), db2_C, dscale_C, *dnorm]


@_norm_mlp_backward.register_fake
def _(dy_BCHW, x_BCHW, hidden, parameters, eps, residual):  # type: ignore[no-untyped-def]
    return map_like(x_BCHW, x_BCHW.shape[1]), [torch.empty_like(p) for p in parameters]


class _NormMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BCHW, eps, residual, *parameters):  # type: ignore[no-untyped-def]
        y_BCHW, hidden = _norm_mlp(x_BCHW, parameters, eps, residual, True)
        ctx.save_for_backward(x_BCHW, hidden, *parameters)
        ctx.eps, ctx.residual = eps, residual
        return y_BCHW

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BCHW):  # type: ignore[no-untyped-def]
        x_BCHW, hidden, *parameters = ctx.saved_tensors
        dx_BCHW, dparameters = _norm_mlp_backward(dy_BCHW, x_BCHW, hidden, parameters, ctx.eps, ctx.residual)
        return dx_BCHW, None, None, *dparameters


def norm_mlp(
    x_BCHW: torch.Tensor,
    norm: LayerNorm2d,
    up: nn.Linear,
    down: nn.Linear,
    scale_C: torch.Tensor | None,
    *,
    residual: bool,
) -> torch.Tensor:
    """``scale ⊙ down(GELU(up(norm(x))))``, plus x if ``residual``. The backward pass keeps x and up's output."""
    n, c = len(up.weight), x_BCHW.shape[1]
    w1_NC, w2_CN = _weight(up, x_BCHW, (n, c)), _weight(down, x_BCHW, (c, n))
    b1_N, b2_C, *norms = map(_vector, (up.bias, down.bias, norm.weight, norm.bias))
    parameters = w1_NC, b1_N, w2_CN, b2_C, _scale(scale_C, x_BCHW), *norms
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x_BCHW, *parameters)):
        return _NormMlp.apply(x_BCHW, norm.eps, residual, *parameters)
    return _norm_mlp(x_BCHW, parameters, norm.eps, residual, False)[0]


# gnConv's gated interactions and output projection.


@torch.library.custom_op("hornet_lit::gates", mutates_args=())
def _gates(
    p_BPHW: torch.Tensor,
    gates_BQHW: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    scale_C: torch.Tensor,
    x_BCHW: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    p, gates, x = rows(p_BPHW), rows(gates_BQHW), None if x_BCHW is None else rows(x_BCHW)
    y_BCHW = map_like(p_BPHW, len(scale_C), dtype)
    arguments = _gates_arguments(p, gates, weights, biases, scale_C)
    arguments.x, arguments.y = pointer(x), pointer(y_BCHW)
    _run(f"gates_forward_{_type(y_BCHW, p)}", arguments, p.numel() // p.shape[-1], torch.get_num_threads())
    return y_BCHW


@_gates.register_fake
def _(p_BPHW, gates_BQHW, weights, biases, scale_C, x_BCHW, dtype):  # type: ignore[no-untyped-def]
    return map_like(p_BPHW, len(scale_C), dtype)


def _gates_arguments(
    p: torch.Tensor,
    gates: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    scale_C: torch.Tensor,
) -> Gates:
    arguments = Gates(C=len(scale_C), order=len(weights), first=p.shape[-1], scale=pointer(scale_C))
    arguments.p, arguments.gates = pointer(p), pointer(gates)
    arguments.w, arguments.b = Pointers(*map(pointer, weights)), Pointers(*map(pointer, biases))
    return arguments


@torch.library.custom_op("hornet_lit::gates_backward", mutates_args=())
def _gates_backward(
    dy_BCHW: torch.Tensor,
    p_BPHW: torch.Tensor,
    gates_BQHW: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    scale_C: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    p, gates, dy, threads = rows(p_BPHW), rows(gates_BQHW), rows(dy_BCHW), torch.get_num_threads()
    dp_BPHW, dgates_BQHW = map_like(p_BPHW, p.shape[-1]), map_like(p_BPHW, gates.shape[-1])
    dws, dscale_C = [torch.empty_like(w, dtype=torch.float32) for w in weights], torch.empty_like(scale_C)
    widths = [len(w) for w in weights]
    dvectors = scale_C.new_empty(sum(widths))
    arguments = _gates_arguments(p, gates, weights, biases, scale_C)
    arguments.dy, arguments.dp, arguments.dgates = pointer(dy), pointer(dp_BPHW), pointer(dgates_BQHW)
    arguments.dw = Pointers(*map(pointer, dws))
    arguments.dvectors, arguments.dscale = pointer(dvectors), pointer(dscale_C)
    name = f"gates_backward_{_type(dy_BCHW, p)}"
    _run(name, arguments, p.numel() // p.shape[-1], threads, _workers(weights, threads))
    dws = [dw.to(w.dtype) for dw, w in zip(dws, weights, strict=True)]
    return dp_BPHW, dgates_BQHW, dws, [db.clone() for db in dvectors.split(widths)], dscale_C


@_gates_backward.register_fake
def _(dy_BCHW, p_BPHW, gates_BQHW, weights, biases, scale_C):  # type: ignore[no-untyped-def]
    maps = map_like(p_BPHW, p_BPHW.shape[1]), map_like(p_BPHW, gates_BQHW.shape[1])
    return *maps, [torch.empty_like(w) for w in weights], [torch.empty_like(b) for b in biases], scale_C.clone()


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p_BPHW, gates_BQHW, scale_C, x_BCHW, dtype, *parameters):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(p_BPHW, gates_BQHW, scale_C, *parameters)
        ctx.residual, half = x_BCHW is not None, len(parameters) // 2
        return _gates(p_BPHW, gates_BQHW, parameters[:half], parameters[half:], scale_C, x_BCHW, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BCHW):  # type: ignore[no-untyped-def]
        p_BPHW, gates_BQHW, scale_C, *parameters = ctx.saved_tensors
        half = len(parameters) // 2
        parts = _gates_backward(dy_BCHW, p_BPHW, gates_BQHW, parameters[:half], parameters[half:], scale_C)
        dp_BPHW, dgates_BQHW, dws, dbs, dscale_C = parts
        return dp_BPHW, dgates_BQHW, dscale_C, dy_BCHW if ctx.residual else None, None, *dws, *dbs


def gated(
    x_BCHW: torch.Tensor,
    p_BPHW: torch.Tensor,
    gates_BQHW: torch.Tensor,
    linears: Sequence[nn.Conv2d],
    scale_C: torch.Tensor | None,
    *,
    residual: bool,
) -> torch.Tensor:
    """gnConv's equation (3.4) from p_0 and all filtered q on: gates, ``linears`` g_1 … and φ_out, times ``scale``.

    Plus x if ``residual``; in any case of x's type. The backward pass keeps p_0 and the gates, and computes the rest
    again.
    """
    expected = x_BCHW.shape[0], 2 * x_BCHW.shape[1] - p_BPHW.shape[1], *x_BCHW.shape[2:]
    if gates_BQHW.shape != expected:
        raise ValueError(f"a filter must keep its map's shape {expected}, this one gave {tuple(gates_BQHW.shape)}")
    widths = [p_BPHW.shape[1] << k for k in range(len(linears))]
    sizes = [*zip(widths[1:], widths[:-1], strict=True), (x_BCHW.shape[1], widths[-1])]
    weights = [_weight(m, x_BCHW, size) for m, size in zip(linears, sizes, strict=True)]
    biases = [_vector(m.bias) for m in linears]
    gates_BQHW = gates_BQHW.to(p_BPHW.dtype)
    return _Gated.apply(
        p_BPHW, gates_BQHW, _scale(scale_C, x_BCHW), x_BCHW if residual else None, x_BCHW.dtype, *weights, *biases
    )
