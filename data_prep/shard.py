"""Writes WebDataset tars, the one form in which training reads images and captions.

A folder holds `00000.tar`, `00001.tar`, ..., an index beside each (`lidit/data/index.py` documents both) and
`shards.json`, which says how the folder was made. The same arguments give the same bytes.

    lidit prep shard --out shards/train --count 20000 --sizes '[64x64, 96x64]'
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from data_prep import sources
from lidit.data.index import MANIFEST, differences, index_path, read_index, scan

SOURCES = {"scenes": sources.scenes}


def shard(
    out: str,
    source: Literal["scenes"] = "scenes",
    count: int = 20_000,
    seed: int = 0,
    sizes: tuple[str, ...] = ("64x64",),
    shard_size: int = 1000,
    held: bool = False,
    workers: int = 2,
) -> None:
    """Write a set of shards; run again with the same arguments, it writes only what is missing.

    Args:
        out: folder to write, new or begun with the same arguments.
        source: where the samples come from.
        count: samples.
        seed: of the source.
        sizes: image sizes WIDTHxHEIGHT in pixels; sample i takes the i-th, round and round.
        shard_size: samples in a tar.
        held: only scenes with looks that training never shows.
        workers: processes that write.

    Raises:
        ValueError: the folder holds something else, or an argument is out of range.
    """
    for name, value in (("count", count), ("shard_size", shard_size), ("workers", workers), ("sizes", len(sizes))):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    pixels = [parse_size(size) for size in sizes]
    for width, height in pixels:  # a size the source cannot draw is refused before anything is written
        next(SOURCES[source](1, seed, width, height, held))
    folder = Path(out)
    tars = [f"{i:05d}.tar" for i in range(-(-count // shard_size))]
    made = {
        "source": source,
        "count": count,
        "seed": seed,
        "sizes": list(sizes),
        "shard_size": shard_size,
        "held": held,
    }
    claim(folder, MANIFEST, made, {"tars": tars}, "write to another folder or delete this one")
    missing = [i for i, name in enumerate(tars) if not _finished(folder / name)]
    print(f"{folder}: {len(tars) - len(missing)} of {len(tars)} shards are there already", flush=True)
    jobs = [
        (folder / tars[i], source, i * shard_size, min(count, (i + 1) * shard_size), seed, pixels, held)
        for i in missing
    ]
    for done, (path, seconds) in enumerate(_run(jobs, workers), start=1):
        left = seconds / done * (len(jobs) - done)
        print(f"{path}: shard {done} of {len(jobs)}, about {left:.0f} s left", flush=True)


def parse_size(size: str) -> tuple[int, int]:
    """Width and height of `96x64`.

    Raises:
        ValueError: it is not of that form.
    """
    width, _, height = size.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"size {size!r} is not of the form WIDTHxHEIGHT, for example 96x64")
    return int(width), int(height)


def claim(folder: Path, name: str, made: dict, more: dict, fix: str) -> None:
    """Start or continue a folder: its file `name` says how it was made, and whatever `more` follows from that.

    Raises:
        ValueError: the folder was made otherwise or holds files that are not ours.
    """
    manifest, made = folder / name, json.loads(json.dumps(made))
    if manifest.is_file():
        if differ := differences(json.loads(manifest.read_text()), made):
            raise ValueError(f"{folder} holds other data: {'; '.join(differ)}; {fix}")
        return
    partial = folder / f".{name}.partial"
    if folder.is_dir() and any(file != partial for file in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and was not begun by this command; {fix}")
    folder.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(made | more, indent=1))
    os.replace(partial, manifest)


def write_tar(path: Path, records: Iterator[sources.Record]) -> None:
    """Write one shard and its index, each under a temporary name first, the tar last: where it is, it is whole."""
    partial, partial_index = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.partial.npz")
    try:
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as archive:
            for record in records:
                height, width = record.image.shape[:2]
                text = {"caption": record.caption, "dense": record.dense, "width": width, "height": height}
                _add(archive, f"{record.key}.png", _png(record.image))
                _add(archive, f"{record.key}.json", json.dumps(text, ensure_ascii=False).encode())
        np.savez(partial_index, **scan(partial), tar_bytes=partial.stat().st_size)
        os.replace(partial_index, index_path(path))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
        partial_index.unlink(missing_ok=True)


def _write(
    path: Path, source: str, start: int, stop: int, seed: int, pixels: list[tuple[int, int]], held: bool
) -> Path:
    write_tar(path, _records(source, start, stop, seed, pixels, held))
    return path


def _records(
    source: str, start: int, stop: int, seed: int, pixels: list[tuple[int, int]], held: bool
) -> Iterator[sources.Record]:
    for i in range(start, stop):
        width, height = pixels[i % len(pixels)]
        yield from SOURCES[source](1, seed, width, height, held, start=i)


def _run(jobs: list[tuple], workers: int) -> Iterator[tuple[Path, float]]:
    """Do the jobs, in this process if there is little to share; yields each path with the seconds since the start."""
    start = time.monotonic()
    if min(workers, len(jobs)) <= 1:
        for job in jobs:
            yield _write(*job), time.monotonic() - start
        return
    # spawn: a forked child of a process that runs torch threads can hang
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(_write, *job) for job in jobs]):
                yield future.result(), time.monotonic() - start
        finally:
            pool.shutdown(cancel_futures=True)


def _finished(path: Path) -> bool:
    """Whether a shard is there and as long as its index says; one that is not is written again."""
    if not (path.is_file() and index_path(path).is_file()):
        return False
    try:
        read_index(path)
    except ValueError:
        return False
    return True


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # its time, owner and group are 0: the same data gives the same bytes
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    from jsonargparse import auto_cli

    try:
        auto_cli(shard, as_positional=False)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
