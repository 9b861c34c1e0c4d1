"""What every benchmark has in common: the pictures that `lidit sample` draws, and reading them from the run folder.

A benchmark is a module of `lidit.eval` with two functions: `suite(prompts_dir)` gives the pictures to draw, in the
layout of the benchmark's authors, and `score(run, ...)` gives the content of scores.json. Only the run folder connects
them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError


@dataclass(frozen=True)
class Picture:
    """One image file to draw.

    Args:
        path: path of the file, relative to the run folder, with forward slashes.
        prompt: the prompt to draw.
        sample: number of this sample among the prompt's samples, from 0; with the run's seed it decides the noise.
        tiles: number of samples in the image, which form a square row by row, from `sample` on (DPG-Bench: 4).
    """

    path: str
    prompt: str
    sample: int = 0
    tiles: int = 1


@dataclass(frozen=True)
class Suite:
    """A benchmark's pictures, and the files that go with them.

    Args:
        name: name of the benchmark.
        pictures: the pictures, in the order in which they are drawn.
        sources: SHA-256 of each prompt file that was read, by its path.
        files: content of text files to write to the run folder beside the pictures, by relative path.
    """

    name: str
    pictures: list[Picture]
    sources: dict[str, str]
    files: dict[str, str] = field(default_factory=dict)


class BenchmarkError(ValueError):
    """Something that a person must correct: a missing or altered file, an unreadable or missing image."""


def prompt_file(folder: Path, name: str, published: str, git_blob: str | None = None) -> tuple[str, str]:
    """The text of a benchmark's prompt file, and its SHA-256.

    Args:
        folder: the user's folder of prompt files.
        name: name of the file in the folder.
        published: where to get the file, for the message.
        git_blob: the expected `git hash-object` of the file; None: the content is not checked.

    Raises:
        BenchmarkError: the file is missing, or is not the benchmark's.
    """
    path = folder / name
    if not path.is_file():
        raise BenchmarkError(f"{path} is missing; get it from {published} and put it there")
    content = path.read_bytes()
    found = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if git_blob is not None and found != git_blob:
        raise BenchmarkError(
            f"{path} is not the benchmark's file: git hash-object gives {found}, expected {git_blob}; "
            f"get it from {published}"
        )
    return content.decode("utf-8"), hashlib.sha256(content).hexdigest()


def read_image(path: Path) -> np.ndarray:
    """An image file as uint8 RGB, height x width x 3.

    Raises:
        BenchmarkError: the file is missing or cannot be read.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError as error:
        raise BenchmarkError(f"{path} is missing; finish the run with lidit sample") from error
    except (UnidentifiedImageError, OSError) as error:
        raise BenchmarkError(
            f"{path} cannot be read as an image ({error}); delete it and run lidit sample again"
        ) from error


def present(run: Path, paths: list[str], allow_missing: bool) -> list[str]:
    """The paths whose files exist in the run folder.

    Raises:
        BenchmarkError: all files are missing, or some are missing without `allow_missing`.
    """
    found = [path for path in paths if (run / path).is_file()]
    if len(found) == len(paths):
        return found
    missing = next(path for path in paths if not (run / path).is_file())
    count = f"{run} holds {len(found)} of {len(paths)} images; the first missing one is {missing}"
    if not found:
        raise BenchmarkError(f"{count}; run lidit sample first")
    if not allow_missing:
        raise BenchmarkError(f"{count}; finish the run with lidit sample, or pass --allow_missing true to score these")
    return found
