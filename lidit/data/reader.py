"""Reads bytes of local and remote shards through a limited number of open files."""

from __future__ import annotations

import os
import time
from pathlib import Path

from lidit.data.patience import patiently
from lidit.data.remote import Copies, Url
from lidit.data.tars import FIX

MAX_OPEN = 128  # shards that one process holds open
AGAIN = 600.0  # seconds until a shard that could not be read is tried again


class Unreadable(ValueError):
    """A sample cannot be read. The message names the sample, or its shard where the whole shard cannot be read."""


class Reader:
    """Reads bytes at an offset of one of several shards.

    Args:
        paths: the shards, each a local path or a URL.
        sizes: bytes of each shard; used for remote shards only.
        copies: the local copies of the remote shards.
    """

    def __init__(self, paths: list[Path | Url], sizes: list[int], copies: Copies | None) -> None:
        self._paths, self._sizes, self._copies = paths, sizes, copies
        self._files: dict[int, int] = {}
        self._given_up: dict[int, tuple[float, str]] = {}  # by shard: until when it is not tried again, and why

    def read(self, shard: int, offset: int, size: int, whole: bool = True) -> bytes:
        """Some bytes of a shard.

        Args:
            shard: the shard's number in the list.
            offset: where the bytes begin.
            size: how many bytes to read; a truncated shard gives fewer.
            whole: fetch a remote shard whole if it is not open; False fetches these bytes alone.

        Raises:
            Unreadable: all attempts failed; this shard is not tried again for a while.
        """
        until, reason = self._given_up.get(shard, (0.0, ""))
        if time.monotonic() < until:
            raise Unreadable(reason)
        try:
            return patiently(lambda: self._attempt(shard, offset, size, whole), str(self._paths[shard]))
        except OSError as error:
            reason = f"shard {self._paths[shard]} cannot be read ({error}) and its samples are skipped; {FIX}"
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
        """A shard's open file; if too many are open, the one opened first is closed."""
        if shard not in self._files:
            self._close_removed()
            if len(self._files) >= MAX_OPEN:
                os.close(self._files.pop(next(iter(self._files))))
            path = self._paths[shard]
            remote = isinstance(path, Url)
            self._files[shard] = self._copies.open(path, self._sizes[shard]) if remote else os.open(path, os.O_RDONLY)
        return self._files[shard]

    def _close_removed(self) -> None:
        """Close the copies that were removed to make room: an open file still takes its room on the disk."""
        if self._copies is not None:
            for shard in [shard for shard, file in self._files.items() if not os.fstat(file).st_nlink]:
                os.close(self._files.pop(shard))

    def __getstate__(self) -> dict:
        """A worker process gets a copy without the open files, and opens them itself."""
        return self.__dict__ | {"_files": {}}

    def __del__(self) -> None:
        """Close the shards that are open."""
        for file in self.__dict__.get("_files", {}).values():
            os.close(file)
