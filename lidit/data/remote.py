"""Shards on http(s), S3 and Google Cloud Storage: copied whole to a local folder of limited size, or read in part.

fsspec does the reading: `http://` and `https://` work as installed, `s3://` needs the package s3fs and `gs://` gcsfs,
and their settings (endpoints, credentials) are fsspec's own. What lies at a URL is taken never to change.
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

PROTOCOLS = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}  # and the package that reads it
THREADS = 16  # indices fetched at once
COPY = re.compile(r"\.?[0-9a-f]{16}-.+\.tar(\.partial)?")  # files of ours in a folder that may hold others


class Url(str):
    """Where a remote shard lies."""

    @property
    def name(self) -> str:
        """Its last part, as of a path."""
        return self.rpartition("/")[2]


class Copies:
    """Local copies of remote shards in a folder that any number of processes share.

    A shard is fetched by one process while the others wait for it, under a temporary name that becomes its own once it
    is whole. Where the folder grows beyond the limit, the shards that were opened longest ago go; for as long as
    several are being fetched, these may exceed it. A process that reads a shard that goes can read on.

    Args:
        folder: on a disk of this machine; files in it that are not ours are left alone.
        limit: bytes that the shards may take.

    Raises:
        ValueError: the limit is not above 0.
    """

    def __init__(self, folder: str, limit: int) -> None:
        if limit <= 0:
            raise ValueError(f"the limit of {folder} is {limit} bytes; shards need room")
        self.folder, self.limit = Path(folder), limit
        self.folder.mkdir(parents=True, exist_ok=True)

    def open(self, url: Url, size: int) -> int:
        """A file descriptor of the local copy, fetched if it is not there; one attempt.

        Args:
            url: the shard.
            size: its bytes, as its index says.

        Raises:
            OSError: it cannot be fetched, or is not of that size.
            ValueError: the limit or the disk has no room for it.
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
            self._make_room(0)  # others have fetched meanwhile; this one is locked, hence stays
            return file

    def part(self, url: Url, offset: int, size: int) -> bytes:
        """Some bytes of a shard that is not copied for them; one attempt."""
        system, path = file_system(url)
        data = system.cat_file(path, start=offset, end=offset + size)
        return data if len(data) <= size else data[offset : offset + size]  # a server that knows no ranges sends all

    def columns(self, url: Url) -> dict[str, np.ndarray]:
        """A shard's columns and `tar_bytes`, from the index beside it or else from the whole shard.

        Raises:
            OSError: it cannot be fetched.
            ValueError: it is no index, or no shard.
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
        """A folder of arrays that all processes of this machine map, and that the next start finds there.

        Args:
            names: what the arrays follow from; others, other arrays.
            build: makes them where they are not there yet.
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
        """Copy a shard to a temporary name."""
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
        """Remove the shards opened longest ago until so many bytes fit."""
        if size > self.limit:
            raise ValueError(f"a shard of {size / 1e9:.3f} GB does not fit into {self.folder}; raise shard_cache_gb")
        with self._locked("room"):
            found = list(self._copied())
            excess = sum(stat.st_size for stat, _ in found) + size - self.limit
            for stat, path in sorted(found, key=lambda pair: pair[0].st_mtime_ns):
                if excess <= 0:
                    return
                copy = path.with_name(path.name.removeprefix(".").removesuffix(".partial"))
                with self._locked(_lock_of(copy), wait=False) as free:  # one that is being fetched is not
                    if free:
                        path.unlink(missing_ok=True)
                        excess -= stat.st_size

    def _copied(self) -> Iterator[tuple[os.stat_result, Path]]:
        """The files that hold copies, but those that other processes rename or remove just now."""
        for path in self.folder.iterdir():
            if COPY.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    yield path.stat(), path

    def _path(self, url: Url) -> Path:
        return self.folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{url.name}"

    @contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold a lock, which also its holder's death frees; without `wait`, yields whether it was free."""
        with (self.folder / f".lock-{name}").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True


def _lock_of(path: Path) -> str:
    """The lock of a copy: one of 256, so that not every shard leaves a file behind."""
    return hashlib.sha256(path.name.encode()).hexdigest()[:2]


def _opened(path: Path, size: int) -> int | None:
    """A whole copy that is there, marked as used."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    if os.fstat(file).st_size == size:
        os.utime(file)
        return file
    os.close(file)  # the machine broke down before it was all on the disk
    return None


def map_columns(folder: Path) -> dict[str, np.ndarray]:
    """What `Copies.merged` keeps in a folder, mapped: only what is looked at takes memory, for all processes once."""
    return {path.stem: np.load(path, mmap_mode="r").view(np.ndarray) for path in sorted(folder.glob("*.npy"))}


def is_remote(name: str) -> bool:
    """Whether a shard is named by a URL.

    Raises:
        ValueError: a kind of URL that is not read.
    """
    protocol, separator, _ = name.partition("://")
    if separator and protocol not in PROTOCOLS:
        raise ValueError(f"{name!r}: shards are read from {', '.join(f'{p}://' for p in PROTOCOLS)} and local paths")
    return bool(separator)


def remote_folder(url: str, manifest: str) -> list[Url]:
    """A remote folder's tars: those its manifest lists, else all that the server lists.

    Raises:
        FileNotFoundError: there are none.
        OSError: it cannot be read.
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
    """A small file.

    Raises:
        OSError: it cannot be read.
    """
    system, path = file_system(url)
    return patiently(lambda: system.cat_file(path), url)


def file_system(url: str) -> tuple:
    """The file system that fsspec has for a URL, of this process's own, and the path in it.

    Raises:
        ValueError: the package that reads such URLs is not installed.
    """
    from fsspec.core import url_to_fs

    protocol, options = url.partition("://")[0], {}
    try:
        if protocol in ("http", "https"):
            from aiohttp import ClientTimeout

            # aiohttp's own limit is five minutes for the whole file, which large shards exceed; here silence is limited
            options = {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}}
        return url_to_fs(url, **options)
    except ImportError as error:
        raise ValueError(f"{url}: {protocol}:// needs a package: pip install {PROTOCOLS[protocol]}") from error
