"""Sets that ImageNet-1k classifiers are tested on: ImageNet-V2, -A, -R, -Sketch, and the ReaL labels of ImageNet's val.

Which classes a set has, and the ReaL labels, are timm's (timm/data/_info). Labels are places in ImageNet-1k's 1000
classes, and the images are read where the sets' own archives unpack them.

Sources: Recht et al. 2019 (V2), Hendrycks et al. 2021 (A and R), Wang et al. 2019 (Sketch), Beyer et al. 2020 (ReaL).

Shape letters: N images in the set, L labels that an image has at most.
"""

from __future__ import annotations

import os
import pkgutil
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from timm.data import ImageNetInfo, RealLabelsImagenet

from .predict import PackedStrings, walk_images
from .sampling import PADDING
from .sources import FolderImages, LabelledImages, class_folders, tar_images

REAL = "imagenet_real"
EVALUATION_SETS = ("imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", REAL)
_VAL_IMAGES = 50_000
_VAL_NAME = "ILSVRC2012_val_XXXXXXXX.JPEG"


def imagenet_classes() -> list[str]:
    """The 1000 wnids of ImageNet-1k in label order."""
    return ImageNetInfo("imagenet-1k").label_names()


def scored_classes(name: str) -> list[int] | None:
    """The labels that a set has, where these are not all 1000: only their logits are compared. None: all."""
    if name not in ("imagenet_a", "imagenet_r"):
        return None
    listed = pkgutil.get_data("timm.data", f"_info/{name}_indices.txt")
    assert listed is not None
    return [int(line) for line in listed.split()]


def open_evaluation_set(name: str, root: str, *, in_chans: int = 3) -> LabelledImages:
    """The images of a set, labelled with places in `imagenet_classes()`.

    Args:
        name: one of EVALUATION_SETS.
        root: folder of the set's class folders, or a tar file of them. For ReaL ImageNet's val folder, or the folder
            that it is in; there the images' own names tell them apart, so that they may lie flat or in class folders.
        in_chans: 1 or 3.

    Returns:
        Images with label_N; for ReaL with label_NL: every label that is right, sorted, filled up with -1. Images for
        which ReaL has no label are left out, as they are in the published numbers.

    Raises:
        ValueError: nothing there, a class folder that is missing, empty or not the set's, or a name that ReaL does not
            know.
    """
    path = Path(root)
    if not path.exists():
        raise ValueError(f"data folder {path.absolute()} does not exist: set data.root to where {name} is")
    if name == REAL:
        return RealImages(path, in_chans=in_chans)
    classes = imagenet_classes()
    scored = scored_classes(name)
    label_of = {classes[label]: label for label in (range(len(classes)) if scored is None else scored)}
    if name == "imagenet_v2":  # its folders are numbers, whose order as text ("10" before "2") is not that of labels
        label_of |= {str(label): label for label in range(len(classes))}
    images: LabelledImages
    if path.is_dir():
        _check_folders(name, path, class_folders(path), label_of)  # first: listing a wrong, large folder takes long
        images = FolderImages(path, in_chans=in_chans)
    else:
        images = tar_images(path, in_chans=in_chans)
        _check_folders(name, path, images.classes, label_of)
    images.label_N = np.array([label_of[folder] for folder in images.classes])[images.label_N]
    images.classes = classes
    return images


def _check_folders(name: str, root: Path, found: list[str], label_of: dict[str, int]) -> None:
    mend = f"set data.root to the folder (or the tar file) of {name}'s own class folders, unpacked completely"
    others = [folder for folder in found if folder not in label_of]
    if others:
        raise ValueError(
            f"{root} has the folder {others[0]!r}, which is no class of {name} ({len(others)} of {len(found)} are "
            f"none): {mend}"
        )
    there = {label_of[folder] for folder in found}
    missing = {label: folder for folder, label in label_of.items() if label not in there}
    if missing:
        first = next(iter(missing.values()))
        raise ValueError(f"{root} lacks {len(missing)} of {name}'s classes, such as {first!r}: {mend}")


class RealImages(LabelledImages):
    """ImageNet's validation images with the ReaL labels: label_NL (N, L), sorted, filled up with -1."""

    def __init__(self, root: Path, *, in_chans: int) -> None:
        folder = next((root / name for name in ("val", "validation") if (root / name).is_dir()), root)
        if not folder.is_dir():
            raise ValueError(f"{folder} is a file: set data.root to ImageNet's val folder, for {REAL} unpacked")
        names = sorted(walk_images(folder))
        labels_of = RealLabelsImagenet(range(_VAL_IMAGES)).real_labels
        keys = [f"{Path(name).stem}.JPEG" for name in names]
        unknown = next((name for name, key in zip(names, keys, strict=True) if key not in labels_of), None)
        if unknown is not None or not names:
            found = f"{folder} holds no images" if unknown is None else f"{folder / unknown} has no ReaL label"
            raise ValueError(f"{found}: {REAL} needs ImageNet's val images under their own names, {_VAL_NAME}")
        if len(set(keys)) < len(keys):
            twice = Counter(keys).most_common(1)[0][0]
            raise ValueError(f"{folder} has {twice} more than once: keep the images flat or in class folders, not both")
        if len(keys) < _VAL_IMAGES:
            warnings.warn(f"{folder} has {len(keys)} of ImageNet's {_VAL_IMAGES} validation images", stacklevel=2)
        right = {name: sorted(labels_of[key]) for name, key in zip(names, keys, strict=True) if labels_of[key]}
        if not right:
            raise ValueError(f"ReaL has no label for any of the {len(names)} images in {folder}: give all of val")
        longest = max(map(len, right.values()))
        label_NL = np.array([labels + [PADDING] * (longest - len(labels)) for labels in right.values()])
        super().__init__(where=str(folder), classes=imagenet_classes(), label_N=label_NL, in_chans=in_chans)
        self.folder = str(folder)
        self.files = PackedStrings(right)

    def file(self, place: int) -> tuple[str, str | bytes]:
        path = os.path.join(self.folder, self.files[place])
        return path, path
