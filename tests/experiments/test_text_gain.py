"""What a caption is worth is measured on the same noise for every model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import text_gain
from lidit.pipeline import BUNDLED


def scores(checkpoint: str, out: Path) -> dict:
    text_gain.score(checkpoint, str(out), count=16)
    return json.loads((out / "scores.json").read_text())["scores"]


def test_the_bundled_model_gains_by_the_right_caption_and_twice_the_same(tmp_path: Path) -> None:
    found = scores(BUNDLED, tmp_path / "a")
    assert found["gain"] > 0.2
    assert 0 < found["loss"] < 0.5
    assert scores(BUNDLED, tmp_path / "b") == pytest.approx(found, rel=1e-4)


@pytest.mark.slow
def test_a_model_that_was_hardly_trained_gains_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = scores(str(tiny_checkpoint), tmp_path / "a")
    assert abs(found["gain"]) < 0.05
