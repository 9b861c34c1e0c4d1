"""The table of the paper's stages in the manual is what `lidit plan` counts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.plan.stages import TABLE, row, share, words

PAGE = (Path(__file__).parents[2] / "docs/paper_scale.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("stage", TABLE)
def test_a_stages_numbers_are_those_that_are_counted(stage: str, no_hub: None) -> None:
    assert [found for found in (row(stage), share(stage)) if found not in PAGE] == []


def test_every_stage_has_its_rows_and_its_command() -> None:
    assert re.findall(r"^\| (\d+B, \d+ px) \|", PAGE, re.MULTILINE) == [*TABLE, *TABLE]
    commands = PAGE.replace("\\\n    ", "")
    for recipes, overlay, pixels, steps in TABLE.values():
        files = [Path(word).relative_to(Path(__file__).parents[2]) for word in words(recipes, overlay)[1::2]]
        command = f"lidit plan {' '.join(f'--config {file}' for file in files)} --pixels {pixels}"
        command += f" --trainer.max_steps {steps}" if steps else ""
        assert f"{command}\n" in commands
