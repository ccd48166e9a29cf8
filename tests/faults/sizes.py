"""Files that are small and would become large, or say that they are: each is read by a process, its memory measured."""

from __future__ import annotations

import gzip
import json
import os
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image

from hornet_lit.cli_errors import MAX_LINES

from .command import PREFIX, empty_folder
from .row import Row

GIB = 2**30
BOMB = 3 * GIB  # what a file would take, at least
MOST = 2 * GIB  # that a process may take; the imports alone take almost half of it
SECONDS = 120
DIGITS = ["--config", "digits", "--trainer.accelerator", "cpu"]


def rows(*, thorough: bool) -> Iterator[Row]:
    """Gigabytes of files, so that the fast subset has none: test_hostile.py reads two without writing them out."""
    if thorough:
        with empty_folder():
            yield from _rows()


def _rows() -> Iterator[Row]:
    Path("images/train/a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save("images/train/a/0.png")
    for case, make, words in attacks():
        path = Path(make.__name__ + (".safetensors" if case.startswith("safetensors") else ""))
        make(path)
        try:
            yield measured(case, [word.format(path) for word in words])
        finally:
            if path.is_file():
                path.unlink()
    yield billion_laughs()


def measured(case: str, words: list[str]) -> Row:
    """Runs the command in a process of its own."""
    start = time.monotonic()
    with Path("errors").open("wb") as errors:
        command = [sys.executable, "-m", "hornet_lit", *words]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, preexec_fn=_limit)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = code = os.waitstatus_to_exitcode(status)
    _, found, message = Path("errors").read_text(errors="replace").rpartition(PREFIX)
    lines = message.strip().splitlines() if found else []
    peak, seconds = usage.ru_maxrss * 1024, time.monotonic() - start
    right = code == 2 and 1 <= len(lines) <= MAX_LINES and peak < MOST and seconds < SECONDS
    said = lines[0][:120] if lines else Path("errors").read_text(errors="replace")[-200:]
    return Row(case=case, outcome=f"exit {code}, {peak / GIB:.2f} GiB, {seconds:.0f} s: {said}", right=right)


def _limit() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_DATA, (16 * GIB, 16 * GIB))  # a failure shall not take the machine down


def attacks() -> Iterator[tuple[str, Callable[[Path], None], list[str]]]:
    """(what, a function that makes the file of its own name, the command)."""
    validate, weights = ["validate", *DIGITS, "--ckpt_path", "{}"], ["fit", *DIGITS, "--model.weights", "{}"]
    convert = ["convert", "{}", "out.safetensors"]
    yield "compressed checkpoint", compressed, validate
    yield "compressed weights", compressed, weights
    yield "compressed input of convert", compressed, convert
    yield "checkpoint whose archive claims a terabyte", claiming, validate
    yield "checkpoint of a million lists in each megabyte", lists, validate
    yield "weights of a million lists in each megabyte", lists, weights
    yield "old weights of a million lists in each megabyte", legacy_lists, weights
    yield "old weights whose tensor claims a terabyte", legacy_claim, weights
    yield "weights whose tensor is one number, a trillion times", expanded, weights
    yield "convert: a tensor is one number, a trillion times", expanded_checkpoint, convert
    yield "sharded checkpoint, metadata of lists", metadata_lists, validate
    yield "sharded checkpoint, metadata that numbers its objects high", metadata_memo, validate
    yield "safetensors with a header of 2^60 bytes", long_header, weights
    yield "safetensors with nested brackets as class names", nested_names, weights
    yield "safetensors with overlapping tensors", overlapping, weights
    yield "recipe of 8 GiB", hollow, ["fit", "--config", "{}"]
    imagenet = ["--config", "hornet_t_in1k", *DIGITS[2:], "--data.root", "images"]
    yield "class list of 8 GiB", hollow, ["fit", *imagenet, "--data.class_map", "{}"]
    predict = ["predict", *imagenet, "--model.weights", "images/train/a/0.png"]  # it is read after the list
    yield "list of images of 8 GiB", hollow, [*predict, "--data.predict_path", "{}"]
    yield "tar with a header of gigabytes", tar_header, ["fit", "--config", "cifar10", *DIGITS[2:], "--data.root", "{}"]
    yield "tar of a million members", tar_members, ["fit", "--config", "cifar10", *DIGITS[2:], "--data.root", "{}"]
    yield "tar with an image of gigabytes", tar_image, ["fit", "--config", "cifar10", *DIGITS[2:], "--data.root", "{}"]


# ---- files of torch.save


def compressed(path: Path) -> None:
    torch.save({"state_dict": {}}, "plain.pt")
    with zipfile.ZipFile("plain.pt") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in plain.namelist():
            with bomb.open(name, "w", force_zip64=True) as file:
                file.write(plain.read(name))
                for _ in range(BOMB // 2**24 if name.endswith("data.pkl") else 0):
                    file.write(bytes(2**24))


def claiming(path: Path) -> None:
    torch.save({"state_dict": {"x": torch.ones(1000)}}, path)
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    while b"data.pkl" not in data[entry : entry + 100]:
        entry = data.rindex(b"PK\x01\x02", 0, entry)
    struct.pack_into("<II", data, entry + 20, 2**32 - 2, 2**32 - 2)
    path.write_bytes(data)


def lists(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"]" * 2**26 + b".")
        archive.writestr("archive/version", b"3\n")


def legacy_lists(path: Path) -> None:
    path.write_bytes(b"\x80\x02" + b"]" * 2**26 + b".")


def legacy_claim(path: Path) -> None:
    torch.save({"x": torch.zeros(1234)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(struct.pack("<H", 1234), struct.pack("<H", 65535)))


def expanded(path: Path) -> None:
    torch.save({"model": {"head.bias": torch.zeros(1).expand(10**12)}}, path)


def expanded_checkpoint(path: Path) -> None:
    state = {"network.head.bias": torch.zeros(1).expand(10**12)}
    torch.save({"pytorch-lightning_version": "2.6.6", "hyper_parameters": {}, "state_dict": state}, path)


def _folder(path: Path, metadata: bytes) -> None:
    path.mkdir()
    (path / ".metadata").write_bytes(metadata)
    torch.save({"hyper_parameters": {}}, path / "meta.pt")
    files = {each.name: each.stat().st_size for each in path.iterdir()}
    (path / "complete.json").write_text(json.dumps({"version": 1, "processes": 1, "files": files}))


def metadata_lists(path: Path) -> None:
    _folder(path, b"\x80\x02" + b"]" * 2**26 + b".")


def metadata_memo(path: Path) -> None:
    _folder(path, b"\x80\x02Nr" + struct.pack("<I", 2**30) + b".")  # None, stored as number 2^30


# ---- safetensors


def long_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")


def nested_names(path: Path) -> None:
    notes = {"__metadata__": {"class_names": "[" * 2**22}}
    path.write_bytes(_packed(json.dumps(notes).encode()))


def overlapping(path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2**20], "data_offsets": [0, 2**22]}
    header = json.dumps({f"layer{i}": entry for i in range(1000)}).encode()
    path.write_bytes(_packed(header) + bytes(2**22))


def _packed(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


# ---- texts and archives


def hollow(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(8 * GIB)


def billion_laughs() -> Row:
    """A recipe whose aliases stand for 10^30 values; the time is that of the command alone, without imports."""
    from .command import ask

    lines = ["a0: &a0 [ha]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 31)]
    lines += ["b0: &b0 {k: 1}"] + [f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 10)}]}}" for i in range(1, 31)]
    Path("laughs.yaml").write_text("\n".join(lines))
    start = time.monotonic()
    answer = ask(["fit", "--config", "laughs.yaml"])
    seconds = time.monotonic() - start
    right = answer.is_told and seconds < 1
    return Row(case="recipe of a billion laughs", outcome=f"{seconds:.2f} s, {answer}", right=right)


def tar_header(path: Path) -> None:
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, BOMB
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(BOMB // 2**24):
            file.write(bytes(2**24))


def tar_members(path: Path) -> None:
    header = tarfile.TarInfo("train/cat/readme.txt").tobuf()
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(1000):
            file.write(header * 1000)
        file.write(bytes(1024))


def tar_image(path: Path) -> None:
    header = tarfile.TarInfo("train/cat/0.png")
    header.size = BOMB
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header.tobuf())
        for _ in range(BOMB // 2**24):
            file.write(bytes(2**24))
