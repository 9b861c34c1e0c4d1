"""Model cards of the bundled parts: what made them, on what, and what was measured; and their files' checksums.

python -m experiments.cards checksums      once a bundled file has changed: `lidit doctor` compares with them
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

from lidit import assets
from lidit.whole import write_text


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of some packages."""
    return {name: version(name) for name in packages}


def write_card(folder: Path, **facts: object) -> None:
    """Write card.json: its name appears in `bundled:` errors and its facts in docs/miniature.md."""
    write_text(folder / "card.json", json.dumps({"name": folder.name, **facts}, indent=2) + "\n")
    print(json.dumps(facts.get("measured"), indent=2))


def write_checksums() -> None:
    """Write the checksums of all that is bundled now."""
    manifest = assets.ROOT / assets.CHECKSUMS
    write_text(manifest, json.dumps(assets.checksums(), indent=1) + "\n")
    print(f"{len(json.loads(manifest.read_text()))} files in lidit/assets/{manifest.name}")


if __name__ == "__main__":
    if sys.argv[1:] != ["checksums"]:
        sys.exit("say `python -m experiments.cards checksums`")
    write_checksums()
