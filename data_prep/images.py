"""Reads the image files of collections as upright 8-bit RGB, and says which files cannot be read.

How odd files are read:

    grey, palette, bilevel, CMYK, YCbCr  converted to RGB as Pillow does
    16 bits a channel                    scaled to 8 (Pillow alone would cut grey ones off at 255)
    alpha or a transparent colour        composited on white
    EXIF orientation                     applied; EXIF that cannot be read is ignored
    animated, or of several pages        the first frame
    colour profiles                      ignored, as img2dataset does
    truncated, empty, no image, LAB or floating point, more than 178,956,970 pixels   `Unusable`

UNSTATED: the paper does not say how it reads and resamples images, only that it augments none; all of this is ours.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

# Pillow's other formats are left out: some run a program (EPS), or are not pictures.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
AS_THEY_ARE = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
# What Pillow raises on files that are truncated or damaged.
DECODING = (
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, AttributeError, AssertionError),
    *(OverflowError, ZeroDivisionError, RuntimeError, MemoryError, struct.error, zlib.error),
)
QUALITY = 95  # of JPEG files; colour is not subsampled


class Unusable(ValueError):
    """A record cannot be used, and why.

    Args:
        reason: a few words, equal for all records of one kind, since reasons are counted.
        detail: what is special to this record.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class Picture(NamedTuple):
    """An image file as a shard stores it."""

    data: bytes
    kind: str  # png, jpg or webp
    width: int
    height: int


def decode(data: bytes) -> Image.Image:
    """An image file's first frame, upright, in 8-bit RGB.

    Raises:
        Unusable: the file is not an image of a common format, is truncated, or is too large.
    """
    return _decode(data)[0]


def fit(data: bytes, sizes: Sequence[tuple[int, int]]) -> Picture:
    """An image file scaled and cropped to a size, as JPEG; a file that already has the size may stay as it is.

    The crop is the largest part with the size's aspect, from the middle. A JPEG, PNG or WebP stays as it is, without
    another loss, if it is opaque, upright 8-bit RGB with one frame.

    Args:
        data: the bytes of the file.
        sizes: sizes (width, height) in pixels to choose from.

    Raises:
        Unusable: the image cannot be decoded, or is smaller than the size it would get.
    """
    image, plain = _decode(data)
    width, height = bucket(*image.size, sizes)
    if plain and image.size == (width, height):
        return Picture(data, plain, width, height)
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    buffer = io.BytesIO()
    # UNSTATED: the paper names no resampling filter; we take Lanczos, which preserves most detail.
    scaled = image.resize((width, height), Image.Resampling.LANCZOS, box)
    scaled.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return Picture(buffer.getvalue(), "jpg", width, height)


def bucket(width: int, height: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size an image gets: among the sizes of nearest aspect, the largest that does not enlarge the image.

    UNSTATED: the paper groups images by aspect ratio and does not say into which groups.

    Args:
        width: the image's width, in pixels.
        height: the image's height, in pixels.
        sizes: sizes (width, height) to choose from.

    Raises:
        Unusable: the image would have to be enlarged.
    """
    off = [abs(math.log(width * h / (height * w))) for w, h in sizes]
    alike = [size for size, distance in zip(sizes, off, strict=True) if distance - min(off) < 1e-9]
    covered = [(w, h) for w, h in alike if w <= width and h <= height]
    if not covered:
        w, h = min(alike, key=math.prod)
        raise Unusable("too small", f"{width}x{height} would have to be enlarged to {w}x{h}")
    return max(covered, key=math.prod)


def _decode(data: bytes) -> tuple[Image.Image, str]:
    """The image, and the file's kind if a shard can store the file as it is, else an empty text."""
    if not data:
        raise Unusable("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about strange metadata, and about large sizes that are still allowed
        try:
            file = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise Unusable("too many pixels", str(error)) from error
        except DECODING as error:
            raise Unusable("not an image", f"it begins with {data[:16]!r}") from error
        try:
            file.load()
            image = _upright(file)
            simple = file.mode == "RGB" and not file.has_transparency_data and getattr(file, "n_frames", 1) == 1
            return _rgb(image), AS_THEY_ARE.get(file.format or "", "") if simple and image is file else ""
        except Unusable:
            raise
        except Image.DecompressionBombError as error:
            raise Unusable("too many pixels", str(error)) from error
        except DECODING as error:
            raise Unusable("broken image", _brief(error)) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        if image.getexif().get(0x0112, 1) == 1:  # orientation
            return image
        return ImageOps.exif_transpose(image)
    except DECODING:
        return image


def _rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB; transparent parts become white."""
    if image.mode.startswith("I"):  # I;16, I;16B, or 16 bits in 32
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise Unusable("no 8-bit or 16-bit channels", "32-bit integers")
        return Image.fromarray((values.astype(np.uint32) * 255 // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("F", "LAB"):
        raise Unusable("no 8-bit or 16-bit channels", {"F": "floating point", "LAB": "LAB colours"}[image.mode])
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
