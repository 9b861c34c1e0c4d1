"""Finds the bytes of a collection in files, tars and the cells of tables, without unpacking anything."""

from __future__ import annotations

import csv
import errno
import glob
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.images import Unusable

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2")
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)  # other errors end the run
UTF8 = {"encoding": "utf-8-sig", "errors": "surrogateescape"}  # other bytes are refused where the text is used


class Place(NamedTuple):
    """A file, or a part of a file."""

    file: str
    offset: int = 0
    size: int = -1  # bytes; -1: to the end of the file

    def read(self) -> bytes:
        """The bytes at this place.

        Raises:
            Unusable: there is no such file.
        """
        try:
            with open(self.file, "rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as error:
            if error.errno not in NOT_THERE:
                raise
            raise Unusable("no image", f"{os.path.basename(self.file)}: {error.strerror}") from error
        except ValueError as error:  # the path holds a zero byte
            raise Unusable("no image", str(error)) from error


class Cell(NamedTuple):
    """An image in a parquet table: bytes, or a struct of `bytes` and `path` as Hugging Face's datasets write it."""

    file: str
    column: str
    row: int

    def read(self) -> bytes:
        """The bytes of the image.

        Raises:
            Unusable: the cell is empty.
        """
        starts = _row_groups(self.file)
        group = next(i for i, start in enumerate(starts[1:]) if self.row < start)
        value = _cells(self.file, self.column, group)[self.row - starts[group]]
        value = value.get("bytes") if isinstance(value, dict) else value
        if value is None:
            raise Unusable("no image")
        return value


def files(folder: Path) -> Iterator[tuple[str, Place]]:
    """Every file below a folder, with its path in the folder, sorted by name; hidden files are left out."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from ((f"{entry.name}/{name}", place) for name, place in files(Path(entry.path)))
        else:
            yield entry.name, Place(entry.path)


def members(tar: Path, within: Place | None = None) -> Iterator[tuple[str, Place | None]]:
    """Every file in a tar, without hidden ones. If the file is truncated or not a tar, the last place is None.

    Args:
        tar: an uncompressed tar.
        within: the part of the tar that is itself a tar, to read only that one; none: the whole tar.
    """
    start, end = (within.offset, within.offset + within.size) if within else (0, tar.stat().st_size)
    with tar.open("rb") as file:
        file.seek(start)
        reached = start
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    if member.offset_data + member.size > end:
                        break
                    reached = archive.offset
                    if member.isfile() and not os.path.basename(member.name).startswith("."):
                        yield member.name.removeprefix("./"), Place(str(tar), member.offset_data, member.size)
        except tarfile.ReadError:
            pass
        file.seek(reached)  # a tar ends in blocks of zeros; tarfile accepts a tar without them
        if reached + tarfile.BLOCKSIZE > end or any(file.read(tarfile.BLOCKSIZE)):
            yield "(breaks off)", None


def tars(path: str) -> list[Path]:
    """The tars that a path means: one, those in a folder, or those of a pattern like `cc12m/000*.tar`.

    Raises:
        FileNotFoundError: no file has that name.
    """
    if Path(path).is_dir():
        return sorted(Path(path).glob("*.tar"))
    found = [Path(path)] if Path(path).is_file() else sorted(map(Path, glob.glob(path)))
    if not found:
        raise FileNotFoundError(f"{path} is neither a folder nor a file, and matches no file")
    return found


def samples(named: Iterable[tuple[str, Place | None]]) -> Iterator[tuple[str, dict[str, Place | None]]]:
    """Samples of neighbouring files with one name, by kind: image, txt or json; `broken` is the end of a broken tar.

    As in WebDataset, the name ends at its first dot. A second file of one kind, such as a second image, begins another
    sample. A JSON alone is not a sample: img2dataset writes its counts to such files.
    """
    key, parts = "", {}
    for name, place in named:
        folder, _, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        kind = "broken" if place is None else "image" if suffix.lower() in IMAGES else suffix.lower()
        if kind not in ("image", "txt", "json", "broken"):
            continue
        this = f"{folder}/{stem}" if folder else stem
        if this != key or kind in parts:
            if parts.keys() - {"json"}:
                yield key, parts
            parts = {}
        key, parts[kind] = this, place
    if parts.keys() - {"json"}:
        yield key, parts


def rows(path: Path, image_column: str) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """Every row of a table, or of a folder's tables sorted by name, with its file; a broken line is None.

    Raises:
        ValueError: there is no table, or a table cannot be read.
    """
    tables = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS) if path.is_dir() else [path]
    if not tables or tables[0].suffix.lower() not in READERS:
        raise ValueError(f"{path} is not a table and does not hold a table ({', '.join(READERS)})")
    for table in tables:
        yield from ((table, row) for row in READERS[table.suffix.lower()](table, image_column))


def _csv(path: Path, _: str) -> Iterator[dict[str, Any]]:
    with path.open(newline="", **UTF8) as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            for row in reader:
                row.pop(None, None)  # cells beyond the header
                yield row
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}, cannot be read: {error}; is a quote missing?") from error


def _jsonl(path: Path, _: str) -> Iterator[dict[str, Any] | None]:
    with path.open(**UTF8) as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield row if isinstance(row, dict) else None


def _parquet(path: Path, image_column: str) -> Iterator[dict[str, Any]]:
    """The rows of a parquet table; images that are not paths are left in their cells, to be read later."""
    table = parquet_file(str(path))
    types = {field.name: str(field.type) for field in table.schema_arrow}
    in_cells = "binary" in types.get(image_column, "")
    names = [name for name in types if name != image_column or not in_cells]
    count = 0
    for batch in table.iter_batches(columns=names):
        for row in batch.to_pylist():
            yield row | ({image_column: Cell(str(path), image_column, count)} if in_cells else {})
            count += 1


READERS: dict[str, Callable[[Path, str], Iterator[dict[str, Any] | None]]] = {
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}


@lru_cache(maxsize=8)
def parquet_file(path: str) -> Any:
    """An open parquet file.

    Raises:
        ValueError: the file is not parquet, or pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowInvalid, parquet  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise ValueError(f"{path}: reading parquet needs pyarrow; run: pip install 'lidit[parquet]'") from error
    try:
        return parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file: {error}") from error


@lru_cache(maxsize=8)
def _row_groups(path: str) -> list[int]:
    """The first row of each row group, and last the number of rows."""
    about = parquet_file(path).metadata
    return [0, *accumulate(about.row_group(i).num_rows for i in range(about.num_row_groups))]


@lru_cache(maxsize=1)
def _cells(path: str, column: str, group: int) -> list[Any]:
    """One column of one row group. A group is read as a whole, so reading cells in their order is fastest."""
    return parquet_file(path).read_row_group(group, columns=[column])[column].to_pylist()
