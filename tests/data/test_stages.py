"""A stage is a recipe laid over another: other shards and batches, the time shift of their pictures, nothing else."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import Namespace

from lidit.data.datamodule import ShardData
from lidit.fit import read_recipe
from lidit.module import TextToImage

CONFIGS = Path(__file__).parents[2] / "experiments/configs"


def parsed(*names: str) -> tuple[Namespace, TextToImage, ShardData]:
    """What `lidit fit` would train with these recipes, one over the other."""
    return read_recipe([word for name in names for word in ("--config", str(CONFIGS / name))])


@pytest.mark.parametrize(("pixels", "shift"), [(512, 2.0), (1024, 4.0)])
def test_a_stage_changes_the_data_alone_and_the_time_shift_follows(pixels: int, shift: float) -> None:
    first, model, data = parsed("lidit_1b.yaml")
    stage, stage_model, stage_data = parsed("lidit_1b.yaml", f"lidit_1b_{pixels}.yaml")
    assert stage_data.train.endswith(f"-{pixels}")
    assert stage_data.val.endswith(f"-{pixels}")
    assert stage_data.batch_size < data.batch_size
    latent = (pixels // 8, pixels // 8)
    assert stage_model.objective.shift_for(latent) == shift
    assert model.objective.shift_for((32, 32)) == 1.0
    wide = (pixels // 8 * 5 // 4, pixels // 8 * 4 // 5)  # a bucket of as many pixels
    assert stage_model.objective.shift_for(wide) == pytest.approx(shift, rel=0.02)
    assert without_data(first) == without_data(stage)


def without_data(given: Namespace) -> dict[str, object]:
    """What a recipe sets, but for its data and for what is an object by now."""
    found = {key: value for key, value in given.items() if isinstance(value, int | float | str)}
    assert "trainer.max_steps" in found
    return {key: value for key, value in found.items() if not key.startswith("data.")}


@pytest.mark.parametrize("pixels", [512, 1024])
def test_times_of_a_stage_are_those_of_the_first_moved_towards_noise(pixels: int) -> None:
    _, model, _ = parsed("lidit_1b.yaml", f"lidit_1b_{pixels}.yaml")
    objective = model.objective
    a, draw = pixels / 256, torch.Generator().manual_seed
    t, moved = objective.sample_t(999, (32, 32), draw(0)), objective.sample_t(999, (pixels // 8, pixels // 8), draw(0))
    assert torch.allclose(moved, a * t / (1 + (a - 1) * t), atol=1e-6)
    assert math.isclose(float(moved.median()), a / (a + 1), abs_tol=0.05)


@pytest.mark.parametrize("pixels", [512, 1024])
def test_a_stage_names_only_what_the_recipe_under_it_knows(pixels: int) -> None:
    stage = yaml.safe_load((CONFIGS / f"lidit_1b_{pixels}.yaml").read_text())
    assert stage.keys() == {"data"}
    assert stage["data"].keys() == {"train", "val", "batch_size"}
