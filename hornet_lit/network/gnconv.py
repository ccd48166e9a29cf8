"""Recursive gated convolution (gnConv), HorNet's mixer.

Shapes: B batch, C channels, H height, W width. Q = C_0 + … + C_{n-1} = 2C - C_0, the channels of the filter.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers import LayerNorm2d
from torch import nn

from hornet_lit.network.filters import Size
from hornet_lit.network.fused import promoted, usable
from hornet_lit.network.gated import gated
from hornet_lit.network.layers import Recomputing, changed
from hornet_lit.network.native.arguments import MAX_ORDER
from hornet_lit.network.native.steps import Steps
from hornet_lit.network.pixelwise import norm_linear

FilterFactory = Callable[..., nn.Module]


class GnConv(Recomputing):
    """gnConv of order n (HorNet §3.1, equations 3.1 to 3.4): n gated interactions of growing width.

    ``[p_0, q_0 … q_{n-1}] = φ_in(x)``, ``p_{k+1} = f_k(q_k) ⊙ g_k(p_k)``, ``y = φ_out(p_n)``, with widths
    C_k = C / 2^(n-1-k), g_0 the identity and all f_k applied at once as ONE filter over the Q channels (1/α is the
    filter's own, see `filters`). Order 1 is gConv.

    Args:
        dim: C, divisible by 2^(order-1).
        order: n ≥ 1.
        filter: factory of the depth-wise slot, called as ``filter(Q, size=size)``.
        size: (H, W) expected, for filters that store a spectrum.

    Raises:
        ValueError: if ``order`` < 1 or ``dim`` cannot be halved order - 1 times.
    """

    def __init__(self, dim: int, *, order: int, filter: FilterFactory, size: Size) -> None:
        super().__init__()
        if order < 1:
            raise ValueError(f"gnConv's order must be at least 1, got {order}")
        if dim % 2 ** (order - 1):
            step = 2 ** (order - 1)
            raise ValueError(
                f"gnConv of order {order} halves its {dim} channels {order - 1} times: use a multiple of {step}"
            )
        self.widths = [dim // 2 ** (order - 1 - k) for k in range(order)]
        self.proj_in = nn.Conv2d(dim, 2 * dim, 1)
        # Attribute names are those of the published checkpoints.
        self.dwconv = filter(sum(self.widths), size=size)
        self.proj_out = nn.Conv2d(dim, dim, 1)
        self.pws = nn.ModuleList(nn.Conv2d(c, 2 * c, 1) for c in self.widths[:-1])

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        p_BCHW, q_BQHW = self.proj_in(x_BCHW).split((self.widths[0], sum(self.widths)), dim=1)
        return self.keeping_inputs(self._interact, p_BCHW, self.dwconv(q_BQHW))

    def _interact(self, p_BCHW: torch.Tensor, gates_BQHW: torch.Tensor) -> torch.Tensor:
        gate, *gates = gates_BQHW.split(self.widths, dim=1)
        p_BCHW = p_BCHW * gate
        for g, gate in zip(self.pws, gates, strict=True):
            p_BCHW = g(p_BCHW) * gate
        return self.proj_out(p_BCHW)

    def normed(
        self, x_BCHW: torch.Tensor, norm: LayerNorm2d, scale_C: torch.Tensor | None, *, residual: bool
    ) -> torch.Tensor | None:
        """``scale ⊙ gnConv(norm(x))``, plus x if ``residual``, in two fused operations and the filter, whose own norms
        they compute too where it leaves those to them (see `filters`); None where they cannot serve."""
        return self._normed(x_BCHW, norm, scale_C, residual, None)

    def normed_in_turn(
        self, x_BCHW: torch.Tensor, norm: LayerNorm2d, scale_C: torch.Tensor | None, *, steps: Steps
    ) -> torch.Tensor | None:
        """`normed`, plus x, by kernels alone whose calls are added to ``steps``, to be made later; None where one of
        them cannot serve."""
        if type(self) is not GnConv or not hasattr(type(self.dwconv), "filtered_in_turn"):
            return None
        return self._normed(x_BCHW, norm, scale_C, True, steps)

    def _normed(
        self,
        x_BCHW: torch.Tensor,
        norm: LayerNorm2d,
        scale_C: torch.Tensor | None,
        residual: bool,
        steps: Steps | None,
    ) -> torch.Tensor | None:
        x_BCHW, linears = promoted(x_BCHW, scale_C), [*self.pws, self.proj_out]
        if type(self).forward is not GnConv.forward or changed(self) or len(linears) > MAX_ORDER:
            return None
        if not usable(x_BCHW, norm, self.proj_in, *linears, scale_C=scale_C):
            return None
        norms = None
        if hasattr(type(self.dwconv), "fusible_norms"):  # as of a mixer: not what a wrapper only hands on
            norms = self.dwconv.fusible_norms(sum(self.widths), x_BCHW.dtype)
            if norms is None and steps is not None:
                return None
        before, after, factor = norms or (None, None, 1.0)
        p_BCHW, *maps = norm_linear(x_BCHW, norm, self.proj_in, self.widths[0], then=before, steps=steps)
        if steps is not None:
            gates = self.dwconv.filtered_in_turn(*maps, steps=steps)
        else:
            gates = [self.dwconv(*maps)] if norms is None else self.dwconv.filtered(*maps)
        if gates is None:
            return None
        options = {"residual": residual, "norm": after, "factor": factor, "steps": steps}
        return gated(x_BCHW, p_BCHW, gates, linears, scale_C, **options)
