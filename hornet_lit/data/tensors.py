"""Small image sets held in memory as one uint8 tensor, and augmentation of whole batches of them.

Parameters are drawn once an epoch for ALL images, from (seed, epoch), and looked up by index: as cheap as drawing them
per batch, and an image's augmentation depends on (seed, epoch, index) only.

Shape letters: B batch, C channels, H height, W width, N images in the set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .sampling import PADDING, Key, draw_from, generators_kept, seed_from

BatchStep = Callable[[Tensor, int, Tensor], Tensor]  # (uint8 x_BCHW, epoch, index_B) → uint8 x_BCHW


class TensorImages(Dataset[tuple[Tensor, Tensor]]):
    """Batches from tensors in memory.

    Args:
        x_NCHW: uint8 images.
        y_N: int64 labels.
        steps: augmentation, applied in this order.
    """

    def __init__(self, x_NCHW: Tensor, y_N: Tensor, *, steps: Sequence[BatchStep] = ()) -> None:
        assert x_NCHW.dtype == torch.uint8 and y_N.dtype == torch.int64 and len(x_NCHW) == len(y_N)
        self.x_NCHW = x_NCHW
        self.y_N = y_N
        self.steps = tuple(steps)

    def __len__(self) -> int:
        return len(self.y_N)

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        epoch = keys[0][0]
        asked_B = torch.tensor([index for _, index in keys])
        is_padding_B = asked_B >= len(self)
        index_B = asked_B.masked_fill(is_padding_B, 0)
        x_BCHW = self.x_NCHW[index_B]
        for step in self.steps:
            x_BCHW = step(x_BCHW, epoch, index_B)
        return x_BCHW, self.y_N[index_B].masked_fill(is_padding_B, PADDING)


class _DrawnPerEpoch:
    """Keeps the parameters of the epoch at hand; a worker process draws its own, equal ones."""

    def __init__(self, *, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self._epoch = -1
        self._drawn: dict[str, Tensor] = {}

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Parameters of all `size` images, first dimension N."""
        raise NotImplementedError

    def of(self, epoch: int, index_B: Tensor) -> dict[str, Tensor]:
        if epoch != self._epoch:
            self._drawn = self.draw(torch.Generator().manual_seed(seed_from(self.seed, epoch)))
            self._epoch = epoch
        return {name: values[index_B] for name, values in self._drawn.items()}


class RandomAffine(_DrawnPerEpoch):
    """Small rotations, shifts and zooms, bilinear, black beyond the border.

    Args:
        size: images in the set.
        seed: of the parameters.
        degrees: largest rotation to either side.
        shift: largest shift to either side, as a share of the side.
        zoom: largest relative change of size.
    """

    def __init__(self, *, size: int, seed: int, degrees: float, shift: float, zoom: float) -> None:
        super().__init__(size=size, seed=seed)
        self.degrees = degrees
        self.shift = shift
        self.zoom = zoom

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        uniform_N4 = torch.rand(self.size, 4, generator=generator) * 2 - 1
        angle_N = torch.deg2rad(uniform_N4[:, 0] * self.degrees)
        scale_N = 1 + uniform_N4[:, 1] * self.zoom
        cos_N, sin_N = torch.cos(angle_N) / scale_N, torch.sin(angle_N) / scale_N
        shift_N2 = uniform_N4[:, 2:] * 2 * self.shift  # the grid's coordinates run from -1 to 1
        rows = [torch.stack([cos_N, -sin_N, shift_N2[:, 0]], 1), torch.stack([sin_N, cos_N, shift_N2[:, 1]], 1)]
        return {"theta": torch.stack(rows, 1)}

    def __call__(self, x_BCHW: Tensor, epoch: int, index_B: Tensor) -> Tensor:
        grid_BHW2 = F.affine_grid(self.of(epoch, index_B)["theta"], list(x_BCHW.shape), align_corners=False)
        x_BCHW = F.grid_sample(x_BCHW.float(), grid_BHW2, align_corners=False)
        return x_BCHW.round_().clamp_(0, 255).to(torch.uint8)


class CropFlip(_DrawnPerEpoch):
    """Random crop of the original size after reflection padding, and a left-right flip in half of the cases.

    Args:
        size: images in the set.
        seed: of the parameters.
        padding: pixels on each side.
        flip: probability.
    """

    def __init__(self, *, size: int, seed: int, padding: int = 4, flip: float = 0.5) -> None:
        super().__init__(size=size, seed=seed)
        self.padding = padding
        self.flip = flip

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        shift_N2 = torch.randint(-self.padding, self.padding + 1, (self.size, 2), generator=generator)
        return {"shift": shift_N2, "flip": torch.rand(self.size, generator=generator) < self.flip}

    def __call__(self, x_BCHW: Tensor, epoch: int, index_B: Tensor) -> Tensor:
        drawn = self.of(epoch, index_B)
        batch, channels, height, width = x_BCHW.shape
        row_BH = _reflected(drawn["shift"][:, :1] + torch.arange(height), height)
        column_BW = _reflected(drawn["shift"][:, 1:] + torch.arange(width), width)
        column_BW = torch.where(drawn["flip"][:, None], column_BW.flip(1), column_BW)
        pixel_BP = (row_BH[:, :, None] * width + column_BW[:, None, :]).flatten(1)
        pixel_BCP = pixel_BP[:, None, :].expand(-1, channels, -1)
        return x_BCHW.flatten(2).gather(2, pixel_BCP).view(batch, channels, height, width)


def _reflected(place: Tensor, length: int) -> Tensor:
    """Indices outside 0 … length-1 mirrored at the border pixel, which is not repeated."""
    place = place.abs()
    return torch.where(place >= length, 2 * (length - 1) - place, place)


class Cutout(_DrawnPerEpoch):
    """One square of a constant colour per image, centred anywhere in it (so it may stick out).

    Args:
        size: images in the set.
        seed: of the parameters.
        side: of the square, in pixels.
        colour: one value in 0–255 per channel.
        image_size: (height, width).
    """

    def __init__(self, *, size: int, seed: int, side: int, colour: Sequence[int], image_size: tuple[int, int]) -> None:
        super().__init__(size=size, seed=seed)
        self.side = side
        self.colour = torch.tensor(colour, dtype=torch.uint8).view(1, -1, 1, 1)
        self.image_size = image_size

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        centres = [torch.randint(0, length, (self.size,), generator=generator) for length in self.image_size]
        return {"centre": torch.stack(centres, 1)}

    def __call__(self, x_BCHW: Tensor, epoch: int, index_B: Tensor) -> Tensor:
        first_B2 = self.of(epoch, index_B)["centre"] - self.side // 2
        inside = []
        for axis, length in enumerate(self.image_size):
            place_BL = torch.arange(length) - first_B2[:, axis : axis + 1]
            inside.append((place_BL >= 0) & (place_BL < self.side))
        box_B1HW = (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
        return torch.where(box_B1HW, self.colour, x_BCHW)


class PerImage:
    """A PIL transform such as timm's RandAugment on every image of a batch, seeded from (seed, epoch, index)."""

    def __init__(self, transform: Callable[[Image.Image], Image.Image], *, seed: int) -> None:
        self.transform = transform
        self.seed = seed

    def __call__(self, x_BCHW: Tensor, epoch: int, index_B: Tensor) -> Tensor:
        images = []
        with generators_kept():
            for x_CHW, index in zip(x_BCHW, index_B.tolist(), strict=True):
                grey = len(x_CHW) == 1
                image = Image.fromarray((x_CHW[0] if grey else x_CHW.permute(1, 2, 0)).numpy())
                draw_from(self.seed, epoch, index)
                x_HWC = torch.from_numpy(np.array(self.transform(image)))
                images.append(x_HWC[None] if grey else x_HWC.permute(2, 0, 1))
        return torch.stack(images)
