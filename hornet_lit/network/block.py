"""HorNet's block, and the ways of a map through a whole stage and from one to the next.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers import DropPath, LayerNorm2d
from torch import nn

from hornet_lit.network.filters import Size
from hornet_lit.network.fused import promoted, usable
from hornet_lit.network.layers import GELU, ChannelLinear, Recomputing, StridedConv, changed
from hornet_lit.network.native.steps import Steps
from hornet_lit.network.pixelwise import norm_mlp, norm_strided

MixerFactory = Callable[..., nn.Module]


class Block(Recomputing):
    """x += γ₁·mixer(LN(x)); x += γ₂·MLP(LN(x)) (HorNet §3.2, the meta-architecture of Figure 2).

    Args:
        dim: C.
        mixer: factory of the token-mixing slot, called as ``mixer(C, size=size)``; keeps (B, C, H, W).
        size: (H, W) expected, handed to the mixer.
        mlp_ratio: hidden over outer width of the MLP.
        ls_init_value: initial value of both γ; None or 0 leaves them out.
        drop_path: probability of dropping each of the two branches in training.
    """

    def __init__(
        self,
        dim: int,
        *,
        mixer: MixerFactory,
        size: Size,
        mlp_ratio: float = 4.0,
        ls_init_value: float | None = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = LayerNorm2d(dim, eps=1e-6)
        # Attribute names are those of the published checkpoints: "gnconv" is the mixer, whatever it is.
        self.gnconv = mixer(dim, size=size)
        self.norm2 = LayerNorm2d(dim, eps=1e-6)
        self.pwconv1 = ChannelLinear(dim, hidden)
        self.act = GELU()
        self.pwconv2 = ChannelLinear(hidden, dim)
        self.gamma1 = nn.Parameter(torch.full((dim,), float(ls_init_value))) if ls_init_value else None
        self.gamma2 = nn.Parameter(torch.full((dim,), float(ls_init_value))) if ls_init_value else None
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        dropping = self.training and not isinstance(self.drop_path, nn.Identity)
        for fused, branch, gamma_C in (
            (self._fused_mixer, self._mixer, self.gamma1),
            (self._fused_mlp, self._mlp, self.gamma2),
        ):
            y_BCHW = fused(x_BCHW, not dropping)
            if y_BCHW is None:
                x_BCHW = self._add(x_BCHW, branch(x_BCHW), gamma_C)
            else:
                x_BCHW = self._add(x_BCHW, y_BCHW, None) if dropping else y_BCHW
        return x_BCHW

    def _mixer(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.gnconv(self.norm1(x_BCHW))

    def _mlp(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        hidden_BCHW = self.keeping_inputs(lambda x: self.pwconv1(self.norm2(x)), x_BCHW)
        return self.keeping_inputs(lambda hidden: self.pwconv2(self._activated(hidden)), hidden_BCHW)

    def _fused_mixer(self, x_BCHW: torch.Tensor, residual: bool) -> torch.Tensor | None:
        """γ₁·mixer(LN(x)), plus x if ``residual``, by a mixer that has a way of its own to compute that."""
        if not hasattr(type(self.gnconv), "normed"):  # a wrapper may hand on attributes, and is another mixer
            return None
        return self.gnconv.normed(x_BCHW, self.norm1, self.gamma1, residual=residual)

    def _fused_mlp(self, x_BCHW: torch.Tensor, residual: bool, steps: Steps | None = None) -> torch.Tensor | None:
        if not usable(x_BCHW, self.norm2, self.pwconv1, self.pwconv2, scale_C=self.gamma2, act=self.act):
            return None
        layers = self.norm2, self.pwconv1, self.pwconv2
        return norm_mlp(x_BCHW, *layers, self.gamma2, residual=residual, steps=steps)

    def in_turn(self, x_BCHW: torch.Tensor, steps: Steps) -> torch.Tensor | None:
        """`forward` by kernels alone whose calls are added to ``steps``, to be made later; None where one of them
        cannot serve, or somebody needs to see this block's own input and output."""
        dropping = self.training and not isinstance(self.drop_path, nn.Identity)
        if dropping or type(self) is not Block or changed(self):
            return None
        if not hasattr(type(self.gnconv), "normed_in_turn"):
            return None
        made = len(steps.calls)
        steps.begin(x_BCHW)
        y_BCHW = self.gnconv.normed_in_turn(x_BCHW, self.norm1, self.gamma1, steps=steps)
        if y_BCHW is not None:
            y_BCHW = self._fused_mlp(y_BCHW, True, steps)
        if y_BCHW is None:
            del steps.calls[made:]
        return y_BCHW

    def _activated(self, hidden_BCHW: torch.Tensor) -> torch.Tensor:
        """GELU; in place, so that the block's largest tensor exists once, where no hook can have kept its input."""
        hooks = self.pwconv1._forward_hooks or self.act._forward_pre_hooks or self.act._forward_hooks
        if hooks or type(self.act) is not GELU or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.act(hidden_BCHW)
        return self.act(hidden_BCHW, overwrite=True)

    def _add(self, x_BCHW: torch.Tensor, y_BCHW: torch.Tensor, gamma_C: torch.Tensor | None) -> torch.Tensor:
        """x + γ ⊙ y in one pass over the map: stochastic depth drops γ in place of y."""
        if gamma_C is None:
            return x_BCHW + self.drop_path(y_BCHW)
        gamma = gamma_C.view(-1, 1, 1)
        if self.training and not isinstance(self.drop_path, nn.Identity):
            gamma = gamma * self.drop_path(x_BCHW.new_ones(x_BCHW.shape[0], 1, 1, 1))
        return torch.addcmul(x_BCHW, y_BCHW, gamma)


def normed_and_strided(layers: nn.Module, x_BCHW: torch.Tensor) -> torch.Tensor | None:
    """A step between stages, LayerNorm and convolution, in one fused operation; None where that cannot serve."""
    if type(layers) is not nn.Sequential or changed(layers) or len(layers) != 2:
        return None
    norm, conv = layers
    if type(norm) is not LayerNorm2d or type(conv) is not StridedConv:
        return None
    x_BCHW = promoted(x_BCHW, norm.weight)
    if not usable(x_BCHW, norm, conv, scale_C=None):
        return None
    if min(x_BCHW.shape[2:]) < conv.kernel_size[0]:  # no patch: the library's own error is the clearest
        return None
    return norm_strided(x_BCHW, norm, conv)


def in_turn(stage: nn.Sequential, x_BCHW: torch.Tensor) -> torch.Tensor:
    """A stage's blocks, where possible by kernels that each thread runs for its images through all of them: threads
    wait for each other, and for Python, once a stage."""
    steps, start_BCHW = Steps(), x_BCHW
    for block in stage:
        y_BCHW = block.in_turn(x_BCHW, steps) if isinstance(block, Block) else None
        if y_BCHW is None:
            steps.run(start_BCHW)
            steps, start_BCHW = Steps(), block(x_BCHW)
            y_BCHW = start_BCHW
        x_BCHW = y_BCHW
    steps.run(start_BCHW)
    return x_BCHW
