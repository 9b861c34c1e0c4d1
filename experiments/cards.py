"""Model cards of the bundled parts: what made them, on what, and what was measured."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of some packages."""
    return {name: version(name) for name in packages}


def write_card(folder: Path, **facts: object) -> None:
    """Write card.json: its name appears in `bundled:` errors and its facts in the README."""
    temporary = folder / "card.json.part"
    temporary.write_text(json.dumps({"name": folder.name, **facts}, indent=2) + "\n")
    os.replace(temporary, folder / "card.json")
    print(json.dumps(facts.get("measured"), indent=2))
