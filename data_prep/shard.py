"""Writes WebDataset tars, the only format in which training reads images and captions.

A folder holds `00000.tar`, `00001.tar`, ..., an index beside each (`lidit/data/index.py` documents both) and
`shards.json`, which says how the folder was made. The same arguments give the same bytes.

    lidit prep shard --out shards/train --count 20000 --sizes '[64x64, 96x64]'
    lidit prep shard --out shards/cc12m --source img2dataset --path cc12m --sizes '[256x256, 320x192, 192x320]'

Pictures of a collection are scaled and cropped to the size of nearest aspect and stored as JPEG of quality 95, or as
they are if they already have that size (`data_prep/images.py` says more, also about odd files). Shard i holds what is
usable of the i-th `shard_size` records, so any process can write any shard. An unusable record is never replaced: it is
named in `skipped.jsonl` (`{"key", "reason", "detail"}`; `00000.skipped.jsonl` and so on are its parts), and counted at
the end. A shard without usable records is written but not listed in `shards.json`.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from data_prep import sources
from data_prep.images import Picture, Unusable, fit
from data_prep.places import Cell
from data_prep.processes import begin
from data_prep.records import Record, digest, kept_keys
from lidit.data.index import MANIFEST, index_path, read_index, scan
from lidit.disk.whole import replacing, write_text
from lidit.pictures import parse_size

SOURCES = {"scenes": sources.scenes}
SCENES = 20_000  # scenes to draw if no count is given
SKIPPED = "skipped.jsonl"
Sizes = Sequence[tuple[int, int]]
Work = list[Callable[[], Iterator[Record]]]  # for each shard, what gives its records when it is written


def shard(
    out: str,
    source: Literal["scenes", "imagenet", "img2dataset", "table"] = "scenes",
    count: int | None = None,
    seed: int = 0,
    sizes: tuple[str, ...] = ("64x64",),
    shard_size: int = 1000,
    held: bool = False,
    workers: int = 2,
    path: str | None = None,
    columns: sources.Columns = sources.Columns(),
    class_names: str | None = None,
    keep: str | None = None,
    shuffle: bool = True,
) -> None:
    """Write a set of shards. A second run with the same arguments writes only what is missing.

    Args:
        out: folder to write, new or begun with the same arguments.
        source: where the samples come from: drawn scenes, class folders or tars, img2dataset's output, or a table of
            captions.
        count: number of scenes, or largest number of a collection's records. None: 20,000 scenes, or the whole
            collection.
        seed: decides the scenes, or how records are shuffled.
        sizes: image sizes WIDTHxHEIGHT in pixels. Scenes take them in turn; a picture takes the size of nearest aspect,
            and of several such sizes the largest it covers. A picture that would have to be enlarged is skipped.
        shard_size: number of samples in a tar, or of a collection's records that go into a tar.
        held: draw only scenes with looks that training never shows.
        workers: number of processes that write.
        path: the collection: its folder, tar, pattern of tars, or table.
        columns: names of the columns of a table, or of the fields of img2dataset's JSON.
        class_names: for imagenet, a file with lines `n01440764 tench, Tinca tinca`; none: WordNet's names.
        keep: kept.jsonl of `lidit prep filter`, with the records to write; none: every record.
        shuffle: spread the records over the shards by the seed. False leaves them in the collection's order, in which
            big tars, slow disks and images inside parquet are read fastest, but ImageNet is sorted by class.

    Raises:
        FileNotFoundError: the collection is missing.
        ValueError: the folder holds other files, an argument is out of range or does not belong to the source, the
            collection is of another kind, or none of its records can be used.
    """
    numbers = {"count": count, "shard_size": shard_size, "workers": workers, "sizes": len(sizes)}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    pixels = [parse_size(size) for size in sizes]
    made = {"source": source, "count": count, "seed": seed, "sizes": list(sizes), "shard_size": shard_size}
    if source == "scenes":
        _refuse(source, path=path, class_names=class_names, keep=keep)
        made |= {"count": count or SCENES, "held": held}
        work = _drawn(made["count"], seed, pixels, shard_size, held)
    else:
        _refuse(source, held=held)
        records = _collected(source, path, columns, class_names, keep, seed if shuffle else None)[:count]
        made |= {"shuffle": shuffle, "columns": asdict(columns), "records": len(records), "digest": digest(records)}
        work = [partial(iter, records[i : i + shard_size]) for i in range(0, len(records), shard_size)]
    folder, tars = Path(out), [f"{i:05d}.tar" for i in range(len(work))]
    begin(folder, MANIFEST, made, {"tars": tars}, "write to another folder or delete this one")
    _write_missing(folder, tars, work, pixels, workers)
    if source != "scenes":
        _report(folder, tars)


def write_tar(path: Path, records: Iterator[Record], sizes: Sizes = ()) -> None:
    """Write one shard and its index, each under a temporary name first. The tar comes last: if it exists, it is whole.

    Args:
        path: path of the tar.
        records: the samples, each with pixels or with the place of an image file.
        sizes: sizes (width, height) to choose from for image files.
    """
    skipped = []
    with replacing(path) as unfinished:
        with tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as archive:
            for record in records:
                try:
                    caption, dense = record.texts()
                    picture = _picture(record, sizes)
                except Unusable as why:
                    skipped.append({"key": record.key, "reason": why.reason, "detail": why.detail})
                    continue
                text = {"caption": caption, "dense": dense, "width": picture.width, "height": picture.height}
                _add(archive, f"{record.key}.{picture.kind}", picture.data)
                _add(archive, f"{record.key}.json", json.dumps(text, ensure_ascii=False).encode())
        _write_lines(path.with_suffix(f".{SKIPPED}"), skipped)
        with replacing(index_path(path)) as index, index.open("wb") as file:
            np.savez(file, **scan(unfinished), tar_bytes=unfinished.stat().st_size)


def _refuse(source: str, **options: object) -> None:
    for name, value in options.items():
        if value:
            raise ValueError(f"{name} is {value!r}, which does not belong to source {source}; leave it out")


def _drawn(count: int, seed: int, pixels: Sizes, shard_size: int, held: bool) -> Work:
    """The scenes of each shard; a size that cannot be drawn is refused before any shard is written."""
    for width, height in pixels:
        next(SOURCES["scenes"](1, seed, width, height, held))
    return [
        partial(_draw, first, min(count, first + shard_size), seed, pixels, held)
        for first in range(0, count, shard_size)
    ]


def _draw(start: int, stop: int, seed: int, pixels: Sizes, held: bool) -> Iterator[Record]:
    for i in range(start, stop):
        width, height = pixels[i % len(pixels)]
        yield from SOURCES["scenes"](1, seed, width, height, held, start=i)


def _collected(
    source: sources.Collection,
    path: str | None,
    columns: sources.Columns,
    class_names: str | None,
    keep: str | None,
    seed: int | None,
) -> list[Record]:
    """The records of a collection that are to be written, in order."""
    if path is None:
        raise ValueError(f"source {source} needs a path")
    records = sources.find(source, path, columns, class_names)
    if keep is not None:
        kept = kept_keys(Path(keep), digest(records))
        records = [record for record in records if record.key in kept]
    if seed is None:
        return records
    if any(isinstance(record.image, Cell) for record in records):
        raise ValueError(f"{path} holds images inside parquet, which are read in their order; set shuffle to false")
    return [records[i] for i in np.random.default_rng(seed).permutation(len(records))]


def _write_missing(folder: Path, tars: list[str], work: Work, sizes: Sizes, workers: int) -> None:
    missing = [i for i, name in enumerate(tars) if not finished(folder / name)]
    print(f"{folder}: {len(tars) - len(missing)} of {len(tars)} shards are there already", flush=True)
    jobs = [(folder / tars[i], work[i], sizes) for i in missing]
    for done, (path, seconds) in enumerate(_run(jobs, workers), start=1):
        left = seconds / done * (len(jobs) - done)
        print(f"{path}: shard {done} of {len(jobs)}, about {left:.0f} s left", flush=True)


def _write(path: Path, records: Callable[[], Iterator[Record]], sizes: Sizes) -> Path:
    write_tar(path, records(), sizes)
    return path


def _run(jobs: list[tuple], workers: int) -> Iterator[tuple[Path, float]]:
    """Do the jobs, in this process if one worker is enough; yields each path with the seconds since the start."""
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


def finished(path: Path) -> bool:
    """Whether a shard exists and is as long as its index says; otherwise it is written again."""
    if not (path.is_file() and index_path(path).is_file()):
        return False
    try:
        read_index(path)
    except ValueError:
        return False
    return True


def _report(folder: Path, tars: list[str]) -> None:
    """List the shards that hold samples, and print what was skipped.

    Raises:
        ValueError: no shard holds a sample.
    """
    counts = {name: len(read_index(folder / name)["key"]) for name in tars}
    lists = [(folder / name).with_suffix(f".{SKIPPED}") for name in tars]
    skipped = [json.loads(line) for file in lists if file.is_file() for line in file.read_text().splitlines()]
    _write_lines(folder / SKIPPED, skipped)
    manifest = json.loads((folder / MANIFEST).read_text())
    if manifest["tars"] != (listed := [name for name, count in counts.items() if count]):
        write_text(folder / MANIFEST, json.dumps(manifest | {"tars": listed}, indent=1))
    print(f"{folder}: {sum(counts.values())} samples; {len(skipped)} records were skipped", flush=True)
    examples = {line["reason"]: line for line in reversed(skipped)}
    for reason, number in Counter(line["reason"] for line in skipped).most_common():
        print(f"  {number} {reason}, for example {examples[reason]['key']}: {examples[reason]['detail'] or reason}")
    if skipped:
        print(f"  {folder / SKIPPED} names them all")
    if not listed:
        raise ValueError(f"no record can be used; {folder / SKIPPED} says why")


def _write_lines(path: Path, lines: list[dict[str, str]]) -> None:
    """Write JSON lines, or remove the file if there are none. A file that holds these lines is not touched."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if not lines:
        path.unlink(missing_ok=True)
    elif not path.is_file() or path.read_text() != text:
        write_text(path, text)


def _picture(record: Record, sizes: Sizes) -> Picture:
    if not isinstance(record.image, np.ndarray):
        return fit(record.data(), sizes)
    buffer = io.BytesIO()
    Image.fromarray(record.image).save(buffer, "PNG")
    height, width = record.image.shape[:2]
    return Picture(buffer.getvalue(), "png", width, height)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # time, owner and group are 0, so the same data gives the same bytes
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    try:
        auto_cli(shard, as_positional=False)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
