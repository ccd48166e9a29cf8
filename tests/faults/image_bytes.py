"""Mutated image files: each is decoded to 8 bits or refused by name, within bounded memory and time."""

from __future__ import annotations

import io
import struct
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hornet_lit.data.images import FORMATS, UnreadableImageError, read_image

from .row import Row

MOST_SECONDS = 20
MOST_BYTES = 2 * 2**30  # Pillow's limit on pixels, at 4 bytes, twice: decoded and converted


def rows_of_image_bytes(*, tries: int) -> Iterator[Row]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about damaged metadata and large images
        yield _mutations(tries)
        for name, data in _bombs().items():
            yield _bomb(name, data)


def _mutations(tries: int) -> Row:
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    slowest = 0.0
    _reset_peak()
    before = _peak()

    @settings(
        max_examples=tries, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(_image_bytes())
    def decode(data: bytes) -> None:
        nonlocal slowest
        start = time.perf_counter()
        try:
            image = read_image(data, name="x")
            seen["decoded" if image.mode == "RGB" and min(image.size) > 0 else "WRONG MODE"] += 1
        except UnreadableImageError as error:
            seen["refused by name" if str(error).startswith("cannot read image x: ") else "NO NAME"] += 1
        except BaseException as error:
            wrong.append(repr(error))
        slowest = max(slowest, time.perf_counter() - start)

    decode()
    grown = _peak() - before
    counts = ", ".join(f"{count} {what}" for what, count in seen.most_common())
    outcome = (
        f"{counts}, {len(wrong)} other exceptions {wrong[:1]}, {slowest:.1f} s and {grown / 2**20:.0f} MiB at most"
    )
    right = not wrong and set(seen) == {"decoded", "refused by name"} and slowest < MOST_SECONDS and grown < MOST_BYTES
    return Row(
        case=f"{sum(seen.values()) + len(wrong)} mutated image files ({', '.join(FORMATS)})",
        outcome=outcome,
        right=right,
    )


def _bomb(name: str, data: bytes) -> Row:
    _reset_peak()
    before, start = _peak(), time.perf_counter()
    try:
        outcome = "decoded: {0.width}×{0.height}".format(read_image(data, name="x"))
    except UnreadableImageError as error:
        outcome = str(error)[:120]
    seconds, grown = time.perf_counter() - start, _peak() - before
    is_refused = outcome.startswith("cannot read image x: ")
    return Row(
        case=f"{name}, {len(data)} bytes",
        outcome=f"{outcome} ({seconds:.1f} s, {grown / 2**20:.0f} MiB)",
        right=is_refused and seconds < MOST_SECONDS and grown < 2**28,
    )


def _peak() -> int:
    """Most bytes that this process has held in memory since `_reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


# ---- mutations


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def _seeds() -> list[bytes]:
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (19, 23, 3), dtype=np.uint8))
    grey = Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160)
    return [
        _saved(colours, "JPEG"),
        _saved(colours, "JPEG", progressive=True),
        _saved(colours.convert("CMYK"), "JPEG"),
        _saved(colours.convert("L"), "JPEG"),
        _saved(colours, "PNG"),
        _saved(colours.convert("RGBA"), "PNG"),
        _saved(colours.convert("LA"), "PNG"),
        _saved(colours.quantize(9), "PNG", transparency=3),
        _saved(grey, "PNG"),
        _saved(colours, "WEBP"),
        _saved(colours.convert("RGBA"), "WEBP", lossless=True),
        _saved(colours, "TIFF"),
        _saved(colours, "TIFF", compression="tiff_lzw"),
        _saved(colours, "TIFF", compression="jpeg"),
        _saved(colours.convert("1"), "TIFF", compression="group4"),
        _saved(grey, "TIFF"),
        _saved(grey.convert("F"), "TIFF"),
        _saved(colours.quantize(9), "GIF"),
        _saved(colours.quantize(9), "GIF", save_all=True, append_images=[colours.convert("P")]),
        _saved(colours, "BMP"),
        _saved(colours.quantize(9), "BMP"),
    ]


@st.composite
def _image_bytes(draw: st.DrawFn) -> bytes:
    """A real file with bytes overwritten, cut, repeated, or another's; at times the start alone is real, or nothing."""
    seeds = _seeds()
    data = bytearray(draw(st.sampled_from(seeds)))
    if draw(st.integers(0, 9)) == 0:
        return bytes(data[: draw(st.sampled_from((0, 4, 16)))]) + draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(1, 3))):
        # Half of the changes in the headers, which decide about sizes and modes.
        first = draw(st.sampled_from((0, 8, 20)))  # the signature seldom: without it nothing is tried
        place = draw(st.integers(first, max(first, min(len(data), 120) if draw(st.booleans()) else len(data))))
        match draw(st.sampled_from(("overwrite", "overwrite", "large", "cut", "remove", "repeat", "splice"))):
            case "overwrite":
                new = draw(st.binary(min_size=1, max_size=4))
                data[place : place + len(new)] = new
            case "large":
                data[place : place + 4] = draw(
                    st.sampled_from((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\x40\0"))
                )
            case "cut":
                del data[max(place, 30) :]
            case "remove":
                del data[place : place + draw(st.integers(1, 16))]
            case "repeat":
                data[place:place] = data[place : place + draw(st.integers(1, 64))]
            case "splice":
                other = draw(st.sampled_from(seeds))
                data[place:] = other[place:]
    return bytes(data)


# ---- bombs


def _bombs() -> dict[str, bytes]:
    """Small files that claim more pixels than fit; the limit of Pillow itself is 179 megapixels."""
    small = Image.new("RGB", (8, 8))
    huge = struct.pack(">II", 20000, 20000)
    png = bytearray(_saved(small, "PNG"))
    png[16:24] = huge
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    bmp = bytearray(_saved(small, "BMP"))
    bmp[18:26] = struct.pack("<ii", 20000, 20000)
    gif = bytearray(_saved(small.quantize(2), "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    jpeg = bytearray(_saved(small, "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    webp = bytearray(_saved(small, "WEBP", lossless=True))
    start = webp.index(b"VP8L") + 9
    webp[start : start + 4] = struct.pack("<I", 16382 | 16382 << 14)
    tiff = _saved(Image.new("1", (20000, 20000)), "TIFF", compression="group4")
    real = _saved(Image.new("1", (20000, 20000)), "PNG")
    return {
        "PNG that says 400 megapixels": bytes(png),
        "PNG of 400 megapixels": real,
        "TIFF of 400 megapixels": tiff,
        "BMP that says 400 megapixels": bytes(bmp),
        "GIF that says 4295 megapixels": bytes(gif),
        "JPEG that says 4290 megapixels": bytes(jpeg),
        "WEBP that says 268 megapixels": bytes(webp),
    }
