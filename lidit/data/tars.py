"""One shard: a tar and the index beside it.

A shard is an uncompressed WebDataset tar of `KEY.png` (or jpg, jpeg, webp) and `KEY.json` with
`{"caption", "dense", "width", "height"}`; `dense`, the synthetic caption, may be missing. Beside `00000.tar` may lie
`00000.index.npz` with the columns of `COLUMNS` and `tar_bytes`; without it the tar's headers are scanned. Fields are
decoded one by one (numpy without pickle, JSON, image bytes), so opening a stranger's shard runs none of their code.
"""

from __future__ import annotations

import io
import json
import logging
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

log = logging.getLogger(__name__)

IMAGES = ("png", "jpg", "jpeg", "webp")
COLUMNS = (
    "key",  # UTF-8 bytes
    *("image_offset", "image_size", "text_offset", "text_size"),  # bytes, from the start of the tar
    *("width", "height"),  # pixels
    *("caption_chars", "dense_chars"),  # 0 if there is no such caption
)
INDEX = ".index.npz"
FIX = "write it again (lidit prep shard with the same arguments writes what is missing) or take it off the list"


def index_path(tar: Path) -> Path:
    """The file with a shard's index."""
    return tar.with_suffix(INDEX)


def read_index(tar: Path, strict: bool = True) -> dict[str, np.ndarray]:
    """A shard's columns, from the index beside it or, without one, from the tar's headers.

    Args:
        tar: the shard.
        strict: refuse a tar that is missing or truncated; False only logs it, if the tar has an index.

    Raises:
        FileNotFoundError: the tar and its index are missing.
        ValueError: the tar is truncated or not the one that was indexed, or the index cannot be read.
    """
    path = index_path(tar)
    if not path.is_file():
        return scan(tar)
    columns = parse_index(path, path)
    whole, size = int(columns.pop("tar_bytes")), tar.stat().st_size if tar.is_file() else 0
    if size < whole and not strict:
        log.warning(
            "shard %s is missing or truncated: %d bytes of %d; what cannot be read is skipped", tar, size, whole
        )
    elif size < whole:
        raise ValueError(f"shard {tar} is truncated: {size} bytes of {whole}; {FIX}")
    if size > whole:
        raise ValueError(f"shard {tar} is not the one that was indexed; delete {path}, and the tar is scanned instead")
    return columns


def parse_index(file: Path | io.BytesIO, name: object) -> dict[str, np.ndarray]:
    """The columns of an index, and `tar_bytes`, the size of its tar.

    Raises:
        ValueError: the file is not an index.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            return {column: stored[column] for column in (*COLUMNS, "tar_bytes")}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"index {name} cannot be read ({error}); delete it, and the tar is scanned instead") from error


def scan(tar: Path) -> dict[str, np.ndarray]:
    """A shard's columns from its headers, JSON and the first bytes of each image.

    Raises:
        ValueError: the file is truncated or not an uncompressed tar, or a sample lacks its image or its JSON.
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
    return {"key": np.array([key.encode(errors="surrogateescape") for key in samples], dtype=np.bytes_), **columns}


def _describe(sample: dict, kind: str, member: tarfile.TarInfo, file: io.BufferedReader) -> None:
    """Add to a sample the columns that one member of the tar gives."""
    what = "text" if kind == "json" else "image"
    if f"{what}_offset" in sample:
        raise ValueError(f"{member.name} is the second {what} of its sample")
    sample |= {f"{what}_offset": member.offset_data, f"{what}_size": member.size}
    if what == "text":
        text = json.load(file)
        if not isinstance(text, dict) or not isinstance(text.get("caption"), str):
            raise ValueError(f'{member.name} has no "caption"')
        dense = text.get("dense") or ""
        if not isinstance(dense, str):
            raise ValueError(f'"dense" of {member.name} is not a text')
        sample |= {"caption_chars": len(text["caption"]), "dense_chars": len(dense)}
    else:
        sample["width"], sample["height"] = Image.open(file).size


def _check_end(tar: Path) -> None:
    """A tar ends with two blocks of zeros; tarfile does not notice when a tar breaks off between two members."""
    with tar.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1024))
        if size < 1024 or any(file.read()):
            raise ValueError(f"shard {tar} is truncated or not an uncompressed tar; {FIX}")
