"""Labelled images in folders, tar files, WebDataset shards and Hugging Face data sets, all read at random by index.

timm's readers serve the last; the others are read here, because timm puts another image in place of an unreadable one,
counts hidden folders as classes, and streams WebDataset shards, which can neither be resumed nor shared out exactly.

Shape letters: N images in the set.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import warnings
from collections.abc import Iterator
from copy import copy
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from .images import EXTENSIONS, LARGEST_FILE, read_bytes, read_image
from .predict import PackedStrings, refuse_folder, walk_images
from .tars import PlainTarInfo

_LARGEST_LABEL = 2**24  # bytes of a .cls or .json member


class LabelledImages:
    """Images with labels in a class list of their own, which `relabel` turns into the training set's.

    Args:
        where: folder or file, for messages.
        classes: names of the labels as they are found here.
        label_N: int64 labels, places in `classes`.
        in_chans: 1 to read greyscale, 3 to read RGB.
    """

    def __init__(self, *, where: str, classes: list[str], label_N: np.ndarray, in_chans: int) -> None:
        self.where = where
        self.classes = classes
        self.label_N = label_N
        self.in_chans = in_chans
        self.place_N = np.arange(len(label_N))

    def file(self, place: int) -> tuple[str, str | bytes]:
        """(name for messages, path or encoded bytes)."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What messages call an image."""
        return self.file(int(self.place_N[index]))[0]

    def __len__(self) -> int:
        return len(self.place_N)

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        name, file = self.file(int(self.place_N[index]))
        return read_image(file, name=name, in_chans=self.in_chans), self.label_N[index]

    def take(self, index_M: np.ndarray) -> LabelledImages:
        """Some of the images."""
        part = copy(self)
        part.place_N, part.label_N = self.place_N[index_M], self.label_N[index_M]
        return part

    def relabel(
        self, class_names: list[str], *, leave_out_others: bool = False, complete: bool = False
    ) -> LabelledImages:
        """The same images with labels that are places in `class_names`.

        Raises:
            ValueError: a class is not in `class_names`, unless `leave_out_others`: then its images are left out; or
                one of `class_names` has no images, if `complete`: else that is a warning.
        """
        new_label = {name: label for label, name in enumerate(class_names)}
        table = np.array([new_label.get(name, -1) for name in self.classes], dtype=np.int64)
        others = [name for name in self.classes if name not in new_label]
        if others and not leave_out_others:
            raise ValueError(
                f"{self.where} has the class {others[0]!r}, which the training set lacks ({len(others)} such classes; "
                f"the training set has {len(class_names)}): remove its images, or train on it"
            )
        missing = set(class_names) - set(self.classes)
        if missing:
            message = (
                f"{self.where} has no images of {len(missing)} of the {len(class_names)} classes, such as "
                f"{min(missing)!r}"
            )
            if complete:
                raise ValueError(f"{message}: add some, or give the training classes as data.class_map to go without")
            warnings.warn(message, stacklevel=2)
        part = self.take(np.flatnonzero(table[self.label_N] >= 0))
        part.label_N, part.classes = table[part.label_N], list(class_names)
        return part


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders in `folder`, sorted; hidden ones (.ipynb_checkpoints) are none.

    Raises:
        ValueError: there are none, one is a link to nothing, or `folder` cannot be listed.
    """
    try:
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        refuse_folder(error)
    names = sorted(entry.name for entry in entries if entry.is_dir())
    for entry in entries:  # left out, a class would be missing and the labels of all after it shifted
        if entry.is_symlink() and not os.path.exists(entry) and not os.path.splitext(entry.name)[1]:
            raise ValueError(f"{entry.path} is a link to nothing: mend or remove the link")
    if not names:
        raise ValueError(f"no class folders in {folder}: put the images into one folder per class there")
    return names


class FolderImages(LabelledImages):
    """Images in `folder`/<class>/, searched recursively, sorted by class and path.

    Raises:
        ValueError: no class folders, or an empty one.
    """

    def __init__(self, folder: Path, *, in_chans: int = 3) -> None:
        classes = class_folders(folder)
        files: list[str] = []
        counts = []
        for name in classes:
            inside = sorted(walk_images(folder / name))
            if not inside:
                kinds = ", ".join(sorted(EXTENSIONS))
                raise ValueError(f"class folder {folder / name} holds no images ({kinds}): fill it or remove it")
            files += [os.path.join(name, path) for path in inside]
            counts.append(len(inside))
        label_N = np.repeat(np.arange(len(classes)), counts)
        super().__init__(where=str(folder), classes=classes, label_N=label_N, in_chans=in_chans)
        self.folder = str(folder)
        self.files = PackedStrings(files)

    def file(self, place: int) -> tuple[str, str | bytes]:
        path = os.path.join(self.folder, self.files[place])
        return path, path


class TarImages(LabelledImages):
    """Members of uncompressed tar files, read at their offsets: safe in any number of threads and processes.

    Args:
        where, classes, in_chans: as for LabelledImages.
        archives: paths of the tar files.
        entries: (archive number, offset, size, label, name) of each image.
    """

    def __init__(
        self,
        *,
        where: str,
        classes: list[str],
        archives: list[str],
        entries: list[tuple[int, int, int, int, str]],
        in_chans: int,
    ) -> None:
        label_N = np.array([entry[3] for entry in entries], dtype=np.int64)
        super().__init__(where=where, classes=classes, label_N=label_N, in_chans=in_chans)
        self.archives = archives
        self.position_N3 = np.array([entry[:3] for entry in entries], dtype=np.int64).reshape(-1, 3)
        self.names = PackedStrings(entry[4] for entry in entries)

    def file(self, place: int) -> tuple[str, str | bytes]:
        archive, offset, size = (int(number) for number in self.position_N3[place])
        with open(self.archives[archive], "rb") as file:
            file.seek(offset)
            # A byte too many is enough to be refused; a sparse member may claim any size.
            return f"{self.names[place]} in {self.archives[archive]}", file.read(min(size, LARGEST_FILE + 1))


def tar_images(path: Path, *, in_chans: int = 3) -> TarImages:
    """Images of a tar file with <class>/ folders or a <class>.tar per class in it, or of a folder of <class>.tar files.

    Raises:
        ValueError: not a plain tar file, or no class in it.
    """
    archives = [path] if path.is_file() else sorted(path.glob("*.tar"))
    found: list[tuple[str, str, int, int, int]] = []  # class, name, archive, offset, size
    for number, archive in enumerate(archives):
        with open(archive, "rb") as file:
            for name, offset, size in _tar_members(file, str(archive)):
                folder = os.path.basename(os.path.dirname(name)) if path.is_file() else archive.stem
                is_hidden = os.path.basename(name).startswith(".") or folder.startswith(".")
                if os.path.splitext(name)[1].lower() in EXTENSIONS and not is_hidden:
                    found.append((folder, name, number, offset, size))
    found.sort()
    classes = sorted({entry[0] for entry in found})
    if not found or "" in classes:
        raise ValueError(f"no class folders in {path}: its members must be <class>/<image>, or <class>.tar")
    label = {name: place for place, name in enumerate(classes)}
    entries = [(number, offset, size, label[folder], name) for folder, name, number, offset, size in found]
    names = [str(archive) for archive in archives]
    return TarImages(where=str(path), classes=classes, archives=names, entries=entries, in_chans=in_chans)


def _tar_members(file: BinaryIO, name: str, base: int = 0, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    """(name, offset in the outermost file, size) of every file in a tar file, and in the tar files within it."""
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=PlainTarInfo) as archive:
            for member in archive:
                if not member.isfile() or member.issparse():
                    continue
                offset = base + member.offset_data
                stem, extension = os.path.splitext(member.name)
                if extension.lower() == ".tar" and not prefix:
                    inner = archive.extractfile(member)
                    assert inner is not None
                    yield from _tar_members(inner, f"{member.name} in {name}", offset, os.path.basename(stem) + "/")
                else:
                    yield prefix + member.name, offset, member.size
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps them all, 1 kB each
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"cannot read {name} as an uncompressed tar file ({error}): fetch it again, or decompress it first"
        ) from error


def wds_images(root: str, *, split: str, class_names: list[str] | None, in_chans: int = 3) -> TarImages:
    """WebDataset shards: members <key>.<image extension> with a label in <key>.cls (or `label` of <key>.json).

    Args:
        root: folder of the shards.
        split: a split of `_info.json`, a pattern like `train-{0000..0127}.tar` or `train-*.tar`, or a name: `train`
            for `*train-*.tar`.
        class_names: names of the labels 0, 1, …; None to call them by their numbers.
        in_chans: 1 or 3.

    Raises:
        ValueError: no shards, an image without a label, or a label beyond the class names.
    """
    archives = wds_shards(root, split)
    if not archives:
        raise ValueError(f"no shards of split {split!r} in {root}: give the split as a pattern: train-{{00..12}}.tar")
    entries = []
    for number, path in enumerate(archives):
        if not os.path.isfile(path):
            raise ValueError(f"shard {path} of split {split!r} does not exist: fetch it, or correct the pattern")
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        with open(path, "rb") as file:
            for name, offset, size in _tar_members(file, path):
                folder, base = os.path.split(name)
                key, _, extension = base.partition(".")
                samples.setdefault(os.path.join(folder, key), {})[extension.lower()] = (offset, size)
            for key, parts in samples.items():
                image = next((e for e in parts if f".{e}" in EXTENSIONS), None)
                if image is not None:
                    label = _wds_label(file, parts, where=f"{key} in {path}")
                    entries.append((number, *parts[image], label, f"{key}.{image}"))
    highest = max((entry[3] for entry in entries), default=-1)
    if highest < 0:
        raise ValueError(f"the shards of split {split!r} in {root} hold no images ({', '.join(sorted(EXTENSIONS))})")
    names = class_names or [str(label) for label in range(highest + 1)]
    if highest >= len(names):
        raise ValueError(f"split {split!r} in {root} has the label {highest}, but there are {len(names)} class names")
    return TarImages(where=f"{root} ({split})", classes=names, archives=archives, entries=entries, in_chans=in_chans)


def _wds_label(file: BinaryIO, parts: dict[str, tuple[int, int]], *, where: str) -> int:
    def content(extension: str) -> bytes:
        offset, size = parts[extension]
        file.seek(offset)
        return file.read(min(size, _LARGEST_LABEL))

    try:
        label = int(content("cls")) if "cls" in parts else int(json.loads(content("json"))["label"])
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{where} has no label: it needs a .cls member, or a number `label` in its .json") from error
    if label < 0:
        raise ValueError(f"{where} has the label {label}: labels count from 0")
    return label


def wds_shards(root: str, split: str) -> list[str]:
    """Paths of the shards of a split, in order; see `wds_images`."""
    for name in ("_info.json", "info.json"):
        path = os.path.join(root, name)
        if os.path.isfile(path):
            try:
                splits = json.loads(read_bytes(path))["splits"]
                if split in splits:
                    return [os.path.join(root, shard) for shard in splits[split]["filenames"]]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f'cannot read {path} ({error}): it must hold {{"splits": {{NAME: {{"filenames": [SHARD, …]}}}}}}. '
                    "Mend it, or remove it and give the splits as patterns: data.train_split train-{0000..0127}.tar"
                ) from error
    pattern = split.split("|")[0]  # timm allows |number-of-samples here
    if ".tar" not in pattern:
        pattern = f"*{pattern}-*.tar"
    expanded = _expand_braces(pattern)
    if any(character in pattern for character in "*?["):
        return sorted(path for one in expanded for path in glob(os.path.join(glob_escape(root), one)))
    return [os.path.join(root, one) for one in expanded]


def glob_escape(path: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", path)


def _expand_braces(pattern: str) -> list[str]:
    """`a{08..10}` → a08, a09, a10; several braces multiply, `{a,b}` lists."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    inside = match[1]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        width = len(span[1])
        choices = [f"{number:0{width}d}" for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        choices = inside.split(",")
    return [pattern[: match.start()] + one + rest for one in choices for rest in _expand_braces(pattern[match.end() :])]


class HuggingFaceImages(LabelledImages):
    """A split of a Hugging Face data set through timm's reader (`hfds/<name>`), columns `image` and `label`.

    Raises:
        ValueError: the package `datasets` is missing, or the data set or the split is.
    """

    def __init__(
        self, dataset: str, *, root: str | None, split: str, class_names: list[str] | None, in_chans: int = 3
    ) -> None:
        try:
            import datasets  # noqa: F401  (timm's reader prints and fails without it)
        except ImportError:
            raise ValueError(f"{dataset} needs the package datasets: pip install datasets") from None
        from timm.data import create_dataset

        where = f"{dataset} ({split})"
        try:
            reader: Any = create_dataset(dataset, root=root, split=split).reader
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(f"cannot load {where}: {error}. Check the name, and the split (data.*_split)") from error
        label_N = np.fromiter(reader.iter_targets(), dtype=np.int64, count=len(reader))
        found = sorted(reader.class_to_idx, key=reader.class_to_idx.get)
        names = class_names or found or [str(label) for label in range(int(label_N.max(initial=-1)) + 1)]
        if len(label_N) == 0 or label_N.min() < 0 or label_N.max() >= len(names):
            raise ValueError(f"{where} is empty, or has labels outside 0 … {len(names) - 1}, its {len(names)} classes")
        super().__init__(where=where, classes=names, label_N=label_N, in_chans=in_chans)
        self.reader = reader

    def file(self, place: int) -> tuple[str, str | bytes]:
        with self.reader[place][0] as file:
            return f"{place} of {self.where}", file.read()


def stratified_split(label_N: np.ndarray, *, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of (kept, held out) images: of every class about `fraction` is held out, at least one, and one is kept.

    Raises:
        ValueError: a class has one image only.
    """
    random = np.random.default_rng(seed)
    held_out = []
    for label in np.unique(label_N):
        places = np.flatnonzero(label_N == label)
        if len(places) < 2:
            raise ValueError(f"class number {label} has one image, so val_fraction cannot hold one out: add images")
        count = min(max(round(fraction * len(places)), 1), len(places) - 1)
        held_out.append(random.permutation(places)[:count])
    val_M = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(label_N)), val_M), val_M
