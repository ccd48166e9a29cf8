"""Handwritten digits that come with scikit-learn: real images, and no download.

Source: sklearn.datasets.load_digits, the test part of the UCI set "Optical Recognition of Handwritten Digits"
(E. Alpaydin, C. Kaynak, 1998): 1797 greyscale images of 8×8 pixels with values 0–16.

Shape letters: B batch, C channels, H height, W width, N images in the set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .base import ImageDataModule
from .tensors import RandomAffine, TensorImages
from .transforms import Transform, eval_transform

HELD_OUT = 360  # of 1797, fixed and stratified
_SPLIT_SEED = 0  # not the data module's seed: the held-out images stay the same for every training


class DigitsDataModule(ImageDataModule):
    """Digits 0–9, enlarged bilinearly; 1437 images to train on, 360 held out for val and test.

    Args:
        batch_size: GLOBAL training batch.
        batch_size_per_device: the most training images that one device takes at once (None: no limit).
        eval_batch_size: images per device in validation, test and prediction.
        num_workers: loader processes; 0 is best, the images are in memory.
        seed: of order and augmentation.
        predict_path: folder, image, or text file of paths, for `predict`; read as greyscale, white on black.
        img_size: side of the enlarged images, in pixels.
        augment: rotate up to 10°, shift up to 8 % of the side and zoom up to 10 % while training.
        mean, std: of pixels in 0–1; the defaults are the training images' at 32 pixels.
        views: of an image, whose probabilities test and predict average: the "center", or also its mirror image.
    """

    def __init__(
        self,
        *,
        batch_size: int = 64,
        batch_size_per_device: int | None = None,
        eval_batch_size: int = 360,
        num_workers: int = 0,
        seed: int = 0,
        predict_path: str | None = None,
        img_size: int = 32,
        augment: bool = True,
        mean: tuple[float] = (0.305,),
        std: tuple[float] = (0.324,),
        views: Literal["center", "flip"] = "center",
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            batch_size_per_device=batch_size_per_device,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            predict_path=predict_path,
            img_size=img_size,
            in_chans=1,
            mean=mean,
            std=std,
            views=views,
        )
        self.augment = augment
        self.save_hyperparameters(logger=False)  # Lightning refuses names that the module has with other values
        self.class_names = [str(digit) for digit in range(10)]

    def setup_data(self, stage: str) -> None:
        if stage == "predict" or self.train_set is not None:
            return
        x_NCHW, y_N = load_digits(split="train", img_size=self.img_size)
        affine = RandomAffine(size=len(y_N), seed=self.seed, degrees=10, shift=0.08, zoom=0.1)
        self.train_set = TensorImages(x_NCHW, y_N, steps=[affine] if self.augment else [])
        self.val_set = self.test_set = TensorImages(*load_digits(split="test", img_size=self.img_size))

    def predict_transform(self) -> Transform:
        return eval_transform(img_size=self.img_size, in_chans=1, crop_pct=1.0, interpolation="bilinear")


def load_digits(*, split: str, img_size: int = 32) -> tuple[Tensor, Tensor]:
    """The digits of one part of the fixed split.

    Args:
        split: "train" (1437 images) or "test" (360).
        img_size: side in pixels; 8 for the images as they are.

    Returns:
        (uint8 x_NCHW with one channel, int64 y_N).
    """
    from sklearn.datasets import load_digits as load  # here, because it takes a second to import
    from sklearn.model_selection import train_test_split

    assert split in ("train", "test")
    bunch = load()
    parts = train_test_split(
        range(len(bunch.target)), test_size=HELD_OUT, stratify=bunch.target, random_state=_SPLIT_SEED
    )
    places = sorted(parts[0 if split == "train" else 1])
    x_NCHW = torch.from_numpy(bunch.images[places]).float()[:, None] * (255 / 16)
    if img_size != x_NCHW.shape[-1]:
        x_NCHW = F.interpolate(x_NCHW, size=(img_size, img_size), mode="bilinear", align_corners=False)
    return x_NCHW.round().to(torch.uint8), torch.from_numpy(bunch.target[places]).long()


def save_images(folder: str | Path, count: int = HELD_OUT, *, img_size: int = 32) -> list[Path]:
    """Write the first `count` held-out digits as PNG files `NNN_digit_D.png`, for trying `predict`.

    Returns:
        The paths, in order.
    """
    x_NCHW, y_N = load_digits(split="test", img_size=img_size)
    if not 1 <= count <= len(y_N):
        raise ValueError(f"count is {count}: there are {len(y_N)} held-out digits, ask for 1 to {len(y_N)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{place:03d}_digit_{label}.png" for place, label in enumerate(y_N[:count].tolist())]
    for path, x_CHW in zip(paths, x_NCHW, strict=False):
        Image.fromarray(x_CHW[0].numpy()).save(path)
    return paths
