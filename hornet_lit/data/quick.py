"""The costly ones of timm's PIL transforms, computed otherwise: the same random draws, the same pixels up to rounding.

Found by measurement on ImageNet's JPEGs (`python -m tests.data.throughput`): beside decoding, the time goes into
Pillow's resize, which is not vectorised, and into its bicubic affine transforms, which gather 16 pixels in double
precision where a shear or a shift needs 4. How far the pixels may differ is stated, and held to, in
tests/data/test_quick.py.

Shape letters: C channels, H height, W width, L the lines (rows or columns) of an image.
Pixels are handled as 32-bit words of red, green, blue and nothing, which is how Pillow keeps RGB.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import auto_augment as timm_ops
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode
from torchvision.transforms.functional import resized_crop

_MODES = {InterpolationMode.BICUBIC: "bicubic", InterpolationMode.BILINEAR: "bilinear"}
_WORD = np.dtype("<i4")
# Elsewhere torch resizes uint8 three times slower than Pillow.
_HAS_KERNEL = torch.backends.cpu.get_cpu_capability().startswith("AVX")


def quicken(transform: Compose) -> Compose:
    """timm's training transform with its costly parts replaced; `transform` is changed."""
    for place, part in enumerate(transform.transforms):
        if type(part) is RandomResizedCropAndInterpolation:
            part.__class__ = _ResizedCrop
        elif type(part) is MaybePILToTensor:
            transform.transforms[place] = _to_tensor
        replace_ops(part, QUICKER)
    return transform


def replace_ops(part: object, other: dict[Callable[..., Image.Image], Callable[..., Image.Image]]) -> None:
    """Give the operations of timm's AutoAugment, RandAugment or AugMix other functions; their draws stay."""
    policies = getattr(part, "policy", [])
    for op in [*getattr(part, "ops", []), *(op for policy in policies for op in policy)]:
        if hasattr(op, "aug_fn"):
            op.aug_fn = other.get(op.aug_fn, op.aug_fn)


def words(image: Image.Image) -> np.ndarray:
    """Pixels of an RGB image as int32 (H, W)."""
    return np.frombuffer(image.tobytes("raw", "RGBX"), _WORD).reshape(image.height, image.width)


def from_words(pixel_HW: np.ndarray) -> Image.Image:
    """The inverse of `words`."""
    height, width = pixel_HW.shape
    return Image.frombytes("RGB", (width, height), np.ascontiguousarray(pixel_HW), "raw", "RGBX")


def _to_tensor(image: Image.Image) -> Tensor:
    """uint8 CHW, contiguous, so that stacking a batch is a plain copy."""
    if image.mode != "RGB":
        return MaybePILToTensor()(image)
    pixel_HW = words(image)
    x_CHW = np.empty((3, *pixel_HW.shape), np.uint8)
    for channel in range(3):
        np.copyto(x_CHW[channel], pixel_HW >> 8 * channel, casting="unsafe")
    return torch.from_numpy(x_CHW)


class _ResizedCrop(RandomResizedCropAndInterpolation):
    """Resizes by torch's vectorised kernel, which rounds as Pillow does (along rows first, then columns, in uint8)."""

    def __call__(self, image: Image.Image) -> Image.Image:
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        chosen = self.interpolation
        interpolation = random.choice(chosen) if isinstance(chosen, list | tuple) else chosen
        is_empty = height == 0 or width == 0  # of an image of a pixel or two: Pillow makes it black
        if not _HAS_KERNEL or is_empty or image.mode != "RGB" or interpolation not in _MODES:
            return resized_crop(image, top, left, height, width, self.size, interpolation)
        pixel_HW = words(image.crop((left, top, left + width, top + height)))
        # Four channels, the last one empty, go faster through the kernel than three. A copy, since torch warns of
        # memory that it must not write.
        x_1HWC = torch.from_numpy(pixel_HW.copy().view(np.uint8).reshape(1, height, width, 4))
        x_1CHW = x_1HWC.permute(0, 3, 1, 2)
        x_1CHW = F.interpolate(x_1CHW, list(self.size), mode=_MODES[interpolation], antialias=True)
        return from_words(x_1CHW.permute(0, 2, 3, 1).contiguous().numpy().view(_WORD)[0, :, :, 0])


def slide(image: Image.Image, offset_L: np.ndarray, *, axis: int, fill: tuple[int, int, int]) -> Image.Image:
    """Move each line of an image along itself: pixel i of line l is read at i + offset_L[l], bicubically interpolated.

    As Pillow's affine transform: the kernel with a = -1, border pixels repeated under it, fractions cut off and not
    rounded.

    Args:
        image: RGB.
        offset_L: float64, one per row (axis 1) or column (axis 0), in pixels.
        axis: 1 to move rows, 0 to move columns.
        fill: colour of what comes from beyond the border.
    """
    pixel_HW = words(image)
    height, width = pixel_HW.shape
    length = pixel_HW.shape[axis]
    along, across = (lambda a: np.expand_dims(a, 1 - axis)), (lambda a: np.expand_dims(a, axis))
    whole_L = np.floor(offset_L)
    step_L = whole_L.astype(np.int32)
    # Taps -1 … 2 of all pixels of a line are the same pixels, so each is fetched, and made a float, once.
    place = np.clip(along(np.arange(-1, length + 2, dtype=np.int32)) + across(step_L), 0, length - 1)
    line_L = across(np.arange(len(offset_L), dtype=np.int32))
    source = place + line_L * width if axis == 1 else place * width + line_L
    x = pixel_HW.reshape(-1).take(source).view(np.uint8)
    x_HW4 = torch.from_numpy(x.reshape(len(source), -1)).float()  # and three lines more along `axis`
    weights = _cubic(offset_L - whole_L)
    if axis == 1:
        taps = [(x_HW4[:, 4 * k : 4 * (k + length)], weight_L[:, None]) for k, weight_L in enumerate(weights)]
    else:
        taps = [(x_HW4[k : k + length], weight_L.repeat_interleave(4)) for k, weight_L in enumerate(weights)]
    sum_HW4 = taps[0][0] * taps[0][1]
    for tap_HW4, weight in taps[1:]:
        sum_HW4.addcmul_(tap_HW4, weight)
    # Before fractions are cut off: a plain area must not fall by one because of the weights' rounding.
    sum_HW4.add_(1e-3).clamp_(0, 255)
    moved_HW = sum_HW4.numpy().astype(np.uint8).view(_WORD)
    pixel, middle_L = along(np.arange(length, dtype=np.int32)), offset_L + 0.5
    first_L = np.ceil(-middle_L).astype(np.int32)  # 0 ≤ i + ½ + offset
    end_L = np.ceil(length - middle_L).astype(np.int32)  # i + ½ + offset < length
    outside_HW = (pixel < across(first_L)) | (pixel >= across(end_L))
    red, green, blue = fill
    np.copyto(moved_HW, np.int32(red | green << 8 | blue << 16), where=outside_HW)
    return from_words(moved_HW.reshape(height, width))


def _cubic(part_L: np.ndarray) -> list[Tensor]:
    """Weights of the taps -1, 0, 1, 2 at `part_L` between tap 0 and tap 1: float32 L each."""
    d = part_L
    weights = (-d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2)
    return [torch.from_numpy(weight_L.astype(np.float32)) for weight_L in weights]


_Op = Callable[..., Image.Image]


def _sheared(amount: float, *, lines: int, length: int) -> np.ndarray:
    return amount * (np.arange(lines) + 0.5)


def _shifted(amount: float, *, lines: int, length: int) -> np.ndarray:
    return np.full(lines, amount, np.float64)


def _shifted_by_share(amount: float, *, lines: int, length: int) -> np.ndarray:
    return np.full(lines, amount * length)


@dataclass(frozen=True)
class _Sliding:
    """`op` of timm's as lines that slide, where it is bicubic on RGB; else `op` itself. A class, to be pickled."""

    op: _Op
    offsets: Callable[..., np.ndarray]
    axis: int

    def __call__(self, image: Image.Image, amount: float, **kwargs: Any) -> Image.Image:
        if image.mode != "RGB" or kwargs.get("resample") != Image.Resampling.BICUBIC:
            return self.op(image, amount, **kwargs)
        length, lines = image.size if self.axis == 1 else image.size[::-1]
        offset_L = self.offsets(amount, lines=lines, length=length)
        return slide(image, offset_L, axis=self.axis, fill=kwargs["fillcolor"])


def _sharpness(image: Image.Image, factor: float, **kwargs: Any) -> Image.Image:
    """As Pillow's ImageEnhance.Sharpness, whose 3×3 filter works in floats: bit for bit the same in integers."""
    if image.mode != "RGB" or min(image.size) < 3:
        return timm_ops.sharpness(image, factor, **kwargs)
    x_HWC = np.array(image)
    x = x_HWC.reshape(image.height, -1).astype(np.int16)
    sum_3rows = x[:-2] + x[1:-1] + x[2:]
    sum_9 = sum_3rows[:, :-6] + sum_3rows[:, 3:-3] + sum_3rows[:, 6:]
    sum_9 += 4 * x[1:-1, 3:-3]
    sum_9 *= 2
    sum_9 += 13
    smooth = x_HWC.reshape(image.height, -1)  # Pillow leaves the border as it is
    np.copyto(smooth[1:-1, 3:-3], sum_9 // 26, casting="unsafe")
    return Image.blend(Image.fromarray(x_HWC), image, factor)


QUICKER: dict[_Op, _Op] = {
    timm_ops.sharpness: _sharpness,
    timm_ops.shear_x: _Sliding(timm_ops.shear_x, _sheared, 1),
    timm_ops.shear_y: _Sliding(timm_ops.shear_y, _sheared, 0),
    timm_ops.translate_x_rel: _Sliding(timm_ops.translate_x_rel, _shifted_by_share, 1),
    timm_ops.translate_y_rel: _Sliding(timm_ops.translate_y_rel, _shifted_by_share, 0),
    timm_ops.translate_x_abs: _Sliding(timm_ops.translate_x_abs, _shifted, 1),
    timm_ops.translate_y_abs: _Sliding(timm_ops.translate_y_abs, _shifted, 0),
}
