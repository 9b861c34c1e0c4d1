from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments.speed_loop import Clock, run


def test_the_clock_leaves_out_the_warm_up() -> None:
    clock = Clock()
    clock.ends = [0.0, 9.0, 10.0, 11.0]
    assert clock.seconds(warmup=1) == 1


@pytest.mark.slow
def test_both_loops_are_timed_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    threads = torch.get_num_threads()
    run(str(tmp_path / "speed.json"), rounds=1, steps=2, warmup=1, options=["--data.batch_size", "4"])
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "speed.json").read_text())
    (round_,) = found["rounds"]
    assert found["overhead"] == round_["whole"] / round_["bare"] - 1
    assert "overhead" in capsys.readouterr().out
