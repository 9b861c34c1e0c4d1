"""One sample on its way from a collection to a shard: what is known of it, and where the rest lies until it is read."""

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

KEY_BYTES = 80  # of a key; a tar's headers have room for 100


class Field(NamedTuple):
    """A value in a JSON file."""

    file: Place
    name: str


@dataclass(frozen=True, slots=True)
class Record:
    """One sample before it is written to a shard."""

    key: str  # unique in its set; the name of its files in the tar
    image: np.ndarray | Place | Cell | None  # uint8 (H W 3), RGB, or where an image file lies
    caption: Any  # the original caption, or where it lies
    dense: Any = ""  # the synthetic one, empty where there is none
    more: dict[str, Any] | Place = field(default_factory=dict)  # its other columns, or where JSON with them lies
    problem: str = ""  # why it cannot be used, where that is known already

    def data(self) -> bytes:
        """The image file.

        Raises:
            Unusable: there is none, or the record has a problem.
        """
        self._check()
        if not isinstance(self.image, (Place, Cell)):
            raise Unusable("no image")
        return self.image.read()

    def texts(self) -> tuple[str, str]:
        """The original caption and the synthetic one, which may be empty.

        Raises:
            Unusable: there is no original caption, one is no text in UTF-8, or the record has a problem.
        """
        self._check()
        caption, dense = _text(self.caption), _text(self.dense)
        if not caption:
            raise Unusable("no caption")
        return caption, dense

    def columns(self) -> dict[str, Any]:
        """What else the source says of it.

        Raises:
            Unusable: its JSON cannot be read.
        """
        return _json(self.more) if isinstance(self.more, Place) else self.more

    def _check(self) -> None:
        if self.problem:
            raise Unusable(self.problem)


def digest(records: list[Record]) -> str:
    """A hash of what was found, not of where: the collection may move."""
    state = hashlib.sha256()
    for record in records:
        told = [text if isinstance(text, str) else "" for text in (record.caption, record.dense)]
        part = record.image[1:] if isinstance(record.image, Place) else ()  # of its file, without the path
        state.update(json.dumps([record.key, record.problem, *told, *part]).encode())
    return state.hexdigest()[:16]


def kept_keys(path: Path, collection: str) -> set[str]:
    """The keys in kept.jsonl of `lidit prep filter`.

    Args:
        path: of the file.
        collection: the digest of the records it must have been made of.

    Raises:
        ValueError: it is empty, or was made of another collection.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if not lines or lines[0].get("collection") != collection:
        raise ValueError(f"{path} is not of this collection as it is now; run lidit prep filter again")
    if len(lines) == 1:
        raise ValueError(f"{path} keeps nothing")
    return {line["key"] for line in lines[1:]}


def safe_key(name: str) -> str:
    """A name as the key of a sample: ASCII letters, digits, hyphens, underscores and slashes, at most 80 bytes.

    A name that has anything else, or is longer, ends in eight digits of its hash, so that different ones stay so.
    """
    key = "/".join(part for part in re.sub(r"[^A-Za-z0-9_/-]", "_", name).split("/") if part)
    if key and key == name and len(key) <= KEY_BYTES:
        return key
    ending = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{key[: KEY_BYTES - 9]}-{ending}"


def _text(value: Any) -> str:
    """A caption, from where it lies."""
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
