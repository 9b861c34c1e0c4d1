"""The demo from end to end, with hardly any training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lidit.cli import main


@pytest.mark.slow
@pytest.mark.one_of_each
def test_the_demo_leaves_a_report_pictures_and_scores(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--steps=3", "--scenes=128", "--prompts_per_task=1"]) == 0
    record = json.loads((out / "scores.json").read_text())
    scores = record["scores"]
    assert record["steps_done"] == 3
    assert scores.keys() == {"demo", "bundled"}
    assert scores["demo"].keys() == {"single", "two", "position", "counting", "overall"}
    report = (out / "report.html").read_text()
    assert "(3 of 3 steps)" in report
    assert report.count("data:image/png;base64,") == 3
    assert "http" not in report  # self-contained
    assert (out / "samples.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert all(f"[{stage}/5]" in said for stage in range(1, 6))
    assert f"Look at {out}/report.html" in said
