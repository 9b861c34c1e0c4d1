"""The samples of many tar shards in one index, each read with one system call.

`lidit/data/tars.py` documents what a shard is. Imports no torch.
"""

from __future__ import annotations

import io
import json
import re
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from lidit.data.columns import digest, joined, stamps
from lidit.data.reader import Reader, Unreadable
from lidit.data.remote import Copies, Url, is_remote, map_columns, remote_folder
from lidit.data.tars import COLUMNS, FIX, index_path, read_index, scan

__all__ = ["COLUMNS", "MANIFEST", "ShardIndex", "differences", "expand", "index_path", "read_index", "scan"]

MANIFEST = "shards.json"  # data_prep.shard writes here how a folder was made, and which tars belong to it
UNDECODABLE = (  # what Pillow raises on bytes that are not an image, or only half of one
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, MemoryError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


class ShardIndex:
    """The samples of a list of shards, numbered from 0, and their bytes.

    Args:
        shards: a folder of tars, a tar, a pattern `shards/{00000..00009}.tar`, or a list of these; local or a URL.
        allow_commands: run `pipe:COMMAND` entries and read a tar from their output; otherwise they are refused.
        copies: the local folder for copies of remote shards. It also stores the merged columns of all shards, so that
            the next start need not read every index, and the processes of a machine share them.
        strict: refuse a local tar that is missing or truncated, instead of skipping its unreadable samples.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a shard is truncated or no uncompressed tar, or the list has a command or an unknown kind of URL.
        OSError: a remote index cannot be fetched. The order follows from the indices, so none can be skipped.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        allow_commands: bool = False,
        copies: Copies | None = None,
        strict: bool = True,
    ) -> None:
        names = [shards] if isinstance(shards, str) else list(shards)
        self.source = " ".join(map(str, names))
        self._fetched = tempfile.TemporaryDirectory(prefix="lidit-") if any(map(_is_command, names)) else None
        self._copies, self._strict = copies, strict
        self.paths: list[Path | Url] = []
        ends = [0]
        for name in names:
            self.paths += self._locate(str(name), allow_commands)
            ends.append(len(self.paths))
        self._merged: Path | None = None
        if copies is not None and self._fetched is None:
            self._merged = copies.merged(stamps(self.paths), self._table)
        self._columns = map_columns(self._merged) if self._merged else joined(self.paths, copies, strict)
        self.starts = np.cumsum([0, *self._columns["samples"]])  # shard s has samples starts[s] to starts[s + 1]
        self.entries = self.starts[ends]  # entry i of the list has samples entries[i] to entries[i + 1]
        self._reader = Reader(self.paths, self._columns["bytes"].tolist(), copies)

    def __len__(self) -> int:
        """How many samples the shards hold together."""
        return int(self.starts[-1])

    def column(self, name: str) -> np.ndarray:
        """One of `COLUMNS`, with an entry for each sample."""
        return self._columns[name]

    @cached_property
    def shard(self) -> np.ndarray:
        """The number of each sample's shard, int32 (samples)."""
        return np.repeat(np.arange(len(self.paths), dtype=np.int32), np.diff(self.starts))

    def place(self, sample: int) -> tuple[int, int]:
        """The number of a sample's shard, and its position in the shard."""
        shard = int(self.starts.searchsorted(sample, "right")) - 1
        return shard, int(sample - self.starts[shard])

    def key(self, sample: int) -> str:
        """A sample's name in its tar."""
        return self._columns["key"][sample].decode(errors="replace")

    def image(self, sample: int, whole: bool = True) -> np.ndarray:
        """A sample's pixels, uint8 (H W 3), read-only.

        Args:
            sample: number of the sample.
            whole: fetch a remote shard whole; False fetches this sample alone.

        Raises:
            Unreadable: the shard cannot be read, or the image cannot be decoded.
        """
        data = self._bytes(sample, "image", whole)
        try:
            with Image.open(io.BytesIO(data)) as image:
                pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
        except UNDECODABLE as error:
            reason = re.sub(r" <_io.BytesIO[^>]*>", "", str(error))  # the address differs in each run
            raise Unreadable(f"{self._name(sample)}: the image cannot be decoded ({reason}); {FIX}") from error
        expected = (int(self._columns["height"][sample]), int(self._columns["width"][sample]))
        if pixels.shape[:2] != expected:
            raise Unreadable(
                f"{self._name(sample)}: the image has {pixels.shape[:2]} pixels, its index says {expected}"
            )
        return pixels

    def text(self, sample: int, whole: bool = True) -> dict[str, str]:
        """A sample's JSON: `caption`, and `dense` where the sample has a synthetic caption.

        Args:
            sample: number of the sample.
            whole: fetch a remote shard whole; False fetches this sample alone.

        Raises:
            Unreadable: the shard cannot be read, or the bytes are not such a JSON.
        """
        data = self._bytes(sample, "text", whole)
        try:
            text = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"{self._name(sample)}: the JSON cannot be read ({error}); {FIX}") from error
        if not isinstance(text, dict) or not isinstance(text.get("caption"), str):
            raise Unreadable(f'{self._name(sample)}: the JSON has no "caption"; {FIX}')
        return text

    @cached_property
    def digest(self) -> str:
        """A hash of the shards' names, keys and sizes, by which a cache knows its shards even in another folder."""
        known = self._columns.get("digest")
        return digest(self.paths, self._columns) if known is None else known.item().decode()

    @property
    def remote_bytes(self) -> np.ndarray:
        """Sizes of the remote shards in bytes, the largest first."""
        return np.sort(self._columns["bytes"][[isinstance(path, Url) for path in self.paths]])[::-1]

    def _bytes(self, sample: int, what: str, whole: bool) -> bytes:
        shard, _ = self.place(sample)
        offset, size = (int(self._columns[f"{what}_{number}"][sample]) for number in ("offset", "size"))
        data = self._reader.read(shard, offset, size, whole)
        if len(data) < size:
            raise Unreadable(f"{self._name(sample)}: the shard is truncated; {FIX}")
        return data

    def _name(self, sample: int) -> str:
        return f"{self.paths[self.place(sample)[0]]}, sample {self.key(sample)}"

    def _table(self) -> dict[str, np.ndarray]:
        columns = joined(self.paths, self._copies, self._strict)
        return columns | {"digest": np.array([digest(self.paths, columns).encode()])}

    def __getstate__(self) -> dict:
        """A worker process gets a copy without the columns where they lie in files, and maps these itself."""
        return self.__dict__ | {"_fetched": None} | ({"_columns": None} if self._merged else {})

    def __setstate__(self, state: dict) -> None:
        """Restore what `__getstate__` gave, and map the columns."""
        self.__dict__.update(state)
        if self._merged:
            self._columns = map_columns(self._merged)

    def _locate(self, name: str, allow_commands: bool) -> list[Path | Url]:
        """The tars that one entry of the list names."""
        if _is_command(name):
            if not allow_commands:
                raise ValueError(f"{name!r} would run a command; set allow_commands to true if you trust it")
            return [_fetch(name.removeprefix("pipe:"), Path(self._fetched.name) / f"{len(self.paths):05d}.tar")]
        if is_remote(name):
            if self._copies is None:
                raise ValueError(f"{name!r} is remote; set shard_cache to a folder for local copies")
            return [Url(url) for url in expand(name)] if name.endswith(".tar") else remote_folder(name, MANIFEST)
        paths = _folder(Path(name)) if Path(name).is_dir() else [Path(path) for path in expand(name)]
        for path in paths:
            if not path.is_file() and (self._strict or not index_path(path).is_file()):
                raise FileNotFoundError(f"shard {path} is missing; {FIX}")
        return paths


def expand(pattern: str) -> list[str]:
    """The names in a pattern: `a{08..10}.tar` is a08.tar, a09.tar and a10.tar; several ranges are combined."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    numbers = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return [name for n in numbers for name in expand(pattern[: match.start()] + n + pattern[match.end() :])]


def differences(there: dict, asked: dict) -> list[str]:
    """The fields of `asked` whose value in `there` is another, as text; a nested field is named by its path."""
    found = []
    for name, value in asked.items():
        other = there.get(name)
        if isinstance(value, list) and isinstance(other, list) and len(value) == len(other):
            value, other = dict(enumerate(value)), dict(enumerate(other))
        if isinstance(value, dict) and isinstance(other, dict):
            keys = value.keys() | other.keys()
            found += [f"{name}.{d}" for d in differences(other, {k: value.get(k) for k in sorted(keys)})]
        elif other != value:
            found.append(f"{name} was {other!r} and is {value!r} now")
    return found


def _folder(folder: Path) -> list[Path]:
    """A folder's tars: those that its manifest lists, or all where there is no manifest."""
    manifest = folder / MANIFEST
    tars = sorted(folder.glob("*.tar"))
    if manifest.is_file():
        tars = [folder / name for name in json.loads(manifest.read_text())["tars"]]
    if not tars:
        raise FileNotFoundError(f"{folder} holds no .tar shards; write some with lidit prep shard")
    return tars


def _is_command(name: str) -> bool:
    return str(name).startswith("pipe:")


def _fetch(command: str, target: Path) -> Path:
    """Run a command that the user allowed, and store the tar that it prints."""
    with target.open("wb") as file:
        code = subprocess.run(command, shell=True, stdout=file, check=False).returncode
    if code:
        raise ValueError(f"the command {command!r} of a pipe: shard ended with exit code {code}")
    return target
