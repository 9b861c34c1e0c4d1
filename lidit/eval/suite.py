"""What every benchmark tells `lidit sample` to draw, and what it finds in a run folder again.

A benchmark is a module of `lidit.eval` with two functions: `suite(prompts_dir)`, the pictures to draw in the layout of
its authors, and `score(run, ...)`, what is written to scores.json. The run folder is the only thing between them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError


@dataclass(frozen=True)
class Picture:
    """One image file.

    Args:
        path: of the file, relative to the run folder, with forward slashes.
        prompt: what it shows.
        sample: which of a prompt's samples this is, from 0; with the run's seed it decides the noise.
        tiles: how many samples it holds in a square, row by row, from `sample` on (DPG-Bench: 4).
    """

    path: str
    prompt: str
    sample: int = 0
    tiles: int = 1


@dataclass(frozen=True)
class Suite:
    """A benchmark's pictures, and the files that go with them.

    Args:
        name: of the benchmark.
        pictures: in the order they are drawn.
        sources: path of each prompt file read, to its SHA-256.
        files: text files to write into the run folder beside the pictures: relative path to content.
    """

    name: str
    pictures: list[Picture]
    sources: dict[str, str]
    files: dict[str, str] = field(default_factory=dict)


class BenchmarkError(ValueError):
    """Something a person must put right: a missing or altered file, an unreadable or missing image."""


def prompt_file(folder: Path, name: str, published: str, git_blob: str | None = None) -> tuple[str, str]:
    """Text of a benchmark's prompt file and its SHA-256.

    Args:
        folder: the user's folder of prompt files.
        name: of the file in it.
        published: where to get it, for the message.
        git_blob: the expected `git hash-object` of the file; None: not checked.

    Raises:
        BenchmarkError: the file is missing, or is another one than the benchmark's.
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
        BenchmarkError: it is missing or cannot be read.
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
        BenchmarkError: some are missing and that is not allowed, or all are.
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
