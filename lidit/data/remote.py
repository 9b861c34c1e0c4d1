"""Shards on http(s), S3 and Google Cloud Storage: copied whole to a local folder of limited size, or read in part.

fsspec reads them: `http://` and `https://` work as installed, `s3://` needs the package s3fs and `gs://` gcsfs. Their
settings (endpoints, credentials) are fsspec's own. We assume that the file at a URL never changes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from lidit.data.patience import patiently
from lidit.data.tars import INDEX, parse_index, scan

PROTOCOLS = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}  # each with the package that reads it
THREADS = 16  # indices fetched at once
COPY = re.compile(r"\.?[0-9a-f]{16}-.+\.tar(\.partial)?")  # names of our files, in a folder that may hold others


class Url(str):
    """The URL of a remote shard."""

    @property
    def name(self) -> str:
        """The last part of the URL, as `Path.name` is of a path."""
        return self.rpartition("/")[2]


class Copies:
    """Local copies of remote shards in a folder that any number of processes share.

    One process fetches a shard while the others wait for it. The file has a temporary name until it is whole. When the
    folder grows beyond the limit, the shards that were opened longest ago are removed; while several shards are being
    fetched, the folder may exceed the limit. A process that reads a shard can go on after the shard is removed.

    Args:
        folder: folder on a disk of this machine; other files in it are left alone.
        limit: largest size of all copies together, in bytes.

    Raises:
        ValueError: the limit is not above 0.
    """

    def __init__(self, folder: str, limit: int) -> None:
        if limit <= 0:
            raise ValueError(f"the limit of {folder} is {limit} bytes; set shard_cache_gb above 0")
        self.folder, self.limit = Path(folder), limit
        self.folder.mkdir(parents=True, exist_ok=True)

    def open(self, url: Url, size: int) -> int:
        """A file descriptor of the local copy. If there is no copy, fetch the shard, in one attempt.

        Args:
            url: the shard.
            size: the shard's size in bytes, as its index says.

        Raises:
            OSError: the shard cannot be fetched, or has another size.
            ValueError: the limit or the disk has no room for the shard.
        """
        path = self._path(url)
        if (file := _opened(path, size)) is not None:
            return file
        with self._locked(_lock_of(path)):
            if (file := _opened(path, size)) is not None:  # another process was faster
                return file
            partial = self._fetch(url, path, size)
            if (found := partial.stat().st_size) != size:
                partial.unlink()
                raise OSError(f"{url} has {found} bytes and its index says {size}")
            file = os.open(partial, os.O_RDONLY)
            partial.replace(path)
            self._make_room(0)  # others have fetched meanwhile; this shard is locked, so it is not removed
            return file

    def part(self, url: Url, offset: int, size: int) -> bytes:
        """Some bytes of a shard, in one attempt, without copying the shard."""
        system, path = file_system(url)
        data = system.cat_file(path, start=offset, end=offset + size)
        return data if len(data) <= size else data[offset : offset + size]  # a server without ranges sends all

    def columns(self, url: Url) -> dict[str, np.ndarray]:
        """A shard's columns and `tar_bytes`, from the index beside it or, without one, from the whole shard.

        Raises:
            OSError: the file cannot be fetched.
            ValueError: the file is not an index, or not a shard.
        """
        index = Url(url.removesuffix(".tar") + INDEX)
        try:
            return parse_index(io.BytesIO(read(index)), index)
        except FileNotFoundError:
            path = self._path(url)
            with self._locked(_lock_of(path)):
                if not path.is_file():
                    patiently(lambda: self._fetch(url, path, 0), url).replace(path)
                return scan(path) | {"tar_bytes": np.array(path.stat().st_size)}

    def all_columns(self, urls: list[Url]) -> list[dict[str, np.ndarray]]:
        """The columns of many shards, several fetched at once."""
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(self.columns, urls))

    def merged(self, names: list[str], build: Callable[[], dict[str, np.ndarray]]) -> Path:
        """A folder of arrays that all processes of this machine map, and that the next start finds again.

        Args:
            names: everything that the arrays depend on; other names, another folder.
            build: makes the arrays if the folder is missing.
        """
        key = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
        folder, partial = self.folder / f"index-{key}", self.folder / f".index-{key}.partial"
        with self._locked("index"):
            if not folder.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                for name, values in build().items():
                    np.save(partial / f"{name}.npy", values)
                partial.rename(folder)
        return folder

    def _fetch(self, url: Url, path: Path, size: int) -> Path:
        """Copy a shard to a file with a temporary name."""
        self._make_room(size)
        partial = path.with_name(f".{path.name}.partial")
        system, remote = file_system(url)
        try:
            system.get_file(remote, str(partial))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                partial.unlink(missing_ok=True)
                raise ValueError(
                    f"the disk of {self.folder} is full; lower shard_cache_gb or free some room"
                ) from error
            raise
        return partial

    def _make_room(self, size: int) -> None:
        """Remove the shards opened longest ago until `size` more bytes fit."""
        if size > self.limit:
            raise ValueError(f"a shard of {size / 1e9:.3f} GB does not fit into {self.folder}; raise shard_cache_gb")
        with self._locked("room"):
            found = list(self._copied())
            excess = sum(stat.st_size for stat, _ in found) + size - self.limit
            for stat, path in sorted(found, key=lambda pair: pair[0].st_mtime_ns):
                if excess <= 0:
                    return
                copy = path.with_name(path.name.removeprefix(".").removesuffix(".partial"))
                with self._locked(_lock_of(copy), wait=False) as free:  # a shard that is being fetched is not free
                    if free:
                        path.unlink(missing_ok=True)
                        excess -= stat.st_size

    def _copied(self) -> Iterator[tuple[os.stat_result, Path]]:
        """The files that hold copies, without those that other processes rename or remove meanwhile."""
        for path in self.folder.iterdir():
            if COPY.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    yield path.stat(), path

    def _path(self, url: Url) -> Path:
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{url.name}"

    @contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold a lock, which is freed if its process dies. Without `wait`, yields whether the lock was free."""
        with (self.folder / f".lock-{name}").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True


def _lock_of(path: Path) -> str:
    """The lock of a copy: one of 256, so that there is not a lock file for every shard."""
    return hashlib.sha256(path.name.encode()).hexdigest()[:2]


def _opened(path: Path, size: int) -> int | None:
    """A whole copy, opened and marked as used now; None if there is no whole copy."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if os.fstat(file).st_size == size:
        os.utime(file)
        return file
    os.close(file)  # the machine broke down before the whole copy was on the disk
    return None


def map_columns(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of `Copies.merged`, mapped: only what is read takes memory, once for all processes."""
    return {path.stem: np.load(path, mmap_mode="r").view(np.ndarray) for path in sorted(folder.glob("*.npy"))}


def is_remote(name: str) -> bool:
    """Whether a shard is named by a URL.

    Raises:
        ValueError: URLs of this kind cannot be read.
    """
    protocol, separator, _ = name.partition("://")
    if separator and protocol not in PROTOCOLS:
        raise ValueError(f"{name!r}: shards are read from {', '.join(f'{p}://' for p in PROTOCOLS)} and local paths")
    return bool(separator)


def remote_folder(url: str, manifest: str) -> list[Url]:
    """A remote folder's tars: those that its manifest lists, or without a manifest all that the server lists.

    Raises:
        FileNotFoundError: the folder shows no tars.
        OSError: the folder cannot be read.
    """
    base = url.rstrip("/")
    try:
        return [Url(f"{base}/{name}") for name in json.loads(read(Url(f"{base}/{manifest}")))["tars"]]
    except FileNotFoundError:
        system, path = file_system(base)
        names = patiently(lambda: system.glob(f"{path}/*.tar"), url)
    if not names:
        raise FileNotFoundError(
            f"{url} shows neither a {manifest} nor .tar shards; name them as {base}/{{00000..00009}}.tar"
        )
    return [Url(f"{base}/{name.rpartition('/')[2]}") for name in sorted(names)]


def read(url: Url) -> bytes:
    """The bytes of a small file.

    Raises:
        OSError: the file cannot be read.
    """
    system, path = file_system(url)
    return patiently(lambda: system.cat_file(path), url)


def file_system(url: str) -> tuple:
    """A file system of fsspec for a URL, which belongs to this process, and the path in it.

    Raises:
        ValueError: the package that reads such URLs is not installed.
    """
    from fsspec.core import url_to_fs

    protocol, options = url.partition("://")[0], {}
    try:
        if protocol in ("http", "https"):
            from aiohttp import ClientTimeout

            # aiohttp allows five minutes for the whole file, too short for large shards; we limit each silence instead
            options = {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}}
        return url_to_fs(url, **options)
    except ImportError as error:
        raise ValueError(f"{url}: {protocol}:// needs a package: pip install {PROTOCOLS[protocol]}") from error
