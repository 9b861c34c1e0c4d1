"""Where the bytes of a collection lie: files in folders and tars, rows and cells of tables. Nothing is unpacked."""

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
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)  # not a disk that fails: that ends the run
UTF8 = {"encoding": "utf-8-sig", "errors": "surrogateescape"}  # what is not UTF-8 is found where it is used


class Place(NamedTuple):
    """A file, or a part of one."""

    file: str
    offset: int = 0
    size: int = -1  # bytes; -1: to the end

    def read(self) -> bytes:
        """The bytes.

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
        except ValueError as error:  # a zero byte in the path
            raise Unusable("no image", str(error)) from error


class Cell(NamedTuple):
    """An image in a parquet table: bytes, or a struct of `bytes` and `path` as Hugging Face's datasets write it."""

    file: str
    column: str
    row: int

    def read(self) -> bytes:
        """The bytes.

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
    """Every file below a folder but hidden ones, by its path from there, in the order of the names."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from ((f"{entry.name}/{name}", place) for name, place in files(Path(entry.path)))
        else:
            yield entry.name, Place(entry.path)


def members(tar: Path, within: Place | None = None) -> Iterator[tuple[str, Place | None]]:
    """Every file in a tar but hidden ones; a tar that is not whole or none ends in one without a place.

    Args:
        tar: uncompressed.
        within: the part of it that is a tar itself and is meant.
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
        file.seek(reached)  # a tar ends in blocks of zeros; tarfile does not mind when they are missing
        if reached + tarfile.BLOCKSIZE > end or any(file.read(tarfile.BLOCKSIZE)):
            yield "(breaks off)", None


def tars(path: str) -> list[Path]:
    """The tars that a path means: one, those in a folder, or those of a pattern like `cc12m/000*.tar`.

    Raises:
        FileNotFoundError: there is nothing there.
    """
    if Path(path).is_dir():
        return sorted(Path(path).glob("*.tar"))
    found = [Path(path)] if Path(path).is_file() else sorted(map(Path, glob.glob(path)))
    if not found:
        raise FileNotFoundError(f"{path} is neither a folder nor a file, and no file is named like that")
    return found


def samples(named: Iterable[tuple[str, Place | None]]) -> Iterator[tuple[str, dict[str, Place | None]]]:
    """Neighbouring files of one name put together, by what they are: image, txt or json; `broken` for the end of a tar.

    As in WebDataset the name ends at its first dot. One that comes a second time, or with a second image, begins
    another sample. JSON alone is none: img2dataset counts in such files.
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
    """Every row of a table, or of a folder's tables in the order of their names, with its file; None: a broken line.

    Raises:
        ValueError: there is no table, or one cannot be read.
    """
    tables = sorted(file for file in path.iterdir() if file.suffix.lower() in READERS) if path.is_dir() else [path]
    if not tables or tables[0].suffix.lower() not in READERS:
        raise ValueError(f"{path} is not, and does not hold, a table: {', '.join(READERS)}")
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
    """Everything but the images; those stay in their cells unless they are paths."""
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
        ValueError: it is none, or pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowInvalid, parquet  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise ValueError(f"{path}: parquet is read by pyarrow; run: pip install 'lidit[parquet]'") from error
    try:
        return parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise ValueError(f"{path} is no parquet file: {error}") from error


@lru_cache(maxsize=8)
def _row_groups(path: str) -> list[int]:
    """The first row of each row group, and the number of rows."""
    about = parquet_file(path).metadata
    return [0, *accumulate(about.row_group(i).num_rows for i in range(about.num_row_groups))]


@lru_cache(maxsize=1)
def _cells(path: str, column: str, group: int) -> list[Any]:
    """One column of one row group; a group is read at once, so cells are best read in their order."""
    return parquet_file(path).read_row_group(group, columns=[column])[column].to_pylist()
