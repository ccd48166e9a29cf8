"""Filters: the depth-wise spatial slot inside gnConv.

A filter factory is called as ``filter(channels, size=(H, W))`` and gives a module that maps (B, C, H, W) to the same
shape, channel by channel. The 1/α of the paper's equation (3.3) lives in the filter, because each filter can fold it
into a tensor as small as its parameters, where the published code pays a pass over the whole activation.

A filter that begins and ends with a norm may leave both to gnConv's fused operations: its class has two more methods,
``fusible_norms`` and ``filtered``, as `GlobalLocalFilter` does.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, trunc_normal_
from torch import nn

from hornet_lit.network.depthwise import depthwise_conv2d, depthwise_conv2d_in_turn
from hornet_lit.network.fused import usable_norm
from hornet_lit.network.layers import changed
from hornet_lit.network.native.steps import Steps
from hornet_lit.network.spectrum import Size, filter_spectrum, filter_spectrum_in_turn


class DepthwiseConv(nn.Conv2d):
    """Depth-wise K×K convolution with bias, times ``scale`` (HorNet §3.2; K = 7 in the paper).

    Args:
        channels: C.
        size: (H, W) of the feature map; not needed by a convolution, taken so that every filter is built alike.
        kernel_size: K, odd, so that H×W is kept.
        scale: factor on the output.
        bias: whether to add a bias (scaled as well).

    Raises:
        ValueError: if ``kernel_size`` is even.
    """

    def __init__(
        self, channels: int, *, size: Size | None = None, kernel_size: int = 7, scale: float = 1.0, bias: bool = True
    ) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd to keep H×W, got {kernel_size}: use {kernel_size + 1}")
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias)
        self.scale = scale

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias * self.scale
        return depthwise_conv2d(x_BCHW, self.weight * self.scale, bias)

    def filtered_in_turn(self, x_BCHW: torch.Tensor, *, steps: Steps) -> list[torch.Tensor] | None:
        """`forward` by a kernel whose call is added to ``steps``, to be made later; None if that would be another."""
        if type(self) is not DepthwiseConv or changed(self):
            return None
        bias = None if self.bias is None else self.bias * self.scale
        y_BCHW = depthwise_conv2d_in_turn(x_BCHW, self.weight * self.scale, bias, steps)
        return None if y_BCHW is None else [y_BCHW]


class GlobalLocalFilter(nn.Module):
    """Global-local filter (HorNet §3.3, after GFNet): half of the channels 3×3, half multiplied in the spectrum.

    LayerNorm → first half: 3×3 depth-wise convolution; second half: rfft2 · learned complex weight · irfft2 (see
    `spectrum`) → halves interleaved channel by channel → LayerNorm, times ``scale``.

    Args:
        channels: C, even.
        size: (H, W) at which the spectrum's weight, stored (C/2, H, F, 2), needs no resizing. Other input sizes
            work: the weight is then resized bilinearly (align_corners) at run time, as in the published code.
        scale: factor on the output.

    Raises:
        ValueError: if ``channels`` is odd.
    """

    def __init__(self, channels: int, *, size: Size, scale: float = 1.0) -> None:
        super().__init__()
        if channels % 2:
            raise ValueError(f"GlobalLocalFilter halves its channels and got {channels}: use an even number")
        half, (height, width) = channels // 2, size
        self.scale = scale
        self.dw = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.complex_weight = nn.Parameter(torch.empty(half, height, width // 2 + 1, 2))
        self.pre_norm = LayerNorm2d(channels, eps=1e-6)
        self.post_norm = LayerNorm2d(channels, eps=1e-6)
        self.init_weights()

    def init_weights(self) -> None:
        trunc_normal_(self.complex_weight, std=0.02)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        halves = self.filtered(*self.pre_norm(x_BCHW).chunk(2, dim=1))
        x_BHWC = torch.stack([half_BCHW.permute(0, 2, 3, 1) for half_BCHW in halves], dim=-1).flatten(3)
        # LayerNorm written out to scale its two vectors and not its output.
        norm = self.post_norm
        weight, bias = norm.weight * self.scale, norm.bias * self.scale
        return F.layer_norm(x_BHWC, weight.shape, weight, bias, norm.eps).permute(0, 3, 1, 2)

    def filtered(self, local_BCHW: torch.Tensor, global_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both halves between the two norms."""
        local_BCHW = depthwise_conv2d(local_BCHW, self.dw.weight, None)
        return local_BCHW, filter_spectrum(global_BCHW, self.complex_weight).to(local_BCHW.dtype)

    def filtered_in_turn(
        self, local_BCHW: torch.Tensor, global_BCHW: torch.Tensor, *, steps: Steps
    ) -> list[torch.Tensor] | None:
        """`filtered` by kernels whose calls are added to ``steps``, to be made later; None where none serve."""
        if type(self) is not GlobalLocalFilter:
            return None
        local_BCHW = depthwise_conv2d_in_turn(local_BCHW, self.dw.weight, None, steps)
        global_BCHW = filter_spectrum_in_turn(global_BCHW, self.complex_weight, steps)
        return None if local_BCHW is None or global_BCHW is None else [local_BCHW, global_BCHW]

    def fusible_norms(self, channels: int, dtype: torch.dtype) -> tuple[LayerNorm2d, LayerNorm2d, float] | None:
        """Both norms, and the factor upon the second, for a caller who fuses them with its own operations and calls
        `filtered` between them; None if that would not be `forward`."""
        if type(self).forward is not GlobalLocalFilter.forward or changed(self):
            return None
        norms = self.pre_norm, self.post_norm
        return (*norms, self.scale) if all(usable_norm(norm, channels, dtype) for norm in norms) else None
