"""Images per second of one core: reading, decoding and augmenting ImageNet's JPEGs, and augmenting CIFAR in memory.

    python -m tests.data.throughput --images FOLDER [--repeats 7]    # FOLDER of class folders; Markdown tables

A second is one of CPU time of this process, with one thread, so that other processes cost it little. All sides take
turns, pass by pass. timm's are its ImageDataset, create_transform and collate functions, as its create_loader puts
them together in the loader processes: without its prefetcher images are normalised and erased there, with it they
leave as uint8 (its training script's default), as ours do.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms as tv
from PIL import Image
from timm.data import ImageDataset, create_transform
from timm.data.loader import fast_collate
from torch.utils.data import default_collate
from torchvision.transforms.functional import pil_to_tensor

from hornet_lit.data import CIFARDataModule, ImageNetDataModule
from hornet_lit.data.quick import replace_ops
from hornet_lit.data.sampling import KeyedImages
from hornet_lit.data.sources import FolderImages
from hornet_lit.data.tensors import TensorImages
from hornet_lit.data.transforms import MENDED, KeyedRandomErasing, train_transform

Side = Callable[[], int]  # does some work and says how many images it was
BATCH = 60
PUBLISHED = dict(auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", color_jitter=0.4)


def timm_transform(img_size: int, *, prefetcher: bool) -> tv.Compose:
    """The published training transform as timm makes it, its posterize mended as ours is."""
    transform = create_transform(
        (3, img_size, img_size), is_training=True, use_prefetcher=prefetcher, re_prob=0.25, re_mode="pixel", **PUBLISHED
    )
    for part in transform.transforms:
        replace_ops(part, MENDED)
    return transform


def batches(images: int, *, size: int) -> Iterator[list[int]]:
    """All images once, in a random order."""
    order = torch.randperm(images).tolist()
    yield from (order[start : start + size] for start in range(0, images, size))


def jpeg_sides(folder: Path, *, img_size: int) -> dict[str, Side]:
    """Ours up to what a loader process hands over, ours with the device's part on this core too, and timm's two."""
    module = ImageNetDataModule(root=str(folder), img_size=img_size)
    ours = KeyedImages(FolderImages(folder), train_transform(img_size=img_size, mean=module.mean), seed=0)
    erase = KeyedRandomErasing(probability=0.25, mode="pixel")
    epochs = itertools.count()

    def timm_side(*, prefetcher: bool) -> Side:
        dataset = ImageDataset(str(folder), transform=timm_transform(img_size, prefetcher=prefetcher))
        collate = fast_collate if prefetcher else default_collate

        def run() -> int:
            return sum(len(collate([dataset[index] for index in batch])[1]) for batch in batches(len(ours), size=BATCH))

        return run

    def ours_side(*, with_device: bool) -> Side:
        def run() -> int:
            count = 0
            for batch in batches(len(ours), size=BATCH):
                epoch = next(epochs)
                x_BCHW, y_B = ours.__getitems__([(epoch, index) for index in batch])
                if with_device:
                    erase(module.normalise(x_BCHW), epoch)
                count += len(y_B)
            return count

        return run

    return {
        "hornet-lit, uint8": ours_side(with_device=False),
        "hornet-lit, normalised and erased on the same core": ours_side(with_device=True),
        "timm, create_transform to the end": timm_side(prefetcher=False),
        "timm, prefetcher form, uint8": timm_side(prefetcher=True),
    }


def cifar_sides(*, images: int, batch: int) -> dict[str, Side]:
    """Crop with reflection padding, flip and normalisation, in batches in memory and through PIL image by image."""
    x_NHWC = np.random.default_rng(0).integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
    module = CIFARDataModule(padding=4, hflip=0.5)
    x_NCHW, y_N = torch.from_numpy(x_NHWC).permute(0, 3, 1, 2).contiguous(), torch.zeros(images, dtype=torch.int64)
    ours = TensorImages(x_NCHW, y_N, steps=module._steps(images))
    moves = [tv.RandomCrop(32, padding=4, padding_mode="reflect"), tv.RandomHorizontalFlip()]
    usual = tv.Compose([*moves, tv.ToTensor(), tv.Normalize(module.mean, module.std)])
    raw = tv.Compose([*moves, pil_to_tensor])
    epochs = itertools.count()

    def ours_side() -> int:
        epoch = next(epochs)
        for part in batches(images, size=batch):
            module.normalise(ours.__getitems__([(epoch, index) for index in part])[0])
        return images

    def pil_side(transform: Callable[[Image.Image], torch.Tensor], collate: Callable) -> Side:
        def run() -> int:
            for part in batches(images, size=batch):
                collate([(transform(Image.fromarray(x_NHWC[index])), 0) for index in part])
            return images

        return run

    return {
        "hornet-lit, batches in memory, normalised": ours_side,
        "torchvision on PIL images, to the end": pil_side(usual, default_collate),
        "torchvision on PIL images, uint8, timm's fast_collate": pil_side(raw, fast_collate),
    }


def rates(sides: dict[str, Side], *, repeats: int, passes: int = 1) -> dict[str, list[float]]:
    """Images per CPU second of each side, `repeats` times, after one unmeasured round.

    The sides change after every pass, since the speed of a shared core changes from second to second.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        images, seconds = dict.fromkeys(sides, 0), dict.fromkeys(sides, 0.0)
        for _ in range(passes if repeat else 1):
            for name, side in sides.items():
                start = time.process_time()
                images[name] += side()
                seconds[name] += time.process_time() - start
        if repeat:
            for name in sides:
                found[name].append(images[name] / seconds[name])
    return found


def table(title: str, found: dict[str, list[float]]) -> str:
    """Medians, smallest and largest: images/s, and how many times those the first side makes in the same repeat."""
    first = next(iter(found.values()))
    rows = [f"| {title} | images/s per core | first row / this |", "|---|---|---|"]
    for name, values in found.items():
        ratios = [ours / theirs for ours, theirs in zip(first, values, strict=True)]
        rows.append(f"| {name} | {_spread(values, '.0f')} | {_spread(ratios, '.2f')} |")
    return "\n".join(rows)


def _spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--passes", type=int, default=3, help="over the images, of each side in each repeat")
    parser.add_argument("--cifar-images", type=int, default=2_000)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    sides = jpeg_sides(asked.images, img_size=asked.img_size)
    print(table(f"JPEGs, {asked.img_size}²", rates(sides, repeats=asked.repeats, passes=asked.passes)), flush=True)
    print()
    cifar = cifar_sides(images=asked.cifar_images, batch=128)
    print(table("CIFAR, crop and flip", rates(cifar, repeats=asked.repeats, passes=asked.passes)))


if __name__ == "__main__":
    main()
