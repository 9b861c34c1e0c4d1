"""The indices of many shards, joined column by column. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lidit.data.remote import Copies, Url
from lidit.data.tars import COLUMNS, index_path, read_index

PIECE = 100_000  # samples that are hashed at one time


def joined(paths: Sequence[Path | Url], copies: Copies | None, strict: bool) -> dict[str, np.ndarray]:
    """`COLUMNS` of all samples, and `samples` and `bytes` of each shard (a local shard has 0 bytes here).

    Args:
        paths: the shards.
        copies: fetches the indices of remote shards.
        strict: refuse a local tar that is missing or truncated.

    Raises:
        OSError: an index cannot be fetched.
        ValueError: an index or a shard cannot be read.
    """
    remote = [path for path in paths if isinstance(path, Url)]
    fetched = iter(copies.all_columns(remote)) if copies is not None and remote else iter([])
    tables = [next(fetched) if isinstance(path, Url) else read_index(path, strict) for path in paths]
    counts = {"samples": [len(t["key"]) for t in tables], "bytes": [int(t.get("tar_bytes", 0)) for t in tables]}
    columns = {column: np.concatenate([t.pop(column) for t in tables]) for column in COLUMNS}
    return columns | {name: np.array(values, np.int64) for name, values in counts.items()}


def digest(paths: Sequence[Path | Url], columns: dict[str, np.ndarray]) -> str:
    """A hash of the shards' names and of their samples' keys and sizes, the same in whatever folder they lie."""
    found = hashlib.sha256("\n".join(path.name for path in paths).encode())
    for column in COLUMNS:
        for piece in _pieces(columns[column], b"\n" if column == "key" else b""):
            found.update(piece)
    return found.hexdigest()[:16]


def _pieces(values: np.ndarray, separator: bytes) -> Iterator[bytes]:
    """The bytes of a column in pieces: ten million keys at one time would take a gigabyte."""
    for first in range(0, len(values), PIECE):
        piece = values[first : first + PIECE]
        yield separator.join(piece.tolist()) if separator else piece.astype("<i8").tobytes()
        if first + PIECE < len(values):
            yield separator


def stamps(paths: Sequence[Path | Url]) -> list[str]:
    """For each shard, a text that changes when a local shard does; we assume that a URL's file never changes."""
    return [str(path) if isinstance(path, Url) else f"{path.resolve()} {_stamp(path)}" for path in paths]


def _stamp(path: Path) -> str:
    stats = [file.stat() for file in (path, index_path(path)) if file.is_file()]
    return " ".join(f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats)
