"""Bundled miniature weights: named `bundled:NAME` wherever a Hugging Face id or a folder may stand."""

from __future__ import annotations

from pathlib import Path

PREFIX = "bundled:"
ROOT = Path(__file__).parent


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
