"""Pictures as arrays of bytes: their sizes, side by side, and as PNG files. Nothing here needs torch."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, PngImagePlugin

from lidit.disk.whole import replacing

GAP = 2  # white pixels between the images of a grid


def parse_size(size: str) -> tuple[int, int]:
    """Width and height in pixels of a size such as '96x64'.

    Raises:
        ValueError: the text is not of that form.
    """
    width, _, height = size.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ValueError(f"size {size!r} is not of the form WIDTHxHEIGHT in pixels, for example 96x64")
    return int(width), int(height)


def tiled(images: list[np.ndarray]) -> np.ndarray:
    """Images of one size (h w 3) side by side in a square, row by row, without a gap.

    Raises:
        ValueError: the number of images is no square.
    """
    side = math.isqrt(len(images))
    if side * side != len(images):
        raise ValueError(f"{len(images)} tiles make no square")
    return np.concatenate([np.concatenate(images[i * side : (i + 1) * side], 1) for i in range(side)])


def grid(images: list[UInt8[np.ndarray, "h w 3"]]) -> UInt8[np.ndarray, "H W 3"]:
    """Images of one size side by side on white, row by row, in a picture that is nearly square."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width = images[0].shape[:2]
    picture = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = GAP + i // columns * (height + GAP), GAP + i % columns * (width + GAP)
        picture[y : y + height, x : x + width] = image
    return picture


def save_image(image: np.ndarray, path: Path, facts: dict[str, object]) -> None:
    """Write a PNG with facts about the image, such as prompt and seed, as text chunks; complete or not at all."""
    text = PngImagePlugin.PngInfo()
    for key, value in facts.items():
        text.add_itxt(key, str(value))
    with replacing(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG", pnginfo=text)
