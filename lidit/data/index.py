"""Tar shards as one indexed set: where each sample's bytes lie, read with one system call each.

A shard is an uncompressed WebDataset tar of `KEY.png` (or jpg, jpeg, webp) and `KEY.json` with
`{"caption", "dense", "width", "height"}`; `dense`, the synthetic caption, may be missing. Beside `00000.tar` may lie
`00000.index.npz` with the columns of `COLUMNS`; without it the tar's headers are scanned. Fields are decoded one by one
(numpy without pickle, JSON, image bytes): opening a stranger's shard runs no code of theirs. Imports no torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES = ("png", "jpg", "jpeg", "webp")
COLUMNS = (
    "key",  # UTF-8 bytes
    *("image_offset", "image_size", "text_offset", "text_size"),  # bytes, from the start of the tar
    *("width", "height"),  # pixels
    *("caption_chars", "dense_chars"),  # 0 where there is no such caption
)
MANIFEST = "shards.json"  # written by data_prep.shard: how a folder was made, and which tars belong to it
MAX_OPEN = 128  # shards held open by one process
FIX = "write it again (lidit prep shard with the same arguments writes what is missing) or take it off the list"


class ShardIndex:
    """The samples of a list of shards, numbered from 0, and their bytes.

    Args:
        shards: a folder of tars, a tar, a pattern `shards/{00000..00009}.tar`, or a list of these.
        allow_commands: run `pipe:COMMAND` entries and read a tar from their output; otherwise they are refused.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a shard is truncated or is no such tar, or the list has a command or an unknown kind of URL.
    """

    def __init__(self, shards: str | Sequence[str], allow_commands: bool = False) -> None:
        names = [shards] if isinstance(shards, str) else list(shards)
        self._fetched = tempfile.TemporaryDirectory(prefix="lidit-") if any(map(_is_command, names)) else None
        self.paths: list[Path] = []
        for name in names:
            self.paths += self._locate(str(name), allow_commands)
        tables = [read_index(path) for path in self.paths]
        self._columns = {c: np.concatenate([t[c] for t in tables]) for c in COLUMNS}
        self.source = " ".join(map(str, names))
        self.shard = np.repeat(np.arange(len(tables), dtype=np.int32), [len(t["key"]) for t in tables])
        self.starts = np.cumsum([0, *(len(t["key"]) for t in tables)])  # shard s has samples starts[s] to starts[s + 1]
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        """Samples in all shards."""
        return len(self.shard)

    def column(self, name: str) -> np.ndarray:
        """One of `COLUMNS`, an entry per sample."""
        return self._columns[name]

    def place(self, sample: int) -> tuple[int, int]:
        """A sample's shard and its position in it."""
        shard = int(self.shard[sample])
        return shard, int(sample - self.starts[shard])

    def key(self, sample: int) -> str:
        """A sample's name in its tar."""
        return self._columns["key"][sample].decode()

    def image(self, sample: int) -> np.ndarray:
        """A sample's pixels, uint8 (H W 3).

        Raises:
            ValueError: the image cannot be decoded.
        """
        data = self._bytes(sample, "image")
        try:
            with Image.open(io.BytesIO(data)) as image:
                return np.array(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{self._name(sample)}: the image cannot be decoded ({error}); {FIX}") from error

    def text(self, sample: int) -> dict[str, str]:
        """A sample's JSON: `caption`, and `dense` where it has one.

        Raises:
            ValueError: it is not JSON.
        """
        try:
            return json.loads(self._bytes(sample, "text"))
        except ValueError as error:
            raise ValueError(f"{self._name(sample)}: the JSON cannot be read ({error}); {FIX}") from error

    @cached_property
    def digest(self) -> str:
        """A hash of the shards' names, keys and sizes, for caches made from them; their folder may move."""
        digest = hashlib.sha256("\n".join(path.name for path in self.paths).encode())
        for column in COLUMNS:
            values = self._columns[column]
            digest.update(b"\n".join(values.tolist()) if column == "key" else values.astype("<i8").tobytes())
        return digest.hexdigest()[:16]

    def _bytes(self, sample: int, what: str) -> bytes:
        offset, size = int(self._columns[f"{what}_offset"][sample]), int(self._columns[f"{what}_size"][sample])
        data = os.pread(self._file(int(self.shard[sample])), size, offset)
        if len(data) < size:
            raise ValueError(f"{self._name(sample)}: the shard is truncated; {FIX}")
        return data

    def _file(self, shard: int) -> int:
        """A shard's open file; the one opened first is closed when there are too many."""
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
        return self._files[shard]

    def _name(self, sample: int) -> str:
        return f"{self.paths[self.shard[sample]]}, sample {self.key(sample)}"

    def __getstate__(self) -> dict:
        """Open files stay behind when a worker process gets a copy."""
        return self.__dict__ | {"_files": {}, "_fetched": None}

    def __del__(self) -> None:
        """Close the shards."""
        for file in self.__dict__.get("_files", {}).values():
            os.close(file)

    def _locate(self, name: str, allow_commands: bool) -> list[Path]:
        """The tars that one entry of the list stands for."""
        if _is_command(name):
            if not allow_commands:
                raise ValueError(f"{name!r} would run a command; set allow_commands to true if you trust it")
            return [_fetch(name.removeprefix("pipe:"), Path(self._fetched.name) / f"{len(self.paths):05d}.tar")]
        if "://" in name:
            raise ValueError(f"{name!r}: only local shards are read; download them first")
        paths = _folder(Path(name)) if Path(name).is_dir() else [Path(path) for path in expand(name)]
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"shard {path} is missing; {FIX}")
        return paths


def expand(pattern: str) -> list[str]:
    """`a{08..10}.tar` as a08.tar, a09.tar, a10.tar; several ranges multiply."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    numbers = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return [name for n in numbers for name in expand(pattern[: match.start()] + n + pattern[match.end() :])]


def read_index(tar: Path) -> dict[str, np.ndarray]:
    """A shard's columns, from the index beside it or from its headers.

    Raises:
        ValueError: the tar is not the one that was indexed, or the index cannot be read.
    """
    path = index_path(tar)
    if not path.is_file():
        return scan(tar)
    try:
        with np.load(path, allow_pickle=False) as stored:
            columns = {name: stored[name] for name in (*COLUMNS, "tar_bytes")}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"index {path} cannot be read ({error}); delete it and the tar is scanned instead") from error
    size = tar.stat().st_size
    if size < columns["tar_bytes"]:
        raise ValueError(f"shard {tar} is truncated: {size} bytes of {columns['tar_bytes']}; {FIX}")
    if size > columns.pop("tar_bytes"):
        raise ValueError(f"shard {tar} is not the one its index was made of; delete {path} and it is scanned instead")
    return columns


def scan(tar: Path) -> dict[str, np.ndarray]:
    """A shard's columns from its headers, JSON and the first bytes of each image.

    Raises:
        ValueError: truncated, not an uncompressed tar, or a sample lacks its image or its JSON.
    """
    samples: dict[str, dict] = {}
    _check_end(tar)
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, _, kind = name.lower().partition(".")
                if member.isfile() and kind in (*IMAGES, "json"):
                    key = f"{folder}/{name[: len(stem)]}".removeprefix("./").lstrip("/")
                    _describe(samples.setdefault(key, {}), kind, member, archive.extractfile(member))
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"shard {tar} cannot be read ({error}); {FIX}") from error
    for key, sample in samples.items():
        if missing := [c for c in COLUMNS[1:] if c not in sample]:
            raise ValueError(f"shard {tar}, sample {key} has no {missing[0].split('_')[0]} file; {FIX}")
    integers = {c: np.int64 if c.endswith("offset") else np.int32 for c in COLUMNS[1:]}  # 10M samples fit in 0.5 GB
    columns = {c: np.array([s[c] for s in samples.values()], dtype) for c, dtype in integers.items()}
    return {"key": np.array([key.encode() for key in samples], dtype=np.bytes_), **columns}


def _describe(sample: dict, kind: str, member: tarfile.TarInfo, file: io.BufferedReader) -> None:
    """Add what one member of the tar tells to its sample."""
    what = "text" if kind == "json" else "image"
    if f"{what}_offset" in sample:
        raise ValueError(f"{member.name} is the second {what} of its sample")
    sample |= {f"{what}_offset": member.offset_data, f"{what}_size": member.size}
    if what == "text":
        text = json.load(file)
        if not isinstance(text, dict) or not isinstance(text.get("caption"), str):
            raise ValueError(f'{member.name} has no "caption"')
        sample |= {"caption_chars": len(text["caption"]), "dense_chars": len(text.get("dense") or "")}
    else:
        sample["width"], sample["height"] = Image.open(file).size


def _check_end(tar: Path) -> None:
    """A tar ends with two blocks of zeros; tarfile does not notice when a tar breaks off between two members."""
    with tar.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1024))
        if size < 1024 or any(file.read()):
            raise ValueError(f"shard {tar} is truncated or not an uncompressed tar; {FIX}")


def differences(there: dict, asked: dict) -> list[str]:
    """Fields of `asked` that differ from `there`, as text, nested ones by their path."""
    found = []
    for name, value in asked.items():
        other = there.get(name)
        if isinstance(value, list) and isinstance(other, list) and len(value) == len(other):
            value, other = dict(enumerate(value)), dict(enumerate(other))
        if isinstance(value, dict) and isinstance(other, dict):
            keys = value.keys() | other.keys()
            found += [f"{name}.{d}" for d in differences(other, {k: value.get(k) for k in sorted(keys)})]
        elif other != value:
            found.append(f"{name} is {other!r} there and {value!r} here")
    return found


def index_path(tar: Path) -> Path:
    """Where a shard's index lies."""
    return tar.with_suffix(".index.npz")


def _folder(folder: Path) -> list[Path]:
    """A folder's tars: those its manifest lists, else all."""
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
    """Run a command the user allowed and keep the tar it prints."""
    with target.open("wb") as file:
        code = subprocess.run(command, shell=True, stdout=file, check=False).returncode
    if code:
        raise ValueError(f"the command {command!r} of a pipe: shard ended with exit code {code}")
    return target
