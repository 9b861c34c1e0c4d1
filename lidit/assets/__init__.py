"""Bundled miniature weights: named `bundled:NAME` wherever a Hugging Face id or a folder may stand."""

from __future__ import annotations

import hashlib
from pathlib import Path

PREFIX = "bundled:"
ROOT = Path(__file__).parent
CHECKSUMS = "checksums.json"  # beside this file: what `checksums` gave when they were bundled


def resolve(name: str) -> str:
    """The folder of a bundled part for `bundled:NAME`; any other name unchanged.

    Raises:
        ValueError: no part of that name is bundled.
    """
    if not name.startswith(PREFIX):
        return name
    folder = ROOT / name.removeprefix(PREFIX)
    if not (folder / "card.json").is_file():
        known = ", ".join(sorted(PREFIX + card.parent.name for card in ROOT.glob("*/card.json"))) or "nothing"
        raise ValueError(f"{name} is not bundled with lidit; bundled: {known}")
    return str(folder)


def checksums() -> dict[str, str]:
    """The SHA-256 of every bundled file, by its place in this folder."""
    found = {}
    for path in sorted(path for path in ROOT.glob("*/**/*") if path.is_file() and "__pycache__" not in path.parts):
        with path.open("rb") as file:
            found[path.relative_to(ROOT).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
