"""Write the bundled parts' model cards (what made them, from what data, what was measured) and their checksums.

python -m experiments.cards checksums      after a bundled file has changed: `lidit doctor` compares with them
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

from lidit import assets
from lidit.disk.whole import write_text


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each of these packages."""
    return {name: version(name) for name in packages}


def write_card(folder: Path, **facts: object) -> None:
    """Write card.json: its name appears in `bundled:` errors and its facts in docs/miniature.md."""
    write_text(folder / "card.json", json.dumps({"name": folder.name, **facts}, indent=2) + "\n")
    print(json.dumps(facts.get("measured"), indent=2))


def write_checksums() -> None:
    """Write the checksums of all files that are bundled now."""
    manifest = assets.ROOT / assets.CHECKSUMS
    write_text(manifest, json.dumps(assets.checksums(), indent=1) + "\n")
    print(f"{len(json.loads(manifest.read_text()))} files in lidit/assets/{manifest.name}")


if __name__ == "__main__":
    if sys.argv[1:] != ["checksums"]:
        sys.exit("usage: python -m experiments.cards checksums")
    write_checksums()
