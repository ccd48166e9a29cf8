"""Reading every image of a data set once, in loader processes, to tell what a training would meet.

The reading is that of the data modules; what is kept is some 30 bytes an image.

Shape letters: N images in the set, G groups of images with the same bytes.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from .batching import useful_workers
from .images import FORMATS, UnreadableImageError, read_bytes, read_image
from .sources import LabelledImages
from .workers import outlive_signals

ODDITIES = ("16-bit", "CMYK", "palette", "alpha", "EXIF-rotated")  # bit 0, 1, … of odd_N
_DIGEST = 16  # bytes
_BLOCK = 64
_EXIF_ORIENTATION = 0x0112
_PNG_DEPTH = 24  # place of the byte with the bits per channel


class ListedImages(LabelledImages):
    """Images without splits or labels of their own: of a class is what lies in the same top folder."""

    def __init__(self, where: str, names: Sequence[str], paths: Sequence[str]) -> None:
        tops = [name.split("/")[0] if "/" in name and not name.startswith("/") else "" for name in names]
        classes, label_N = np.unique(np.array(tops, dtype=object).astype(str), return_inverse=True)
        super().__init__(where=where, classes=[str(name) for name in classes], label_N=label_N, in_chans=3)
        self.paths = paths

    def file(self, place: int) -> tuple[str, str | bytes]:
        return self.paths[place], self.paths[place]


@dataclass
class Findings:
    """What the images of one split are.

    Attributes:
        images: the split.
        digest_N: two 64-bit numbers an image, (N, 2), equal for equal bytes.
        odd_N: bits, see ODDITIES.
        size_N: width and height in pixels, (N, 2); 0 for an unreadable image.
        unreadable: index → reason.
    """

    images: LabelledImages
    digest_N: np.ndarray
    odd_N: np.ndarray
    size_N: np.ndarray
    unreadable: dict[int, str] = field(default_factory=dict)


class _Inspected(Dataset[list[tuple[bytes, int, int, int, str]]]):
    """(digest, oddities, width, height, reason) of each image; the reason of a readable one is ""."""

    def __init__(self, images: LabelledImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[bytes, int, int, int, str]]:
        return [self._inspect(index) for index in indices]

    def _inspect(self, index: int) -> tuple[bytes, int, int, int, str]:
        name, file = self.images.file(int(self.images.place_N[index]))
        try:
            if not isinstance(file, bytes):
                file = read_bytes(file)
        except (OSError, ValueError):
            pass  # read_image meets the same, and words it
        try:
            image = read_image(file, name=name)
        except UnreadableImageError as error:
            return b"", 0, 0, 0, error.reason
        assert isinstance(file, bytes)
        digest = hashlib.blake2b(file, digest_size=_DIGEST).digest()
        return digest, oddities(file), *image.size, ""


def oddities(data: bytes) -> int:
    """The bits of ODDITIES that hold for an encoded image that can be read."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        mode = image.mode
        try:
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        except Exception:  # damaged EXIF, which nothing else here reads
            orientation = 1
        deep_png = image.format == "PNG" and data[_PNG_DEPTH] == 16
        found = (
            mode.startswith("I") or deep_png,
            mode == "CMYK",
            mode in ("P", "PA"),
            mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info,
            orientation in range(2, 9),
        )
    return sum(1 << bit for bit, is_so in enumerate(found) if is_so)


def inspect(images: LabelledImages, *, workers: int, advance: Callable[[int], None]) -> Findings:
    """Read all `images` in at most `workers` processes; `advance` is told after each block how many it had."""
    count = len(images)
    found = Findings(
        images=images,
        digest_N=np.zeros((count, 2), np.uint64),
        odd_N=np.zeros(count, np.uint8),
        size_N=np.zeros((count, 2), np.int32),
    )
    loader: DataLoader[list[tuple[bytes, int, int, int, str]]] = DataLoader(
        _Inspected(images),  # type: ignore[arg-type]
        batch_size=_BLOCK,
        num_workers=useful_workers(workers, batches=-(-count // _BLOCK)),
        collate_fn=list,
        worker_init_fn=outlive_signals,
    )
    index = 0
    for block in loader:
        for digest, odd, width, height, reason in block:
            if reason:
                found.unreadable[index] = reason
            else:
                found.digest_N[index] = np.frombuffer(digest, np.uint64)
            found.odd_N[index], found.size_N[index] = odd, (width, height)
            index += 1
        advance(len(block))
    assert index == count
    return found


def duplicates(findings: Sequence[Findings]) -> Iterator[list[tuple[int, int]]]:
    """Groups of readable images with the same bytes, each a list of (number of the split, index)."""
    if not findings:
        return
    digest_N = np.concatenate([each.digest_N for each in findings])
    split_N = np.repeat(np.arange(len(findings)), [len(each.digest_N) for each in findings])
    index_N = np.concatenate([np.arange(len(each.digest_N)) for each in findings])
    order_N = np.lexsort((digest_N[:, 1], digest_N[:, 0]))  # stable: within a group the splits stay in order
    digest_N = digest_N[order_N]
    is_new_N = np.ones(len(order_N) + 1, bool)
    is_new_N[1:-1] = (digest_N[1:] != digest_N[:-1]).any(axis=1)
    start_G = np.flatnonzero(is_new_N)
    large_G = np.flatnonzero(np.diff(start_G) > 1)
    for begin, end in zip(start_G[large_G], start_G[large_G + 1], strict=True):
        if digest_N[begin].any():  # unreadable ones have zeros
            yield [(int(split_N[place]), int(index_N[place])) for place in order_N[begin:end]]
