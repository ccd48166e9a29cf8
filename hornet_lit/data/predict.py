"""Images without labels: a folder, a text file that lists images, or one image.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .images import EXTENSIONS, read_bytes, read_image
from .sampling import PADDING, Key


def find_images(predict_path: str) -> tuple[Sequence[str], Sequence[str]]:
    """List the images to predict.

    Args:
        predict_path: a folder (searched recursively, sorted, hidden files and folders left out), an image, or a text
            file with one path a line (absolute, or relative to the list's folder or to the working directory).

    Returns:
        (names for predictions.csv, paths): names are relative to the folder, or as they stand in the list.

    Raises:
        ValueError: nothing there, no image in it, or a listed file that does not exist.
    """
    path = Path(predict_path)
    if path.is_dir():
        names = sorted(walk_images(path))
        if not names:
            kinds = ", ".join(sorted(EXTENSIONS))
            raise ValueError(f"no images in folder {path} ({kinds}): give data.predict_path a folder that holds images")
        return PackedStrings(names), PackedStrings(os.path.join(path, name) for name in names)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give data.predict_path a folder, an image, or a text file of paths")
    if path.suffix.lower() in EXTENSIONS:
        return [predict_path], [predict_path]
    try:
        names = [line.strip() for line in read_bytes(path).decode("utf-8").splitlines() if line.strip()]
    except ValueError:  # bytes that are no text, or too many
        raise ValueError(f"{path} is neither an image nor a text file with one image path a line") from None
    if not names:
        raise ValueError(f"the list {path} is empty: write one image path a line")
    beside = [(os.path.join(path.parent, name), name) for name in names]
    paths = [next((p for p in places if os.path.isfile(p)), None) for places in beside]
    missing = [name for name, found in zip(names, paths, strict=True) if found is None]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(names)} images listed in {path} do not exist, the first is {missing[0]}: "
            f"write paths relative to {path.parent}, or absolute ones"
        )
    return PackedStrings(names), PackedStrings(found for found in paths if found is not None)


def walk_images(folder: Path) -> list[str]:
    """Paths, relative to `folder`, of all image files below it; hidden ones left out. Not sorted.

    Raises ValueError for a folder that cannot be listed: os.walk by itself would leave its images out without a word.
    """
    found = []
    for parent, folders, files in os.walk(folder, onerror=refuse_folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(parent, folder)
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS:
                found.append(name if inside == "." else os.path.join(inside, name))
    return found


def refuse_folder(error: OSError) -> NoReturn:
    raise ValueError(
        f"cannot list folder {error.filename}: {error.strerror}. Make it readable, or take it out of the data"
    ) from error


class PackedStrings(Sequence[str]):
    """Strings in two arrays, read-only: as a list, with a list of their Paths, they took five times the memory
    (577 against 125 bytes an image), and worker processes share the arrays, where objects are copied one by one."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        self._end_N = np.cumsum([len(string) for string in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._end_N)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        begin = self._end_N[index - 1] if index else 0
        return self._bytes[begin : self._end_N[index]].tobytes().decode("utf-8", "surrogateescape")


class PredictImages(Dataset[tuple[Tensor, Tensor]]):
    """Batches (uint8 x_BCHW, int64 index_B) of the images of `find_images`; the index of padding is -1."""

    def __init__(self, paths: Sequence[str], transform: Callable[[Image.Image], Tensor], *, in_chans: int) -> None:
        self.paths = paths
        self.transform = transform
        self.in_chans = in_chans

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        indices = [index if index < len(self.paths) else PADDING for _, index in keys]
        x_BCHW = torch.stack([self._load(max(index, 0)) for index in indices])
        return x_BCHW, torch.tensor(indices, dtype=torch.int64)

    def _load(self, index: int) -> Tensor:
        path = self.paths[index]
        return self.transform(read_image(path, name=path, in_chans=self.in_chans))
