"""The recipes of this project are rehearsed as they stand, and faults are found in the stage where they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from lidit.cli import main

CONFIGS = Path("experiments/configs")
STAGES = {
    "lidit_1b": ([], 256),
    "lidit_1b_512": (["lidit_1b"], 512),
    "lidit_1b_1024": (["lidit_1b"], 1024),
    "lidit_10b": ([], 512),
    "lidit_10b_1024": (["lidit_10b"], 1024),
    "ablation": ([], 256),
    "llmdiff_sd15": ([], 512),
}  # recipe: the ones it is laid over, side of its pictures
MINIATURES = ["demo", "mini", "mini_ablation", "llmdiff_mini"]
PLAIN = {"cluster/lidit_1b", "cluster/lidit_10b_1024"}  # one of each size in plain pytest


def overlays() -> list[tuple[list[str], int]]:
    """Every recipe alone where it is planned to fit so, and with each of its overlays."""
    found = []
    for path in sorted((CONFIGS / "cluster").glob("*.yaml")):
        recipe = max((name for name in STAGES if path.stem.startswith(name)), key=len)
        below, pixels = STAGES[recipe]
        found.append(([*below, recipe, f"cluster/{path.stem}"], pixels))
    return found + [(["llmdiff_sd15"], 512), *(([name], 64) for name in MINIATURES)]


def cases() -> list:
    return [
        pytest.param(
            files,
            pixels,
            id="+".join(files),
            marks=[pytest.mark.slow, *([pytest.mark.one_of_each] * (files[-1] in PLAIN))],
        )
        for files, pixels in overlays()
    ]


@pytest.mark.parametrize(("files", "pixels"), cases())
def test_a_recipe_is_played_from_its_first_step_to_its_scores(
    files: list[str], pixels: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [word for file in files for word in ("--config", str(CONFIGS / f"{file}.yaml"))]
    code = main(["rehearse", *argv, "--pixels", str(pixels), "--keep", str(tmp_path / "kept")])
    said = capsys.readouterr()
    assert code == 0, said.out + said.err
    assert "Every stage passed." in said.out
