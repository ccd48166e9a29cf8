"""CIFAR-10 and CIFAR-100: torchvision's archives, or class folders of images, or a tar file of them; held in memory.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009; 32×32 RGB, 50 000 + 10 000 images.

Shape letters: B batch, C channels, H height, W width, N images in the set.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Literal
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from .base import Batch, ImageDataModule
from .cifar_names import NAMES
from .images import EXTENSIONS, UnreadableImageError, read_image
from .predict import walk_images
from .sampling import seed_from
from .tars import PlainTarInfo
from .tensors import BatchStep, CropFlip, Cutout, PerImage, TensorImages
from .transforms import Transform, check_share, eval_transform, rand_augment

SIDE = 32  # pixels
_LARGEST_FILE = 4 * 2**20  # bytes; a 32×32 image of any format is far below, a decompression bomb is not
_ARCHIVES = (".tar", ".tar.xz", ".tar.gz", ".tgz", ".tar.bz2")


class CIFARDataModule(ImageDataModule):
    """CIFAR-10 or -100 from what lies in `root`; val and test are the test set.

    `root` is a folder with train/ and test/ class folders of images, or holds torchvision's archive (downloaded if
    asked for), or is a tar file of such class folders (.tar, .tar.gz, .tar.xz; read in memory, nothing is extracted).

    Args:
        num_classes: 10 or 100.
        root: folder or tar file.
        download: fetch torchvision's archive into `root` if there is nothing.
        class_subset: labels to keep, for training on some of the classes; they are renumbered in the order given.
        batch_size: GLOBAL training batch.
        batch_size_per_device: the most training images that one device takes at once (None: no limit).
        eval_batch_size: images per device in validation, test and prediction.
        num_workers: loader processes; 0 is best unless auto_augment is on, the images are in memory.
        seed: of order and augmentation.
        predict_path: folder, image, or text file of paths, for `predict`.
        img_size: side of the images that the network gets; other than 32, they are enlarged bicubically on the device.
        padding: pixels of reflection padding that the random crop moves in (0: no crop).
        hflip: probability of a left-right flip.
        auto_augment: timm's RandAugment string such as rand-m9-mstd0.5-inc1, or None; works per image through PIL.
        cutout: side of the square that is filled with the mean colour, in pixels (0: none).
        reprob, remode: random erasing: probability per image, and "pixel", "rand" or "const".
        mean, std: of pixels in 0–1; None for the data set's own.
        views: of an image, whose probabilities test and predict average: the "center", or also its mirror image.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        root: str = "data/cifar",
        download: bool = False,
        class_subset: list[int] | None = None,
        batch_size: int = 128,
        batch_size_per_device: int | None = None,
        eval_batch_size: int = 500,
        num_workers: int = 0,
        seed: int = 0,
        predict_path: str | None = None,
        img_size: int = SIDE,
        padding: int = 4,
        hflip: float = 0.5,
        auto_augment: str | None = None,
        cutout: int = 0,
        reprob: float = 0.0,
        remode: str = "pixel",
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        views: Literal["center", "flip"] = "center",
    ) -> None:
        if num_classes not in NAMES:
            raise ValueError(f"num_classes is {num_classes}: CIFAR has 10 or 100 (class_subset takes some of them)")
        super().__init__(
            batch_size=batch_size,
            batch_size_per_device=batch_size_per_device,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            predict_path=predict_path,
            img_size=img_size,
            in_chans=3,
            mean=mean or (CIFAR10_MEAN if num_classes == 10 else CIFAR100_MEAN),
            std=std or (CIFAR10_STD if num_classes == 10 else CIFAR100_STD),
            reprob=reprob,
            remode=remode,
            views=views,
        )
        if not 0 <= padding < SIDE or not 0 <= cutout <= SIDE:
            raise ValueError(f"padding {padding} must lie in 0 … {SIDE - 1} and cutout {cutout} in 0 … {SIDE}")
        check_share(hflip=hflip)
        self.num_classes = num_classes
        self.root = root
        self.download = download
        self.class_subset = _checked_subset(class_subset, num_classes)
        self.padding = padding
        self.hflip = hflip
        self.auto_augment = auto_augment
        self.cutout = cutout
        self.save_hyperparameters(logger=False)  # Lightning refuses names that the module has with other values
        self.class_names = [NAMES[num_classes][label] for label in self.class_subset or range(num_classes)]

    def prepare_data(self) -> None:
        if self.download and not _has_images(Path(self.root)):
            self._torchvision(train=True, download=True)

    def setup_data(self, stage: str) -> None:
        if stage == "predict" or self.train_set is not None:
            return
        # Validation alone needs no training images; decoding them from files takes the longest.
        splits = ("train", "test") if stage == "fit" else ("test",)
        if self.val_set is not None:
            splits = tuple(split for split in splits if split != "test")
        for split, (x_NCHW, y_N) in self._load(splits).items():
            x_NCHW, y_N = self._keep_subset(x_NCHW, y_N)
            if split == "train":
                self.train_set = TensorImages(x_NCHW, y_N, steps=self._steps(len(y_N)))
            else:
                self.val_set = self.test_set = TensorImages(x_NCHW, y_N)

    def predict_transform(self) -> Transform:
        return eval_transform(img_size=SIDE, crop_pct=1.0)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        x_BCHW, y_B = batch
        if self.img_size != SIDE:
            x_BCHW = F.interpolate(x_BCHW.float(), size=(self.img_size,) * 2, mode="bicubic", antialias=True)
            x_BCHW = x_BCHW.round_().clamp_(0, 255).to(torch.uint8)
        return super().on_after_batch_transfer((x_BCHW, y_B), dataloader_idx)

    def _steps(self, size: int) -> list[BatchStep]:
        steps: list[BatchStep] = []
        colour = [round(255 * value) for value in self.mean]
        # Each kind of parameter has a seed of its own, so that switching one on leaves the others as they were.
        if self.padding or self.hflip:
            steps.append(CropFlip(size=size, seed=seed_from(self.seed, 1), padding=self.padding, flip=self.hflip))
        if self.auto_augment:
            hparams = {"translate_const": int(SIDE * 0.45), "img_mean": tuple(colour)}
            steps.append(PerImage(rand_augment(self.auto_augment, hparams), seed=seed_from(self.seed, 2)))
        if self.cutout:
            seed = seed_from(self.seed, 3)
            steps.append(Cutout(size=size, seed=seed, side=self.cutout, colour=colour, image_size=(SIDE, SIDE)))
        return steps

    def _keep_subset(self, x_NCHW: Tensor, y_N: Tensor) -> tuple[Tensor, Tensor]:
        if self.class_subset is None:
            return x_NCHW, y_N
        new_label = torch.full((self.num_classes,), -1)
        new_label[torch.tensor(self.class_subset)] = torch.arange(len(self.class_subset))
        kept_N = new_label[y_N] >= 0
        return x_NCHW[kept_N], new_label[y_N][kept_N]

    def _load(self, splits: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor]]:
        root, names = Path(self.root), NAMES[self.num_classes]
        if root.is_file():
            return load_tar(root, splits=splits, class_names=names)
        if any((root / split).is_dir() for split in ("train", "test")):
            return {split: load_folder(root / split, class_names=names) for split in splits}
        archive = CIFAR10 if self.num_classes == 10 else CIFAR100
        if not (root / archive.base_folder).is_dir() and not (root / archive.filename).is_file():
            raise ValueError(
                f"no CIFAR-{self.num_classes} in {root}: set data.root to a folder with train/ and test/ class folders,"
                f" to a tar file of them, or to where {archive.filename} lies; or set data.download true to fetch it"
            )
        return {split: self._torchvision(train=split == "train", download=False) for split in splits}

    def _torchvision(self, *, train: bool, download: bool) -> tuple[Tensor, Tensor]:
        archive = CIFAR10 if self.num_classes == 10 else CIFAR100
        root = Path(self.root)
        # With the archive there but not yet unpacked, "download" only checks and unpacks it.
        unpack = not (root / archive.base_folder).is_dir() and (root / archive.filename).is_file()
        try:
            data = archive(self.root, train=train, download=download or unpack)
        except (URLError, ConnectionError, TimeoutError) as error:
            raise ValueError(
                f"{archive.url} cannot be fetched ({str(error).splitlines()[0]}): fetch it elsewhere, put "
                f"{archive.filename} into {root}, and leave data.download out"
            ) from error
        except RuntimeError as error:
            raise ValueError(
                f"{root / archive.base_folder} is incomplete or damaged ({str(error).splitlines()[0]}): delete it and "
                f"{archive.filename}, and set data.download true"
            ) from error
        return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)


# Of the training images, per channel.
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


def load_folder(folder: Path, *, class_names: list[str]) -> tuple[Tensor, Tensor]:
    """Decode `folder`/<class>/… into memory, sorted by path.

    Returns:
        (uint8 x_NCHW of 32×32, int64 y_N).

    Raises:
        ValueError: folder missing, a class missing or unknown or empty, an image unreadable or of another size.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist: data.root must hold train/ and test/ with a folder per class")
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    _refuse_unknown(found, class_names, where=str(folder))
    _refuse_missing(found, class_names, where=str(folder))
    paths, labels = [], []
    for label, name in enumerate(class_names):
        inside = sorted(walk_images(folder / name))
        if not inside:
            raise ValueError(f"class folder {folder / name} holds no images: fill it, or use a class_subset elsewhere")
        paths += [folder / name / path for path in inside]
        labels += [label] * len(inside)
    return _decode_all((str(path), path) for path in paths), torch.tensor(labels)


def load_tar(path: Path, *, splits: tuple[str, ...], class_names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Decode the members …/<split>/<class>/<file> of a tar file, streamed once; nothing is written to disk.

    Returns:
        split → (uint8 x_NCHW of 32×32, int64 y_N), in the order of the members' names.

    Raises:
        ValueError: no tar file, a damaged one, or the mistakes that `load_folder` finds.
    """
    labels = {name: label for label, name in enumerate(class_names)}
    members: list[tuple[str, str, str]] = []  # split, class, name

    def stream() -> Iterator[tuple[str, bytes]]:
        with tarfile.open(path, mode="r|*", tarinfo=PlainTarInfo) as archive:
            for member in archive:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps them all, 1 kB each
                parts = member.name.split("/")
                is_image = os.path.splitext(member.name)[1].lower() in EXTENSIONS and member.isfile()
                if not is_image or len(parts) < 3 or parts[-3] not in splits or parts[-1].startswith("."):
                    continue
                if member.size > _LARGEST_FILE:
                    raise ValueError(
                        f"{path}: member {member.name} has {member.size} bytes, too many for a 32×32 image"
                    )
                _refuse_unknown([parts[-2]], class_names, where=f"{path}, {parts[-3]}/")
                file = archive.extractfile(member)
                assert file is not None
                members.append((parts[-3], parts[-2], member.name))
                yield f"{member.name} in {path}", file.read()

    try:
        x_NCHW = _decode_all(stream())
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(
            f"cannot read {path} as a tar file ({error}): fetch it again, or set data.root to another"
        ) from error
    result = {}
    for split in splits:
        places = sorted((i for i, member in enumerate(members) if member[0] == split), key=lambda i: members[i][1:])
        _refuse_missing({members[i][1] for i in places}, class_names, where=f"{path}, {split}/")
        result[split] = x_NCHW[places], torch.tensor([labels[members[i][1]] for i in places])
    return result


def _decode_all(files: Iterable[tuple[str, bytes | Path]]) -> Tensor:
    """Decode (name, file) pairs in threads, a block at a time so that a stream's bytes do not pile up: uint8 x_NCHW."""
    files, blocks = iter(files), []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while block := list(islice(files, 4096)):
            # A task per image would spend as long on hand-over as on decoding 32×32 pixels.
            blocks += pool.map(_decode, [block[start : start + 256] for start in range(0, len(block), 256)])
    x_NHWC = np.concatenate(blocks) if blocks else np.empty((0, SIDE, SIDE, 3), np.uint8)
    return torch.from_numpy(x_NHWC).permute(0, 3, 1, 2).contiguous()


def _decode(files: list[tuple[str, bytes | Path]]) -> np.ndarray:
    x_NHWC = np.empty((len(files), SIDE, SIDE, 3), np.uint8)
    for x_HWC, (name, file) in zip(x_NHWC, files, strict=True):
        image = read_image(file, name=name)
        if image.size != (SIDE, SIDE):
            raise UnreadableImageError(
                f"{name} has {image.width}×{image.height} pixels and CIFAR images {SIDE}×{SIDE}: "
                "for folders of other images use ImageNetDataModule"
            )
        x_HWC[...] = np.asarray(image)
    return x_NHWC


def _refuse_unknown(found: Iterable[str], class_names: list[str], *, where: str) -> None:
    unknown = [name for name in found if name not in class_names]
    if unknown:
        raise ValueError(
            f"{where}: {unknown[0]!r} is not a class of CIFAR-{len(class_names)} (they are {class_names[0]}, "
            f"{class_names[1]}, …); for folders of your own use ImageNetDataModule"
        )


def _refuse_missing(found: Collection[str], class_names: list[str], *, where: str) -> None:
    missing = [name for name in class_names if name not in found]
    if missing:
        raise ValueError(
            f"{where}: no images of class {missing[0]!r} ({len(missing)} of {len(class_names)} classes missing): add "
            "them, or for folders of your own use ImageNetDataModule"
        )


def _checked_subset(subset: list[int] | None, num_classes: int) -> list[int] | None:
    if subset is None:
        return None
    if len(subset) < 2 or len(set(subset)) != len(subset) or not all(0 <= label < num_classes for label in subset):
        raise ValueError(f"class_subset {subset} must list at least two different labels in 0 … {num_classes - 1}")
    return list(subset)


def _has_images(root: Path) -> bool:
    return root.is_file() or any((root / split).is_dir() for split in ("train", "test"))
