"""What is to run on a GPU runs, smaller, on a CPU."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch

from experiments import speed_gpu
from experiments.speed_gpu import Setting, blocks, run
from lidit.models.lidit import LIDiTBlock


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_gpu, "LLM_WIDTHS", [32, 48])
    monkeypatch.setattr(speed_gpu, "TOKENS", 4)


def test_rows_are_timed_and_what_does_not_fit_says_so(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"pixels": 32, "batch": 2, "compiled": False}
    settings = [Setting(**shape), Setting(**shape, every=1), Setting(**shape, model="PixArt"), Setting(batch=10**9)]
    monkeypatch.setattr(speed_gpu, "SETTINGS", settings)
    whole = speed_gpu.measured

    def measured(setting: Setting, *rest: object) -> dict:
        if setting.batch > 2:
            raise torch.OutOfMemoryError
        return whole(setting, *rest)

    monkeypatch.setattr(speed_gpu, "measured", measured)
    run(str(tmp_path / "speed.json"), device="cpu", rounds=2, size=(2, 64, 2))
    plain, recomputed, pixart, large = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert plain["utilisation"] > 0
    assert recomputed["images_per_second"] > 0
    assert pixart["utilisation"] is None
    assert large["fits"] is False


@pytest.mark.slow
def test_sharding_over_one_process_runs(small: None) -> None:
    setting = Setting(32, 2, compiled=False, sharded=True)
    assert speed_gpu.measured(setting, (2, 64, 2), torch.device("cpu"), 2, 1.0)["images_per_second"] > 0
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("room", [0, 1, 5, 8])
def test_the_deepest_stack_that_fits_is_found(room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(depth: int, *rest: object) -> float:
        if depth > room:
            raise torch.OutOfMemoryError
        return float(depth)

    monkeypatch.setattr(speed_gpu, "stack_seconds", seconds)
    blocks(str(tmp_path / "speed.json"), device="cpu", most=8)
    fitting = json.loads((tmp_path / "speed.json").read_text())["fitting"]
    assert max((each["blocks"] for each in fitting), default=0) == room


@pytest.mark.slow
def test_a_stack_runs_and_is_gone_before_the_next(small: None) -> None:
    def alive() -> int:
        return sum(type(each) is LIDiTBlock for each in gc.get_objects())

    before = alive()
    for depth in (4, 1):
        assert speed_gpu.stack_seconds(depth, 1, 32, torch.device("cpu")) > 0
    assert alive() - before <= 1
