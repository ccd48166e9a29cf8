"""The ten official variants and small ones for 32×32 images, registered with timm.

Official: HorNet Table 1 and the authors' hornet.py; widths in `hornet_lit/network/hornet.py`. The small ones are ours.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from hornet_lit.network.block import MixerFactory
from hornet_lit.network.filters import DepthwiseConv, GlobalLocalFilter
from hornet_lit.network.gnconv import GnConv
from hornet_lit.network.hornet import HorNet

ORDERS = (2, 3, 4, 5)
OFFICIAL_DEPTHS = (2, 3, 18, 2)
SCALE = 1.0 / 3.0


def _mixers(kind: str, kernel_size: int = 7) -> list[MixerFactory]:
    conv = partial(DepthwiseConv, kernel_size=kernel_size, scale=SCALE)
    late = partial(GlobalLocalFilter, scale=SCALE) if kind == "gf" else conv
    return [partial(GnConv, order=n, filter=f) for n, f in zip(ORDERS, (conv, conv, late, late), strict=True)]


def _cfg(size: int = 224, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": 0.875 if size < 384 else 1.0,
        "crop_mode": "center" if size < 384 else "squash",
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "downsample_layers.0.0",
        "classifier": "head",
        "license": "mit",
        "paper_ids": "arXiv:2207.14284",
        "origin_url": "https://github.com/raoyongming/HorNet",
        **kwargs,
    }


def _small_cfg(stride: int) -> dict[str, Any]:
    side = 32 // stride
    own = {"license": "apache-2.0", "origin_url": "", "crop_pct": 1.0, "num_classes": 10, "pool_size": (side, side)}
    return _cfg(32, **own)


default_cfgs = generate_default_cfgs(
    {f"hornet_{size}_{kind}.untrained": _cfg() for size in ("tiny", "small", "base", "large") for kind in ("7x7", "gf")}
    | {f"hornet_{size}_gf_img384.untrained": _cfg(384) for size in ("base", "large")}
    | {
        "hornet_femto_32.untrained": _small_cfg(8),
        "hornet_pico_32.untrained": _small_cfg(16),
        "hornet_nano_32.untrained": _small_cfg(8),
        "hornet_nano_gf_32.untrained": _small_cfg(8),
        "hornet_tiny_32.untrained": _small_cfg(8),
    }
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> HorNet:
    stages = tuple(range(len(kwargs["depths"])))
    return build_model_with_cfg(
        HorNet, name, pretrained, feature_cfg={"out_indices": stages, "feature_cls": "getter"}, **kwargs
    )


def _official(name: str, base_dim: int, kind: str, pretrained: bool, kwargs: dict[str, Any], size: int = 224) -> HorNet:
    own = {"base_dim": base_dim, "depths": OFFICIAL_DEPTHS, "mixers": _mixers(kind), "img_size": size}
    return _create(name, pretrained, **(own | kwargs))


@register_model
def hornet_tiny_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-T, 7×7 filters: 22.4 M parameters, 82.8 % ImageNet-1k top-1 as published."""
    return _official("hornet_tiny_7x7", 64, "7x7", pretrained, kwargs)


@register_model
def hornet_tiny_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-T, global-local filters: 23.0 M parameters, 83.0 % as published."""
    return _official("hornet_tiny_gf", 64, "gf", pretrained, kwargs)


@register_model
def hornet_small_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-S, 7×7 filters: 49.5 M parameters, 83.8 % as published."""
    return _official("hornet_small_7x7", 96, "7x7", pretrained, kwargs)


@register_model
def hornet_small_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-S, global-local filters: 50.4 M parameters, 84.0 % as published."""
    return _official("hornet_small_gf", 96, "gf", pretrained, kwargs)


@register_model
def hornet_base_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-B, 7×7 filters: 87.3 M parameters, 84.2 % as published."""
    return _official("hornet_base_7x7", 128, "7x7", pretrained, kwargs)


@register_model
def hornet_base_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-B, global-local filters: 88.4 M parameters, 84.3 % as published."""
    return _official("hornet_base_gf", 128, "gf", pretrained, kwargs)


@register_model
def hornet_base_gf_img384(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-B, global-local filters, for 384² images."""
    return _official("hornet_base_gf_img384", 128, "gf", pretrained, kwargs, size=384)


@register_model
def hornet_large_7x7(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-L, 7×7 filters: 194.5 M parameters, pre-trained on ImageNet-22k as published."""
    return _official("hornet_large_7x7", 192, "7x7", pretrained, kwargs)


@register_model
def hornet_large_gf(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-L, global-local filters: 196.3 M parameters, pre-trained on ImageNet-22k as published."""
    return _official("hornet_large_gf", 192, "gf", pretrained, kwargs)


@register_model
def hornet_large_gf_img384(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-L, global-local filters, for 384² images."""
    return _official("hornet_large_gf_img384", 192, "gf", pretrained, kwargs, size=384)


def _small(name: str, pretrained: bool, kwargs: dict[str, Any], kind: str = "7x7", **defaults: Any) -> HorNet:
    kernel_size = kwargs.pop("kernel_size", 7)
    # The published initial values (weights of std 0.02, LayerScale 1e-6) are for 300 epochs of wide networks: at 32
    # channels they make each gate a product of near zeros, and the first epochs go into growing it.
    own = {"img_size": 32, "ls_init_value": 0.5, "init_std": None}
    own["recompute"] = False  # 32×32 images take little memory
    options = own | defaults | kwargs
    return _create(name, pretrained, **({"mixers": _mixers(kind, kernel_size)[: len(options["depths"])]} | options))


@register_model
def hornet_femto_32(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """For 32×32 images, minutes and two CPU cores: blocks at 8² and 4² alone. ``kernel_size`` optional."""
    return _small("hornet_femto_32", pretrained, kwargs, stem_stride=2, base_dim=32, depths=(0, 2, 2), mlp_ratio=2.0)


@register_model
def hornet_pico_32(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """For 32×32 images on two CPU cores: stem stride 2, so the stages see 16², 8², 4², 2². ``kernel_size`` optional."""
    return _small("hornet_pico_32", pretrained, kwargs, stem_stride=2, base_dim=32, depths=(1, 1, 3, 1), mlp_ratio=2.0)


@register_model
def hornet_nano_32(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """For 32×32 images: stem stride 1, so the stages see 32², 16², 8², 4². ``kernel_size`` optional."""
    return _small("hornet_nano_32", pretrained, kwargs, stem_stride=1, base_dim=32, depths=(2, 2, 6, 2))


@register_model
def hornet_nano_gf_32(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """`hornet_nano_32` with global-local filters in its last two stages."""
    return _small("hornet_nano_gf_32", pretrained, kwargs, kind="gf", stem_stride=1, base_dim=32, depths=(2, 2, 6, 2))


@register_model
def hornet_tiny_32(pretrained: bool = False, **kwargs: Any) -> HorNet:
    """HorNet-T's widths and depths for 32×32 images: stem stride 1, stages at 32², 16², 8², 4²."""
    return _small("hornet_tiny_32", pretrained, kwargs, stem_stride=1, base_dim=64)
