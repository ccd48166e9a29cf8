"""The HorNet backbone, with the interface timm's users rely on.

Shapes: B batch, C channels, H height, W width, K classes. From the stem's norm on every activation lies in memory
channels-last, whatever the input's layout: the norms read it as (B, H, W, C) without a copy.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from timm.layers import LayerNorm2d, SelectAdaptivePool2d, to_2tuple, trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import nn

from hornet_lit.network.block import Block, MixerFactory, in_turn, normed_and_strided
from hornet_lit.network.filters import Size
from hornet_lit.network.fused import may_take_turns
from hornet_lit.network.layers import Recomputing, StridedConv, changed

POOLS = ("avg", "max", "avgmax", "")
MAX_BLOCKS = 1000  # of all stages; the largest network has 25. More are a mistake, and would take all memory


class HorNet(nn.Module):
    """HorNet (arXiv 2207.14284): a stem and stages of blocks at strides s, 2s, 4s, 8s; then pool, LN, linear.

    Args:
        in_chans: channels of the input.
        num_classes: K; 0 leaves the classifier out.
        global_pool: one of "avg", "max", "avgmax", or "" (no pooling: `forward` gives (B, K, H, W)).
        output_stride: only the network's own stride (8 × ``stem_stride`` with four stages) exists; there for timm's
            callers.
        img_size: side, or (H, W), of the images to expect. Only filters that store a spectrum depend on it, and they
            are resized at run time for other sizes.
        stem_stride: 4 (published: a 4×4 patch stem), or 2 or 1 for small images (a 3×3 convolution).
        depths: blocks per stage; four stages as published, or fewer.
        base_dim: C of the first stage; doubled at each next one.
        mixers: one factory per stage, see `Block`.
        mlp_ratio, ls_init_value: see `Block`.
        init_std: standard deviation of the initial weights (0.02 as published), or None for 1 / sqrt(fan-in).
        head_init_scale: factor on the classifier's initial weights and bias.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, rising linearly from 0 over all blocks to this rate at the last.
        recompute: see `set_recompute`.

    Raises:
        ValueError: for settings that no HorNet can have, naming those it can.
    """

    def __init__(
        self,
        *,
        mixers: Sequence[MixerFactory],
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int | None = None,
        img_size: int | Size = 224,
        stem_stride: int = 4,
        depths: Sequence[int] = (2, 3, 18, 2),
        base_dim: int = 64,
        mlp_ratio: float = 4.0,
        ls_init_value: float | None = 1e-6,
        init_std: float | None = 0.02,
        head_init_scale: float = 1.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        recompute: bool = True,
    ) -> None:
        super().__init__()
        if stem_stride not in (1, 2, 4):
            raise ValueError(f"stem_stride must be 1, 2 or 4, got {stem_stride}")
        if not 1 <= len(depths) <= 4 or len(mixers) != len(depths):
            raise ValueError(
                f"HorNet has 1 to 4 stages, each with a mixer: got {len(depths)} depths and {len(mixers)} mixers"
            )
        if min(depths) < 0 or sum(depths) > MAX_BLOCKS:
            raise ValueError(f"depths {list(depths)} must be numbers of blocks, together at most {MAX_BLOCKS}")
        self.stride = stem_stride * 2 ** (len(depths) - 1)
        if output_stride not in (None, self.stride):
            raise ValueError(
                f"HorNet has no dilated form: output_stride must be {self.stride}, got {output_stride}. "
                "For finer maps use features_only=True with lower out_indices"
            )
        height, width = to_2tuple(img_size)
        self._check_size(height, width)
        self.num_classes, self.in_chans = num_classes, in_chans
        dims = [base_dim * 2**i for i in range(len(depths))]
        self.num_features = self.head_hidden_size = dims[-1]
        kernel = 4 if stem_stride == 4 else 3
        stem = StridedConv(in_chans, dims[0], kernel, stride=stem_stride, padding=0 if stem_stride == 4 else 1)
        self.downsample_layers = nn.ModuleList([nn.Sequential(stem, LayerNorm2d(dims[0], eps=1e-6))])
        for c in dims[:-1]:
            self.downsample_layers.append(
                nn.Sequential(LayerNorm2d(c, eps=1e-6), StridedConv(c, 2 * c, kernel_size=2, stride=2))
            )
        rates = iter(drop_path_rate * b / max(sum(depths) - 1, 1) for b in range(sum(depths)))
        self.stages, self.feature_info = nn.ModuleList(), []
        for i, (dim, mixer) in enumerate(zip(dims, mixers, strict=True)):
            reduction = stem_stride * 2**i
            options = {"mixer": mixer, "size": (height // reduction, width // reduction)}
            options |= {"mlp_ratio": mlp_ratio, "ls_init_value": ls_init_value}
            self.stages.append(nn.Sequential(*(Block(dim, drop_path=next(rates), **options) for _ in range(depths[i]))))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.recompute = recompute
        self.set_grad_checkpointing(False)
        self.init_weights(init_std, head_init_scale)

    def init_weights(self, init_std: float | None = 0.02, head_init_scale: float = 1.0) -> None:
        """Truncated normal weights for convolutions and linear layers, zero biases, scaled head (published init)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                trunc_normal_(module.weight, std=init_std or module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if isinstance(self.head, nn.Linear):
            with torch.no_grad():
                self.head.weight.mul_(head_init_scale)
                self.head.bias.mul_(head_init_scale)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """timm's parameter groups. Fine groups are the published layers of layer decay, 14 for the official depths:
        two stage-3 blocks share a layer, and so does each downsampling with the stage behind it, except the last two.
        """
        if coarse:
            return {"stem": r"^downsample_layers\.0", "blocks": r"^(?:downsample_layers|stages)\.(\d+)"}
        groups = {
            "stem": r"^downsample_layers\.0\.",
            "stage1": r"^stages\.0\.",
            "stage2": r"^(?:downsample_layers\.1|stages\.1)\.",
        }
        blocks: dict[int, list[str]] = {}
        for b in range(len(self.stages[2]) if len(self.stages) > 2 else 0):
            blocks.setdefault(min(b // 2, 8), []).append(str(b))
        for i, members in blocks.items():
            pattern = rf"stages\.2\.(?:{'|'.join(members)})\."
            groups[f"stage3_{i}"] = rf"^(?:downsample_layers\.2\.|{pattern})" if i == 0 else rf"^{pattern}"
        groups["stage4"] = r"^(?:downsample_layers\.3|stages\.3)\."
        groups["head"] = r"^(?:norm|head)\."
        return groups

    def no_weight_decay(self) -> set[str]:
        """Names exempt from weight decay beyond the 1-d ones that timm's optimizers always exempt: none."""
        return set()

    def set_recompute(self, enable: bool = True) -> None:
        """Compute what is cheap (gates, GELU, a norm) again in the backward pass: half of the memory (BENCHMARKS.md).

        Without it steps are faster where memory is no concern. No effect under torch.compile, which decides by itself,
        and where the fused CPU operations run, which keep as little in any case (see `pixelwise`).
        """
        self.recompute = enable
        for i, stage in enumerate(self.stages):
            for module in stage.modules():
                if isinstance(module, Recomputing):
                    module.recompute = enable and i not in self.grad_checkpointing

    def set_grad_checkpointing(self, enable: bool | Collection[int] = True) -> None:
        """Keep only the blocks' inputs, and compute each block again in the backward pass: in all stages, or in those
        given by number from 0 (the first hold the most memory).

        Raises:
            ValueError: for a stage that the network does not have.
        """
        stages = range(len(self.stages)) if enable is True else enable or ()
        if unknown := set(stages) - set(range(len(self.stages))):
            raise ValueError(f"grad_checkpointing names stage {min(unknown)}: stages are 0 to {len(self.stages) - 1}")
        self.grad_checkpointing = frozenset(stages)
        self.set_recompute(self.recompute)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier of ``num_classes`` (0: none) in place, and another pooling if given."""
        if global_pool is not None:
            if global_pool not in POOLS:
                raise ValueError(f"global_pool must be one of {', '.join(map(repr, POOLS))}, got {global_pool!r}")
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes > 0:
            like = self.norm.weight
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def forward_intermediates(
        self,
        x_BCHW: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Outputs of the chosen stages (B, C_i, H_i, W_i), with the final features unless ``intermediates_only``.

        Args: as in timm: ``indices`` the last n stages if an int, those stages if a list, all if None; ``norm``
            applies the network's last LayerNorm to the last stage's output; ``stop_early`` runs no further than needed.

        Raises:
            ValueError: for another ``output_fmt`` than "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x_BCHW = self._checked(x_BCHW)
        for i in range(last + 1 if stop_early else len(self.stages)):
            x_BCHW = self._stage(i, x_BCHW)
            if i in take:
                is_last = i == len(self.stages) - 1
                intermediates.append(self._norm_last(x_BCHW) if norm and is_last else x_BCHW)
        return intermediates if intermediates_only else (x_BCHW, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last of ``indices`` (and norm and head if asked); gives the indices as a list."""
        take, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        self.downsample_layers = self.downsample_layers[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.head, self.num_classes = nn.Identity(), 0
        return take

    def forward_features(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) → (B, num_features, H / stride, W / stride), neither pooled nor normalised."""
        x_BCHW = self._checked(x_BCHW)
        for i in range(len(self.stages)):
            x_BCHW = self._stage(i, x_BCHW)
        return x_BCHW

    def forward_head(self, x_BCHW: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool → LN → dropout → classifier: (B, C, H, W) → (B, K); (B, C) with ``pre_logits``."""
        x = self.global_pool(x_BCHW)
        if x.ndim == 4:
            x_BHWC = self.head_drop(self.norm(x.permute(0, 2, 3, 1)))
            return (x_BHWC if pre_logits else self.head(x_BHWC)).permute(0, 3, 1, 2)
        x_BC = self.head_drop(self.norm(x))
        return x_BC if pre_logits else self.head(x_BC)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x_BCHW))

    def _stage(self, i: int, x_BCHW: torch.Tensor) -> torch.Tensor:
        y_BCHW = normed_and_strided(self.downsample_layers[i], x_BCHW)
        x_BCHW = self.downsample_layers[i](x_BCHW) if y_BCHW is None else y_BCHW
        stage = self.stages[i]
        if i in self.grad_checkpointing and self.training:
            return checkpoint_seq(stage, x_BCHW)
        if may_take_turns(x_BCHW) and type(stage) is nn.Sequential and not changed(stage):
            return in_turn(stage, x_BCHW)
        return stage(x_BCHW)

    def _norm_last(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.norm(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _checked(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        if x_BCHW.ndim != 4 or x_BCHW.shape[1] != self.in_chans:
            raise ValueError(f"expected images (B, {self.in_chans}, H, W), got {tuple(x_BCHW.shape)}")
        self._check_size(x_BCHW.shape[2], x_BCHW.shape[3])
        return x_BCHW

    def _check_size(self, height: int, width: int) -> None:
        if height < self.stride or width < self.stride:
            raise ValueError(
                f"images of {height}×{width} vanish in a network of stride {self.stride}: use at least "
                f"{self.stride}×{self.stride}, or a variant with a smaller stem (hornet_*_32)"
            )
