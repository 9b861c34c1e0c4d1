from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.speed_sampling import run


@pytest.mark.slow
def test_samplers_are_judged_and_pipelines_timed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(str(tmp_path / "speed.json"), evaluations=[2, 5], count=1, batch_size=2, rounds=1, steps=2)
    found = json.loads((tmp_path / "speed.json").read_text())
    asked = [(row["sampler"], row["evaluations"]) for row in found["quality"]]
    assert asked == [("euler", 2), ("heun", 1), ("euler", 5), ("heun", 5)]
    assert {row["images"] for row in found["quality"]} == {4}
    first, *others = found["speed"]
    assert first["over_diffusers"] == 1
    assert all(row["images_per_second"] > 0 for row in others)
    assert "lidit, its text alone" in capsys.readouterr().out
