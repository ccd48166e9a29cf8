"""What is checked of a file before and after torch reads it, so that a hostile one cannot fill the memory.

torch.load(weights_only=True) runs no code, but believes what a file says about sizes: a few kB of compressed zeros
become gigabytes, and a tensor of one number may call itself a million large.
"""

from __future__ import annotations

import hashlib
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

MAX_PICKLE = 16 * 2**20  # bytes of the pickle beside the tensors' data; one of a large network's checkpoint has below 1
MAX_SHARED = 2  # tied weights are stored once
LEGACY_PICKLES = 5  # of torch before 1.6: number, version, system, contents, names of the tensors' data


def check_file(path: Path) -> None:
    """Refuse a file of torch.save whose reading takes more memory than it has bytes.

    Raises:
        ValueError: compressed or overlapping entries in the archive, or a pickle far larger than a network's.
    """
    if not zipfile.is_zipfile(path):
        _check_legacy(path)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises all kinds on a damaged one
        raise ValueError(f"damaged archive ({error})") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its entries are compressed, which torch.save never does")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("its entries overlap or claim more bytes than it has")
    if any(entry.file_size > MAX_PICKLE for entry in entries if entry.filename.endswith(".pkl")):
        raise ValueError(f"its pickle is larger than {MAX_PICKLE // 2**20} MB")


def _check_legacy(path: Path) -> None:
    with path.open("rb") as file:
        for _ in range(LEGACY_PICKLES):
            start = file.tell()
            try:
                for _ in pickletools.genops(file):  # reads without running anything
                    if file.tell() - start > MAX_PICKLE:
                        break
            except Exception:  # torch says what is wrong with it
                return
            if file.tell() - start > MAX_PICKLE:
                raise ValueError(f"its pickle is larger than {MAX_PICKLE // 2**20} MB")


def check_tensors(state: Mapping[str, Any], path: Path) -> None:
    """Refuse tensors that are not what a file (or folder) of that size can hold: they would grow when they are copied.

    Raises:
        ValueError: names the first.
    """
    stored = sum(each.stat().st_size for each in (path.iterdir() if path.is_dir() else [path]))
    total = 0
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            continue
        dense = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        size = value.numel() * value.element_size()
        total += size
        if not dense or size > value.untyped_storage().nbytes() or total > MAX_SHARED * stored:
            shape = tuple(value.shape)
            raise ValueError(f"{path}: tensor {name[:80]!r} {shape} claims more values than the file holds")


def sha256(path: Path) -> str:
    """The file's digest, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_file(path: Path) -> Path:
    """Where the digest of ``path`` lies, in sha256sum's format."""
    return path.with_name(f"{path.name}.sha256")


def check_digest(path: Path) -> None:
    """Compare a file with the digest that is published with it, where there is one.

    That is FILE.sha256 beside it, as sha256sum writes it, or the digest's beginning in its name as torch.hub and
    mmpretrain have it: NAME-0e8eedff.pth. (Eight digits without a letter may be a date.)

    Raises:
        ValueError: they differ; names both.
    """
    beside = digest_file(path)
    named = re.search(r"-([0-9a-f]{8,64})\.\w+$", path.name)
    expected, source = None, ""
    if beside.is_file():
        with beside.open("rb") as file:
            words = file.read(4096).decode("ascii", "replace").split()
        expected, source = (words or [""])[0].lower(), beside.name
        if not re.fullmatch(r"[0-9a-f]{64}", expected):
            raise ValueError(f"{beside} holds no sha256 digest: fetch it again, or remove it to load unchecked")
    elif named and not named[1].isdecimal():
        expected, source = named[1], "its name"
    if expected is None or (actual := sha256(path)).startswith(expected):
        return
    raise ValueError(
        f"{path} is not the file that was published: its sha256 is {actual[: max(len(expected), 16)]}…, "
        f"and {source} says {expected}\nfetch it again; if it is a file of yours, rename it or make {beside.name} anew"
    )
