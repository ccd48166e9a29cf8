"""Where the fused CPU operations of `pixelwise` and `gated` may run, and what their kernels are given.

They run in C++ (native/pixelwise.h) where that could be built and the processor has AVX2 or AVX-512: in float32, in
bfloat16 and under its autocast, whether or not the processor multiplies bfloat16. Elsewhere `usable` says no, and the
caller computes the same with PyTorch's own operations.

Shapes: B batch, C channels, H height, W width, K channels in, N channels out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn

from hornet_lit.network import native
from hornet_lit.network.layers import GELU, ChannelLinear, StridedConv, changed, observed
from hornet_lit.network.native.arguments import MAX_SIDE, pointer
from hornet_lit.network.native.steps import Call
from hornet_lit.network.operations import dispatched, readable

MOST_BYTES = 2**30  # for all threads' sums in a backward kernel: few threads for wide layers on large machines
EVEN = 16  # images a thread from which on one more for some threads matters little
LEAST_EPSILON = 2.0**-126  # the kernels' is a float
LINEAR, NORM = (nn.Conv2d, ChannelLinear, StridedConv), (LayerNorm2d,)


def may_take_turns(x_BCHW: torch.Tensor) -> bool:
    """Whether each thread may take whole images through several kernels, which spares waiting and dispatch: nobody
    needs gradients or looks in between, and the images share evenly."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x_BCHW.is_cpu or x_BCHW.ndim != 4:
        return False
    batch, threads = x_BCHW.shape[0], torch.get_num_threads()
    even = batch % threads == 0 or batch >= EVEN * threads
    return even and batch > 0 and not observed() and not dispatched(x_BCHW)


def usable(
    x_BCHW: torch.Tensor,
    norm: nn.Module,
    *linears: nn.Module,
    scale_C: torch.Tensor | None,
    act: nn.Module | None = None,
) -> bool:
    """Whether the fused operations may stand for these modules here: nobody can look in between or has changed them."""
    if not x_BCHW.is_cpu or x_BCHW.ndim != 4 or observed() or not readable(x_BCHW, scale_C):
        return False
    if scale_C is not None and scale_C.numel() != x_BCHW.shape[1]:
        return False
    autocast, dtype = torch.is_autocast_enabled("cpu"), x_BCHW.dtype
    if dtype not in (torch.float32, torch.bfloat16) or not _built(autocast or dtype == torch.bfloat16):
        return False
    if autocast and (dtype != torch.float32 or torch.get_autocast_dtype("cpu") != torch.bfloat16):
        return False
    if act is not None and (type(act) is not GELU or changed(act) or act.approximate != "none"):
        return False
    if not usable_norm(norm, x_BCHW.shape[1], dtype):
        return False
    # Under autocast weights may be in its type already: those that FSDP2 gathers are.
    dtypes = (dtype, torch.bfloat16) if autocast else (dtype,)
    return all([_plain(linear, dtypes, LINEAR) for linear in linears])


def usable_norm(norm: nn.Module, channels: int, dtype: torch.dtype) -> bool:
    """Whether a fused operation may compute this norm of that many channels, where it may run at all."""
    if not _plain(norm, (dtype,), NORM):
        return False
    if norm.eps < LEAST_EPSILON:  # a tile's missing pixels, all 0, would spoil the sums of gradients
        return False
    return norm.weight.shape[0] == channels  # else the library's own error is the clearest


def promoted(x_BCHW: torch.Tensor, scale_C: torch.Tensor | None) -> torch.Tensor:
    """x as ``x + scale ⊙ …`` would promote it: what autocast's convolutions between stages give in bfloat16 becomes
    float32, for which alone there are kernels under autocast."""
    mixed = torch.is_autocast_enabled("cpu") and x_BCHW.device.type == "cpu" and x_BCHW.dtype == torch.bfloat16
    return x_BCHW.float() if mixed and scale_C is not None and scale_C.dtype == torch.float32 else x_BCHW


def _plain(module: nn.Module, dtypes: Sequence[torch.dtype], kinds: Sequence[type[nn.Module]]) -> bool:
    if type(module) not in kinds or changed(module):
        return False
    if isinstance(module, nn.Conv2d) and not (_patchwise if type(module) is StridedConv else _pointwise)(module):
        return False
    # Not as attributes, which nn.Module looks up in Python: this is asked some hundred times a step.
    parameters = module._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None or bias is None or bias.shape != weight.shape[:1]:
        return False
    if not readable(weight, bias):
        return False
    return weight.dtype in dtypes and bias.dtype in dtypes


def _pointwise(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


def _patchwise(conv: nn.Conv2d) -> bool:
    """Whether its patches are squares that lie side by side."""
    side = conv.kernel_size[0]
    beside = conv.kernel_size == conv.stride == (side, side) and conv.padding == (0, 0) and conv.dilation == (1, 1)
    return beside and side <= MAX_SIDE and conv.groups == 1


def _built(low: bool) -> bool:
    """Low: also the kernels for bfloat16, without which those for float32 can do."""
    both = not low or native.offers("pixelwise_bf16", "mlp_forward_bf16")
    return both and native.offers("pixelwise", "mlp_forward_f32")


def typed_call(name: str, like: Sequence[torch.Tensor], arguments: ctypes.Structure, *tensors: Any) -> Call:
    """The kernel for a residual stream and weights of these tensors' types."""
    stream, weights = (tensor.dtype for tensor in like)
    suffix = "mixed" if stream != weights else "f32" if stream == torch.float32 else "bf16"
    return Call("pixelwise" if suffix == "f32" else "pixelwise_bf16", f"{name}_{suffix}", arguments, tensors)


def pointers(**tensors: torch.Tensor | None) -> dict[str, int | None]:
    return {name: pointer(tensor) for name, tensor in tensors.items()}


def pixels(x_BCHW: torch.Tensor) -> int:
    b, _, h, w = x_BCHW.shape
    return b * h * w


def weights_type(x_BCHW: torch.Tensor) -> torch.dtype:
    """What the kernels multiply."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x_BCHW.dtype


def fitting_weight(linear: nn.Conv2d | nn.Linear, size: tuple[int, int]) -> torch.Tensor:
    """The layer's weight (N, K), or (N, K, 1, 1) as a convolution has it."""
    weight_NK = linear.weight
    if weight_NK.shape[:2] != size or weight_NK.numel() != size[0] * size[1]:
        raise ValueError(f"a layer of {size[1]} channels in and {size[0]} out belongs here, not {linear}")
    return weight_NK


def lowered(weight_NK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight as the kernels take it; vectors as they are. Done within autograd functions, so that gradients are
    rounded no more than the kernels do."""
    if weight_NK.ndim == 1:
        return weight_NK
    if weight_NK.dtype != dtype:
        weight_NK = weight_NK.to(dtype)
    if dtype == torch.bfloat16 and weight_NK.shape[1] % 2:
        weight_NK = F.pad(weight_NK.flatten(1), (0, 1))  # the kernels multiply pairs
    return weight_NK.contiguous()


def raised(gradients: Sequence[torch.Tensor], sizes: Sequence[torch.Size]) -> list[torch.Tensor]:
    """Gradients of what was `lowered`, which had those sizes."""
    return [g if g.shape == size else g[:, : size[1]].reshape(size) for g, size in zip(gradients, sizes, strict=True)]


def vector(values: torch.Tensor) -> torch.Tensor:
    return (values if values.dtype == torch.float32 else values.float()).contiguous()


def fitting_scale(scale_C: torch.Tensor | None, x_BCHW: torch.Tensor) -> torch.Tensor:
    channels = x_BCHW.shape[1]
    if scale_C is None:
        return x_BCHW.new_ones(channels, dtype=torch.float32)
    if scale_C.numel() != channels:
        raise ValueError(f"a scale of {tuple(scale_C.shape)} does not fit {channels} channels")
    return vector(scale_C if scale_C.ndim == 1 else scale_C.flatten())


def workers(weights: Sequence[torch.Tensor], threads: int) -> int:
    """How many threads a backward kernel may give gradients of their own."""
    each = sum(4 * w.shape[0] * (w.shape[1] + native.lanes("pixelwise")) for w in weights)
    return max(1, min(threads, MOST_BYTES // each))


def room_for_tiles(x_BCHW: torch.Tensor, channels: int, dtype: torch.dtype, keep: bool) -> list[torch.Tensor]:
    """Room for what a kernel keeps of ``channels`` for its way back, in the kernel's own order, and for the number of
    threads, on which that order depends. None of it unless ``keep``."""
    if not keep:
        return []
    b, _, h, w = x_BCHW.shape
    lanes = native.lanes("pixelwise")
    elements = (b * h * w + lanes - 1) // lanes * lanes * channels
    return [x_BCHW.new_empty(elements, dtype=dtype), x_BCHW.new_empty(1, dtype=torch.int64)]
