"""The published ImageNet transforms, from timm's factory, as uint8 tensors; the rest follows on the device.

In training, parts of timm's are replaced by quicker ones, see `quick`; evaluation is timm's to the last bit.

Source: main training script and datasets.py of raoyongming/HorNet, reference recipe in hornet.md §3.

Shape letters: B batch, V views of an image, C channels, H height, W width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import Compose
from torchvision.transforms.functional import five_crop

from .quick import quicken, replace_ops
from .sampling import random_from, seed_from

Transform = Callable[[Image.Image], Tensor]  # PIL image → uint8 CHW, or VCHW

COLOR_JITTER = 0.4
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming")
SQUASH_FROM = 384  # from this size on, evaluation resizes to the square and crops nothing


def eval_transform(
    *,
    img_size: int,
    in_chans: int = 3,
    crop_pct: float | None = None,
    interpolation: str = "bicubic",
    five_crops: bool = False,
) -> Transform:
    """Resize the short side to img_size / crop_pct and cut out the middle.

    Args:
        img_size: side of the square that comes out, in pixels.
        in_chans: 1 or 3.
        crop_pct: share of the short side that stays; None for the published rule: 0.875 below 384, and at 384 or more a
            resize to the square (the aspect ratio is not kept) without a crop.
        interpolation: of the resize, by timm's names; "random", which is for training, gives bicubic.
        five_crops: cut out the four corners as well.

    Returns:
        A function from a PIL image to uint8 CHW; with `five_crops` to VCHW, the middle first.

    Raises:
        ValueError: an interpolation that does not exist, or five crops where nothing is cropped.
    """
    interpolation = _checked_interpolation(interpolation)
    squash = crop_pct is None and img_size >= SQUASH_FROM
    if squash and five_crops:
        raise ValueError(
            f"at {img_size} pixels the whole image is resized and nothing cropped, so there are no five crops: "
            "set data.crop_pct, such as 0.875, or data.views flip"
        )
    transform = create_transform(
        input_size=(in_chans, img_size, img_size),
        is_training=False,
        use_prefetcher=True,  # timm's word for: leave it uint8
        interpolation="bicubic" if interpolation == "random" else interpolation,
        crop_pct=1.0 if squash else (crop_pct or 0.875),
        crop_mode="squash" if squash else "center",
    )
    if not five_crops:
        return transform
    resize, _, to_tensor = transform.transforms
    return Compose([resize, _FiveCrops(img_size, to_tensor)])


class _FiveCrops:
    """The middle and the four corners of a PIL image, stacked: uint8 VCHW."""

    def __init__(self, size: int, to_tensor: Transform) -> None:
        self.size = size
        self.to_tensor = to_tensor

    def __call__(self, image: Image.Image) -> Tensor:
        *corners, middle = five_crop(image, [self.size, self.size])
        return torch.stack([self.to_tensor(view) for view in (middle, *corners)])


def train_transform(
    *,
    img_size: int,
    in_chans: int = 3,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    color_jitter: float = COLOR_JITTER,
    auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    interpolation: str = "bicubic",
    mean: Sequence[float],
) -> Transform:
    """Random resized crop, flip, then RandAugment (or, without it, colour jitter).

    Args:
        img_size: side of the square that comes out, in pixels.
        in_chans: 1 or 3.
        scale, ratio: area and aspect ratio of the crop.
        hflip: probability of a left-right flip.
        color_jitter: strength; as in the published code it acts only when there is no auto_augment (or a `3a` one).
        auto_augment: timm's configuration string, or None.
        interpolation: by timm's names, "random" included.
        mean: of the set, in 0–1: the colour that RandAugment fills corners with.

    Returns:
        A function from a PIL image to uint8 CHW; it draws from the global generators of python, numpy and torch.

    Raises:
        ValueError: an interpolation or an auto_augment that timm does not know.
    """
    interpolation = _checked_interpolation(interpolation)
    if auto_augment and color_jitter != COLOR_JITTER and "3a" not in auto_augment:
        warnings.warn(
            f"color_jitter={color_jitter} has no effect while auto_augment={auto_augment!r} is set (as in timm)",
            stacklevel=2,
        )
    with _naming(auto_augment):
        transform = create_transform(
            input_size=(in_chans, img_size, img_size),
            is_training=True,
            use_prefetcher=True,
            scale=tuple(scale),
            ratio=tuple(ratio),
            hflip=hflip,
            color_jitter=color_jitter or None,
            auto_augment=auto_augment or None,
            interpolation=interpolation,
            mean=tuple(mean),
        )
    for part in transform.transforms:
        replace_ops(part, MENDED)
    return quicken(transform)


def rand_augment(config: str, hparams: dict[str, Any]) -> Callable[[Image.Image], Image.Image]:
    """timm's RandAugment from its configuration string; `hparams` as in timm (translate_const, img_mean)."""
    if not config.startswith("rand"):
        raise ValueError(f"auto_augment is {config!r}: give a RandAugment string such as rand-m9-mstd0.5-inc1")
    with _naming(config):
        transform = rand_augment_transform(config, dict(hparams))
    replace_ops(transform, MENDED)
    return transform


def check_share(**shares: float) -> None:
    """ValueError that names the setting where a probability or share is none."""
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}: give a share between 0 and 1")


def check_crop(
    *, scale: tuple[float, float], ratio: tuple[float, float], crop_pct: float | None, color_jitter: float
) -> None:
    """ValueError that names the setting where a crop or a jitter has no meaning."""
    for name, (low, high), most in (("scale", scale, 1.0), ("ratio", ratio, math.inf)):
        if not 0 < low <= high <= most or high == math.inf:
            limit = ", up to 1" if most == 1 else ""
            raise ValueError(f"{name} is {[low, high]}: give a range from low to high, above 0{limit}")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct is {crop_pct}: give a share above 0, up to 1, or null")
    if not 0 <= color_jitter < math.inf:
        raise ValueError(f"color_jitter is {color_jitter}: it must be at least 0")


def _checked_interpolation(name: str) -> str:
    if name not in (*INTERPOLATIONS, "random"):
        raise ValueError(f"interpolation is {name!r}: choose {', '.join(INTERPOLATIONS)}, or random for training")
    return name


@contextmanager
def _naming(auto_augment: str | None) -> Iterator[None]:
    """timm asserts what it finds in the configuration string; a user gets to read which setting it is."""
    try:
        yield
    except (AssertionError, KeyError, ValueError) as error:
        if not auto_augment:
            raise
        raise ValueError(
            f"auto_augment is {auto_augment!r} ({error}): give a string of timm's such as rand-m9-mstd0.5-inc1, or null"
        ) from error


def _posterize(image: Image.Image, bits_to_keep: int, **kwargs: Any) -> Image.Image:
    return posterize(image, bits_to_keep, **kwargs) if bits_to_keep > 0 else Image.new(image.mode, image.size)


# timm's posterize keeps 0 bits, which the published magnitudes ask for and Pillow 13 refuses: a black image.
MENDED = {posterize: _posterize}


class KeyedRandomErasing:
    """timm's RandomErasing of a normalised batch, on its device, from a seed of its own and disturbing no generator.

    Args:
        probability: per image.
        mode: "pixel" (noise per pixel, the published one), "rand" (one colour per box) or "const" (black).
    """

    def __init__(self, *, probability: float, mode: str) -> None:
        self.probability = probability
        self.mode = mode

    def __call__(self, x_BCHW: Tensor, *key: int) -> Tensor:
        """Erase in place; `key` are the numbers that the seed is made of."""
        erase = RandomErasing(self.probability, mode=self.mode, device=x_BCHW.device)
        with random_from(*key):
            if x_BCHW.device.type != "cuda":
                return erase(x_BCHW)
            state = torch.cuda.get_rng_state(x_BCHW.device)
            try:
                with torch.cuda.device(x_BCHW.device):
                    torch.cuda.manual_seed(seed_from(*key))
                    return erase(x_BCHW)
            finally:
                torch.cuda.set_rng_state(state, x_BCHW.device)
