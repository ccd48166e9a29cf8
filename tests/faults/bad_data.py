"""Bad data through the command line: told with path and mend, odd images read right, and some skipped where asked for.

And mutated image files: see image_bytes.py.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image

from hornet_lit.data.images import read_image

from .command import Answer, ask, empty_folder
from .image_bytes import rows_of_image_bytes
from .row import Row

SIDE = 32
RUN = [
    *("--data", "ImageNetDataModule", "--data.img_size", SIDE, "--data.batch_size", 4, "--data.eval_batch_size", 4),
    *("--data.num_workers", 0, "--data.auto_augment", "null", "--data.crop_pct", 1.0),
    *("--model.network", "hornet_pico_32", "--model.img_size", SIDE, "--model.warmup_epochs", 0),
    *("--model.network_options", '{"base_dim": 16, "depths": [1, 1, 1, 1]}'),
    *("--trainer.accelerator", "cpu", "--trainer.devices", 1, "--trainer.max_epochs", 1),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--trainer.num_sanity_val_steps", 0, "--trainer.log_every_n_steps", 1),
]
VICTIM = "dog/3.png"
CHECKPOINT = "runs/fit/version_0/checkpoints"


def rows(*, thorough: bool) -> Iterator[Row]:
    with empty_folder() as here:
        _write_splits(here / "good")
        trained = _fit(here / "good")
        assert trained.code == 0, trained
        checkpoint = shutil.copy(next(Path(CHECKPOINT).glob("*.ckpt")), here / "trained.ckpt")
        few = ("truncated JPEG", "16-bit grey PNG", "empty class folder in train")
        found: list[Row] = []
        for all_of_a_kind in (_unreadable_images, _odd_images, _wrong_folders, _skipping):
            found += all_of_a_kind(here, Path(checkpoint), few=() if thorough else few)
        if thorough:
            found.append(_two_ranks(here))
        yield from (replace(row, outcome=row.outcome.replace(f"{here}/", "")) for row in found)
    yield from rows_of_image_bytes(tries=3000 if thorough else 150)


def _write_splits(root: Path, classes: tuple[str, ...] = ("cat", "dog")) -> None:
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = noise.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")


def _fit(root: Path, *more: object) -> Answer:
    shutil.rmtree("runs", ignore_errors=True)
    return ask([str(word) for word in ("fit", *RUN, "--data.root", root, *more)], train=True)


def _predict(checkpoint: Path, photos: Path) -> Answer:
    words = (
        "predict",
        "--ckpt_path",
        checkpoint,
        "--data.predict_path",
        photos,
        "--trainer.enable_progress_bar",
        "false",
    )
    return ask([str(word) for word in words], train=True)


def _copy(here: Path) -> Path:
    shutil.rmtree(here / "bad", ignore_errors=True)
    return shutil.copytree(here / "good", here / "bad")


def _told(answer: Answer, *said: str) -> bool:
    return answer.is_told and all(part in answer.text for part in said)


# ---- single images


def _saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _coarse() -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _deep_rgb_png(x_HWC: np.ndarray) -> bytes:
    """16 bits a channel, which Pillow reads but cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = x_HWC.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in x_HWC)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def _write(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def _unreadable_images(here: Path, checkpoint: Path, *, few: tuple[str, ...]) -> Iterator[Row]:
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    cases: dict[str, tuple[Callable[[Path], object], str]] = {
        "truncated JPEG": (_write(_saved(noise, "JPEG")[:-400]), "truncated"),
        "truncated PNG": (_write(_saved(noise)[:-4000]), "truncated"),
        "zero bytes": (_write(b""), "the file is empty"),
        "HTML named .png": (_write(b"<!DOCTYPE html><html>Sign in</html>"), "none of the image formats"),
        "PostScript named .png": (_write(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "none of the image"),
        "dangling link": (lambda path: path.symlink_to(path.parent / "gone"), "No such file"),
        "pipe": (lambda path: os.mkfifo(path), "no ordinary file"),
        "a terabyte": (lambda path: _sparse(path, 2**40), "more than is read of one file"),
        "400-megapixel bomb": (_write(_saved(Image.new("1", (20000, 20000)))), "exceeds limit"),
        "floating-point TIFF": (_write(_saved(Image.new("F", (9, 9)), "TIFF")), "floating-point pixels"),
        "32-bit TIFF": (_write(_saved(Image.new("I", (9, 9), 10**6), "TIFF")), "32-bit integer pixels"),
    }
    for case, (damage, reason) in cases.items():
        if few and case not in few:
            continue
        for split in ("train", "val"):
            path = _copy(here) / split / VICTIM
            path.unlink()
            damage(path)
            answer = _fit(here / "bad")
            right = _told(answer, f"cannot read image {path}: ", reason, "Replace the file")
            yield Row(case=f"{case} in {split}/: fit", outcome=str(answer), right=right)
        shutil.rmtree(here / "photos", ignore_errors=True)
        shutil.copytree(here / "good/val/dog", here / "photos")
        path = here / "photos/bad.png"
        damage(path)
        answer = _predict(checkpoint, here / "photos")
        right = _told(answer, f"cannot read image {path}: ", reason) and not Path("predictions.csv").exists()
        yield Row(case=f"{case}: predict", outcome=str(answer), right=right)


def _sparse(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        file.truncate(size)


def _odd_images(here: Path, checkpoint: Path, *, few: tuple[str, ...]) -> Iterator[Row]:
    """Images that are read, and the pixels they must have."""
    ramp_HW = np.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE)
    deep_HWC = np.stack([ramp_HW, ramp_HW[::-1], ramp_HW.T], axis=2)
    coarse = _coarse()
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = coarse.quantize(16)
    cases: dict[str, tuple[bytes, np.ndarray, float]] = {
        "16-bit grey PNG": (_saved(Image.fromarray(ramp_HW.astype(np.uint16))), ramp_HW[..., None] / 257, 1),
        "16-bit grey TIFF": (_saved(Image.fromarray(ramp_HW.astype(np.uint16)), "TIFF"), ramp_HW[..., None] / 257, 1),
        "16-bit RGB PNG": (_deep_rgb_png(deep_HWC), deep_HWC / 257, 1),
        "CMYK JPEG": (_saved(coarse.convert("CMYK"), "JPEG", quality=100, subsampling=0), np.asarray(coarse), 8),
        "palette PNG": (_saved(palette), np.asarray(palette.convert("RGB")), 0),
        "palette GIF": (_saved(palette, "GIF"), np.asarray(palette.convert("RGB")), 0),
        "PNG with alpha": (_saved(coarse.convert("RGBA")), np.asarray(coarse), 0),
        "EXIF-rotated PNG (not turned, as published)": (_saved(coarse, exif=turned), np.asarray(coarse), 0),
        "1×1 PNG": (_saved(Image.new("RGB", (1, 1), (1, 2, 3))), np.array([[[1, 2, 3]]]), 0),
    }
    for case, (data, wanted_HWC, tolerance) in cases.items():
        if few and case not in few:
            continue
        path = _copy(here) / "train" / VICTIM
        path.write_bytes(data)
        shutil.rmtree(here / "photos", ignore_errors=True)
        shutil.copytree(here / "bad/train/dog", here / "photos")
        error = np.abs(np.asarray(read_image(path, name="x")).astype(float) - wanted_HWC).max()
        codes = _fit(here / "bad").code, _predict(checkpoint, here / "photos").code
        Path("predictions.csv").unlink(missing_ok=True)
        outcome = f"fit exit {codes[0]}, predict exit {codes[1]}, pixels within {error:.1f} of 255"
        yield Row(case=case, outcome=outcome, right=codes == (0, 0) and error <= tolerance)


# ---- folders


def _wrong_folders(here: Path, checkpoint: Path, *, few: tuple[str, ...]) -> Iterator[Row]:
    def empty(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()

    def link(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.symlink_to(folder.parent / "gone")

    cases: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
        "empty class folder in train": (lambda r: empty(r / "train/cat"), ("train/cat holds no images", "fill it")),
        "empty class folder in val": (lambda r: empty(r / "val/cat"), ("val/cat holds no images", "fill it")),
        "class folder is a dangling link": (
            lambda r: link(r / "train/cat"),
            ("train/cat is a link to nothing", "mend"),
        ),
        "train {cat, dog}, val {dog}": (
            lambda r: shutil.rmtree(r / "val/cat"),
            ("val has no images of 1 of the 2 classes, such as 'cat'", "class_map"),
        ),
        "val has a class that train lacks": (
            lambda r: shutil.copytree(r / "val/cat", r / "val/cow"),
            ("val has the class 'cow', which the training set lacks", "remove its images"),
        ),
        "train/ missing": (lambda r: shutil.rmtree(r / "train"), ("no train/ in", "put its class folders")),
        "val/ missing": (lambda r: shutil.rmtree(r / "val"), ("no val/ or validation/ in", "data.val_fraction")),
        "images not in class folders": (
            lambda r: _flatten(r / "train"),
            ("no class folders in", "one folder per class"),
        ),
    }
    for case, (damage, said) in cases.items():
        if few and case not in few:
            continue
        damage(_copy(here))
        answer = _fit(here / "bad")
        yield Row(case=case, outcome=str(answer), right=_told(answer, str(here / "bad"), *said))
    if few:
        return
    _copy(here)
    with _refusing(here / "bad/train/dog"):
        answer = _fit(here / "bad")
    right = _told(answer, f"cannot list folder {here / 'bad/train/dog'}: Permission denied", "Make it readable")
    yield Row(case="class folder that may not be read", outcome=str(answer), right=right)
    answer = ask(["test", "--ckpt_path", str(checkpoint), "--data.test_split", "test"], train=True)
    right = _told(answer, "no test/ in", "data.test_split")
    yield Row(case="split test missing: test", outcome=str(answer), right=right)
    for split in ("train", "val"):
        (here / "bad" / split / ".ipynb_checkpoints").mkdir()
        shutil.copy(here / "bad" / split / "dog/0.png", here / "bad" / split / ".ipynb_checkpoints/0.png")
    answer = _fit(here / "bad")
    saved = torch.load(next(Path(CHECKPOINT).glob("*.ckpt")), weights_only=True)
    outcome = f"exit {answer.code}, classes {saved['class_names']}"
    right = answer.code == 0 and saved["class_names"] == ["cat", "dog"]
    yield Row(case=".ipynb_checkpoints in train/ and val/", outcome=outcome, right=right)


def _flatten(folder: Path) -> None:
    for number, path in enumerate(list(folder.glob("*/*"))):
        path.rename(folder / f"{number}.png")
    for path in [path for path in folder.iterdir() if path.is_dir()]:
        path.rmdir()


def _refusing(folder: Path) -> AbstractContextManager[object]:
    """`folder` may not be listed, also where the tests run as root, whom no permission stops."""
    scandir = os.scandir

    def refuse(path: str | int = ".") -> Iterator[os.DirEntry[str]]:
        if not isinstance(path, int) and os.fspath(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    return mock.patch("os.scandir", refuse)


# ---- skipping


def _damage_two(root: Path) -> list[str]:
    bad = [str(root / split / name) for split in ("train", "val") for name in ("cat/0.png", VICTIM)]
    for path in bad:
        Path(path).write_bytes(b"<html>")
    return bad


def _listed(path: Path) -> list[str]:
    with open(path, newline="") as file:
        return sorted({row[0] for row in csv.reader(file)})


def _skipping(here: Path, checkpoint: Path, *, few: tuple[str, ...]) -> Iterator[Row]:
    bad = _damage_two(_copy(here))
    answer = _fit(here / "bad", "--data.skip_unreadable", 1)
    right = _told(answer, "more than data.skip_unreadable 1 images", "unreadable_train.csv", "check-data")
    yield Row(case="cap of 1, and 2 unreadable in train/: fit", outcome=str(answer), right=right)
    for workers in () if few else (0, 2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            answer = _fit(here / "bad", "--data.skip_unreadable", 2, "--data.num_workers", workers)
        folder = Path("runs/fit/version_0")
        lists = [_listed(folder / f"unreadable_{split}.csv") for split in ("train", "val")]
        said = [str(warning.message) for warning in caught if "cannot be read" in str(warning.message)]
        outcome = f"exit {answer.code}; {'; '.join(text.split(';')[0].replace(str(here), '') for text in said)}"
        right = answer.code == 0 and lists == [bad[:2], bad[2:]] and len(said) == 2 and "count in no result" in said[1]
        yield Row(case=f"cap of 2 in train/ and val/, {workers} workers: fit", outcome=outcome, right=right)
    for command, split in () if few else (("validate", "val"), ("test", "test")):
        words = (
            command,
            "--ckpt_path",
            checkpoint,
            "--data.root",
            here / "bad",
            "--trainer.enable_progress_bar",
            "false",
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            answers = [ask([*map(str, words), "--data.skip_unreadable", str(cap)], train=True) for cap in (0, 2)]
        said = [str(warning.message) for warning in caught if "count in no result" in str(warning.message)]
        listed = _listed(Path(f"unreadable_{split}.csv"))
        outcome = f"without: {answers[0]}; with: exit {answers[1].code}; {said[0].split(';')[0] if said else ''}"
        right = _told(answers[0], "cannot read image") and answers[1].code == 0 and len(said) == 1 and listed == bad[2:]
        yield Row(case=f"2 unreadable in val/, with and without a cap of 2: {command}", outcome=outcome, right=right)


def _two_ranks(here: Path) -> Row:
    bad = _damage_two(_copy(here))
    words = [*RUN, "--data.root", here / "bad", "--data.skip_unreadable", 2, "--config", "ddp", "--trainer.devices", 2]
    command = [sys.executable, "-m", "hornet_lit", "fit", *map(str, words)]
    with tempfile.TemporaryDirectory() as folder:
        paths = {"PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(command, cwd=folder, env=os.environ | paths, capture_output=True, text=True, timeout=300)
        lists = [_listed(path) for path in sorted(Path(folder).glob("runs/fit/version_0/unreadable_*.csv"))]
    outcome = f"exit {done.returncode}; {[len(files) for files in lists]} files listed"
    right = done.returncode == 0 and lists == [bad[:2], bad[2:]]
    return Row(case="cap of 2 in train/ and val/, 2 processes: fit", outcome=outcome, right=right)
