"""What blocks and mixers are made of where torch.nn's own form is slower or keeps more memory, with the same values.

Shapes: B batch, C channels, D channels out, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint

# Whether the library has products of bfloat16 for this CPU: with AVX-512 even without instructions for them.
MULTIPLIES_BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def exporting() -> bool:
    """Whether torch.export is tracing. `torch.compiler.is_exporting` says so under torch.compile too in torch 2.11,
    which would leave compiled networks without our kernels."""
    return torch.compiler._is_exporting_flag


def observed() -> bool:
    """Whether somebody needs to see PyTorch's own operations: torch.export, torch.jit.trace, a functorch transform,
    forward derivatives, or hooks on all modules (as of `torch.utils.flop_counter`)."""
    if exporting() or torch.jit.is_tracing():
        return True
    if torch_module._has_any_global_hook():
        return True
    if torch.compiler.is_compiling():
        return False
    return _transformed()


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def needed(*tensors: torch.Tensor | None) -> bool:
    """Whether a gradient for any of these tensors is being recorded."""
    return torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])


def changed(module: nn.Module) -> bool:
    """Whether a module has hooks, or a ``forward`` of its own beside its class's, or was compiled in place."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in vars(module) or module._compiled_call_impl is not None


class ChannelLinear(nn.Linear):
    """`nn.Linear` over the channels of a channels-last (B, C, H, W) map, as (B, D, H, W).

    In float32 on CPUs it runs as a 1×1 convolution: the library's kernels for those are faster there, and the bias
    costs no pass of its own. In bfloat16 they are not (BENCHMARKS.md, Speed).
    """

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        plain = x_BCHW.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if plain and x_BCHW.device.type == "cpu" and not exporting():
            return F.conv2d(x_BCHW, self.weight[:, :, None, None], self.bias)
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class StridedConv(nn.Conv2d):
    """`nn.Conv2d` for the stem and between stages.

    In bfloat16 on a CPU for which the library has no products of it, that takes a multiple of float32's time
    (BENCHMARKS.md, What single changes won): there it is computed in float32, and its output alone is rounded.
    """

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        autocast = torch.is_autocast_enabled("cpu") and x_BCHW.dtype != torch.float64
        dtype = torch.get_autocast_dtype("cpu") if autocast else x_BCHW.dtype
        if dtype != torch.bfloat16 or x_BCHW.device.type != "cpu" or exporting() or MULTIPLIES_BFLOAT16:
            return super().forward(x_BCHW)
        if not autocast and self.weight.dtype != dtype:  # the library's own error is the clearest
            return super().forward(x_BCHW)
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast("cpu", enabled=False):
            return self._conv_forward(x_BCHW.float(), self.weight.float(), bias).to(dtype)


class GELU(nn.GELU):
    """`nn.GELU` that can overwrite its input, where no gradient is recorded and nobody else needs that."""

    def forward(self, x: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
        return torch.ops.aten.gelu_(x, approximate=self.approximate) if overwrite else super().forward(x)


class Recomputing(nn.Module):
    """A module that can keep less for the backward pass.

    Attributes:
        recompute: whether `keeping_inputs` computes again what is cheap. `HorNet.set_recompute` sets it.
    """

    recompute = False

    def keeping_inputs(self, region: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        """``region(*inputs)``, of which autograd keeps the inputs alone and computes the rest again.

        The region must be free of random numbers. Its last operation is not run again: recomputation ends as soon as
        all tensors that were not kept are there, and the last operation needs only its inputs.
        """
        if not (self.recompute and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return region(*inputs)  # compiled, the partitioner decides what to keep
        if _transformed():  # which torch 2.11's checkpoint does not know
            return region(*inputs)
        return checkpoint(region, *inputs, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
