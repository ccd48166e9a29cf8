"""Decoding one image file: any mode to 8-bit greyscale or RGB, and errors that name the file.

torchvision and timm read 16-bit PNG as white, name no file, or (timm) silently put another image in place of a bad one.
"""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data.readers.img_extensions import IMG_EXTENSIONS

# timm's own list is PNG and JPEG only; these are the other formats that people keep photographs in.
EXTENSIONS = frozenset({*IMG_EXTENSIONS, ".webp", ".bmp", ".tif", ".tiff"})
# By content, whatever the name says. Pillow would try some forty more, EPS among them, which it hands to Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
LARGEST_FILE = 2**30  # bytes; uncompressed, an image as large as Pillow's limit on pixels takes half of that


class UnreadableImageError(ValueError):
    """An image file that cannot be decoded; the message names it and says what to do.

    Attributes:
        file: what the error calls the file.
        reason: why it cannot be read.
    """

    def __init__(self, message: str, *, file: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.file = file
        self.reason = reason


def read_image(file: str | Path | bytes, *, name: str, in_chans: int = 3) -> Image.Image:
    """Decode an image completely.

    Args:
        file: path, or the encoded bytes.
        name: what to call the file in an error, usually its path.
        in_chans: 3 for mode RGB, 1 for mode L. Alpha is dropped, EXIF rotation ignored, as in the published code.

    Returns:
        PIL image of 8 bits a channel. 16-bit greyscale is scaled by 1/257.

    Raises:
        UnreadableImageError: missing, truncated, not an image, too large, or of a pixel type without a known range.
    """
    try:
        if not isinstance(file, bytes):
            file = read_bytes(file)
        _check_size(len(file))
        with Image.open(io.BytesIO(file), formats=FORMATS) as image:
            return _to_8_bit(image, "RGB" if in_chans == 3 else "L")
    except Exception as error:  # Pillow's decoders raise SyntaxError, struct.error, DecompressionBombError, … too
        if not file:
            reason = "the file is empty"
        elif isinstance(error, Image.UnidentifiedImageError):
            reason = f"none of the image formats {', '.join(FORMATS)}"
        else:
            reason = str(error).rstrip(".") or type(error).__name__
        raise UnreadableImageError(
            f"cannot read image {name}: {reason}. Replace the file, or take it out of the data",
            file=name,
            reason=reason,
        ) from error


def read_bytes(path: str | Path) -> bytes:
    """The contents of an ordinary file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a pipe or a device, which might never end, or larger than any image.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("no ordinary file")
    _check_size(status.st_size)
    return Path(path).read_bytes()


def _check_size(size: int) -> None:
    if size > LARGEST_FILE:
        raise ValueError(f"{size} bytes, more than is read of one file ({LARGEST_FILE})")


def _to_8_bit(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # I;16, I;16B, I: Pillow's own conversion clips at 255, that is: nearly all white
        grey_HW = np.asarray(image)
        if grey_HW.min() < 0 or grey_HW.max() > 65535:
            raise ValueError("32-bit integer pixels; save it with 8 or 16 bits a channel")
        # To the nearest, in integers: floats would take eight bytes a pixel.
        image = Image.fromarray(((grey_HW.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels of unknown range; save it with 8 or 16 bits a channel")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB Pillow warns, and this gives the same colours
    elif image.format == "JPEG" and image.mode == mode:
        image.load()  # convert would copy them as well
        return image
    return image.convert(mode)  # also loads the pixels, so a truncated file fails here and not later
