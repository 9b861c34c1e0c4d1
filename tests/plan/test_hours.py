"""GPU-hours and a price follow from operations and what is assumed, and the assumptions are printed."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from lidit.plan.costs import planned
from lidit.plan.hours import gpu_hours, lines
from lidit.plan.memory import Plan
from lidit.plan.plan import read

MINI = ["--config", str(Path(__file__).parents[2] / "experiments/configs/mini.yaml"), "--pixels", "64"]
MINI += ["--model.backbone.init_args.depth", "1"]


@cache
def plan() -> Plan:
    return planned(*read(MINI))


def test_hours_are_operations_over_what_gpus_do() -> None:
    words = ["--trainer.max_steps", "1000", "--trainer.accumulate_grad_batches", "3"]
    given, _ = read([*MINI, *words, "--peak", "1e-6", "--utilisation", "0.5", "--price", "2"])
    hours = 1000 * 3 * 128 * plan().flops / (1e6 * 0.5) / 3600
    assert gpu_hours(given, plan()) == pytest.approx(hours)
    said = " ".join(lines(given, plan()))
    assert "50% (--utilisation) of 1e-06 TFLOP/s a GPU (--peak), a step of 384 images on 1 GPUs" in said
    assert f"All 1,000 steps: {hours:,.0f} GPU-hours" in said
    assert f"At 2 a GPU-hour (--price): {2 * hours:,.0f}" in said


def test_without_a_price_or_an_end_none_is_made_up() -> None:
    given, _ = read([*MINI, "--trainer.max_steps", "-1"])
    said = " ".join(lines(given, plan()))
    assert "40% (--utilisation) of 989 TFLOP/s" in said
    assert "trainer.max_steps is open" in said
    assert "price" not in said
