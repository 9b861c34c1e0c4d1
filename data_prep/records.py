"""One sample between collection and shard: what is known of it, and where the rest lies until it is read."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.images import Unusable
from data_prep.places import Cell, Place

KEY_BYTES = 80  # largest key; a tar's header has room for 100 bytes


class Field(NamedTuple):
    """A value in a JSON file."""

    file: Place
    name: str


@dataclass(frozen=True, slots=True)
class Record:
    """One sample before it is written to a shard."""

    key: str  # unique in its set; the name of its files in the tar
    image: np.ndarray | Place | Cell | None  # RGB pixels, uint8 (H W 3), or the place of an image file
    caption: Any  # the original caption, or its place
    dense: Any = ""  # the synthetic caption, or its place; empty if there is none
    more: dict[str, Any] | Place = field(default_factory=dict)  # other columns, or a JSON's place
    problem: str = ""  # why the record is unusable, if that is already known

    def data(self) -> bytes:
        """The bytes of the image file.

        Raises:
            Unusable: there is no image file, or the record has a problem.
        """
        self._check()
        if not isinstance(self.image, (Place, Cell)):
            raise Unusable("no image")
        return self.image.read()

    def texts(self) -> tuple[str, str]:
        """The original caption and the synthetic one, which may be empty.

        Raises:
            Unusable: there is no original caption, a caption is not text in UTF-8, or the record has a problem.
        """
        self._check()
        caption, dense = _text(self.caption), _text(self.dense)
        if not caption:
            raise Unusable("no caption")
        return caption, dense

    def columns(self) -> dict[str, Any]:
        """The other columns that the source has for the sample.

        Raises:
            Unusable: the JSON with them cannot be read.
        """
        return _json(self.more) if isinstance(self.more, Place) else self.more

    def _check(self) -> None:
        if self.problem:
            raise Unusable(self.problem)


def digest(records: list[Record]) -> str:
    """A hash of a collection's records, which is the same after the collection has moved."""
    state = hashlib.sha256()
    for record in records:
        told = [text if isinstance(text, str) else "" for text in (record.caption, record.dense)]
        part = (
            record.image[1:] if isinstance(record.image, Place) else ()
        )  # offset and size, without the path of the file
        state.update(json.dumps([record.key, record.problem, *told, *part]).encode())
    return state.hexdigest()[:16]


def kept_keys(path: Path, collection: str) -> set[str]:
    """The keys in kept.jsonl of `lidit prep filter`.

    Args:
        path: path of kept.jsonl.
        collection: digest of the records that the file must have been made of.

    Raises:
        ValueError: the file has no keys, or was made of another collection.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if not lines or lines[0].get("collection") != collection:
        raise ValueError(f"{path} does not belong to this collection as it is now; run lidit prep filter again")
    if len(lines) == 1:
        raise ValueError(f"{path} keeps nothing; loosen the rules and run lidit prep filter again")
    return {line["key"] for line in lines[1:]}


def safe_key(name: str) -> str:
    """A name as the key of a sample: ASCII letters, digits, hyphens, underscores and slashes, at most 80 bytes.

    Other characters are replaced, and a longer name is cut. A name that was changed ends in eight digits of its hash,
    so different names give different keys.
    """
    key = "/".join(part for part in re.sub(r"[^A-Za-z0-9_/-]", "_", name).split("/") if part)
    if key and key == name and len(key) <= KEY_BYTES:
        return key
    ending = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{key[: KEY_BYTES - 9]}-{ending}"


def _text(value: Any) -> str:
    """A caption's text, read from its place if need be; empty if there is none."""
    if isinstance(value, Field):
        value = _json(value.file).get(value.name)
    elif isinstance(value, Place):
        value = value.read().decode("utf-8", "surrogateescape")
    if value is None or value != value:  # JSON's NaN
        return ""
    if not isinstance(value, str):
        raise Unusable("caption is no text", repr(value)[:60])
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unusable("caption is not UTF-8", ascii(value)[:60]) from error
    return value.strip()


def _json(place: Place) -> dict[str, Any]:
    content = place.read().decode("utf-8", "surrogateescape")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Unusable("broken JSON", str(error)) from error
    if not isinstance(value, dict):
        raise Unusable("broken JSON", "not an object")
    return value
