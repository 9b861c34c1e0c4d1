"""Bytes of shards, local or remote, from a few open files."""

from __future__ import annotations

import os
import time
from pathlib import Path

from lidit.data.patience import patiently
from lidit.data.remote import Copies, Url
from lidit.data.tars import FIX

MAX_OPEN = 128  # shards held open by one process
AGAIN = 600.0  # seconds until a shard that could not be read is tried again


class Unreadable(ValueError):
    """A sample cannot be read. The message names it, or its shard where that is what cannot be read."""


class Reader:
    """Reads from the shards of a list by offset.

    Args:
        paths: of the shards.
        sizes: bytes of each shard; used for remote ones alone.
        copies: of the remote shards.
    """

    def __init__(self, paths: list[Path | Url], sizes: list[int], copies: Copies | None) -> None:
        self._paths, self._sizes, self._copies = paths, sizes, copies
        self._files: dict[int, int] = {}
        self._given_up: dict[int, tuple[float, str]] = {}  # until when, and why

    def read(self, shard: int, offset: int, size: int, whole: bool = True) -> bytes:
        """Some bytes of a shard.

        Args:
            shard: its number in the list.
            offset: where the bytes begin.
            size: how many they are; fewer come back from a shard that breaks off.
            whole: of a remote shard that is not open, fetch all rather than these bytes alone.

        Raises:
            Unreadable: also trying again did not help; the shard is given up for a while.
        """
        until, reason = self._given_up.get(shard, (0.0, ""))
        if time.monotonic() < until:
            raise Unreadable(reason)
        try:
            return patiently(lambda: self._attempt(shard, offset, size, whole), str(self._paths[shard]))
        except OSError as error:
            reason = f"shard {self._paths[shard]} cannot be read ({error}), its samples are skipped; {FIX}"
            self._given_up[shard] = (time.monotonic() + AGAIN, reason)
            raise Unreadable(reason) from error

    def _attempt(self, shard: int, offset: int, size: int, whole: bool) -> bytes:
        path = self._paths[shard]
        if isinstance(path, Url) and not whole and shard not in self._files:
            return self._copies.part(path, offset, size)
        try:
            return os.pread(self._file(shard), size, offset)
        except OSError:
            if (file := self._files.pop(shard, None)) is not None:
                os.close(file)
            raise

    def _file(self, shard: int) -> int:
        """A shard's open file; the one opened first is closed when there are too many."""
        if shard not in self._files:
            self._close_removed()
            if len(self._files) >= MAX_OPEN:
                os.close(self._files.pop(next(iter(self._files))))
            path = self._paths[shard]
            remote = isinstance(path, Url)
            self._files[shard] = self._copies.open(path, self._sizes[shard]) if remote else os.open(path, os.O_RDONLY)
        return self._files[shard]

    def _close_removed(self) -> None:
        """Close the copies that were removed to make room: open, they would go on taking it."""
        if self._copies is not None:
            for shard in [shard for shard, file in self._files.items() if not os.fstat(file).st_nlink]:
                os.close(self._files.pop(shard))

    def __getstate__(self) -> dict:
        """Open files stay behind when a worker process gets a copy."""
        return self.__dict__ | {"_files": {}}

    def __del__(self) -> None:
        """Close the shards."""
        for file in self.__dict__.get("_files", {}).values():
            os.close(file)
