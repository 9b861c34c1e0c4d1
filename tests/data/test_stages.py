"""A stage is a recipe laid over another: other shards and batches, the time shift of their pictures, nothing else."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from lidit.data.datamodule import ShardData
from lidit.module import TextToImage

CONFIGS = Path(__file__).parents[2] / "experiments/configs"


def parsed(*names: str) -> LightningCLI:
    """What `lidit fit` would train with these recipes, one over the other."""
    return LightningCLI(
        TextToImage,
        ShardData,
        args=[word for name in names for word in ("--config", str(CONFIGS / name))],
        run=False,
        save_config_callback=None,
        auto_configure_optimizers=False,
    )


@pytest.mark.parametrize(("pixels", "shift"), [(512, 2.0), (1024, 4.0)])
def test_a_stage_changes_the_data_alone_and_the_time_shift_follows(pixels: int, shift: float) -> None:
    first, stage = parsed("lidit_1b.yaml"), parsed("lidit_1b.yaml", f"lidit_1b_{pixels}.yaml")
    assert stage.datamodule.train.endswith(f"-{pixels}")
    assert stage.datamodule.val.endswith(f"-{pixels}")
    assert stage.datamodule.batch_size < first.datamodule.batch_size
    latent = (pixels // 8, pixels // 8)
    assert stage.model.objective.shift_for(latent) == shift
    assert first.model.objective.shift_for((32, 32)) == 1.0
    wide = (pixels // 8 * 5 // 4, pixels // 8 * 4 // 5)  # a bucket of as many pixels
    assert stage.model.objective.shift_for(wide) == pytest.approx(shift, rel=0.02)
    kept = {
        name: {k: v for k, v in cli.config.as_dict().items() if k not in ("data", "config")}
        for name, cli in {"first": first, "stage": stage}.items()
    }
    assert kept["first"] == kept["stage"]


@pytest.mark.parametrize("pixels", [512, 1024])
def test_times_of_a_stage_are_those_of_the_first_moved_towards_noise(pixels: int) -> None:
    objective = parsed("lidit_1b.yaml", f"lidit_1b_{pixels}.yaml").model.objective
    a, draw = pixels / 256, torch.Generator().manual_seed
    t, moved = objective.sample_t(999, (32, 32), draw(0)), objective.sample_t(999, (pixels // 8, pixels // 8), draw(0))
    assert torch.allclose(moved, a * t / (1 + (a - 1) * t), atol=1e-6)
    assert math.isclose(float(moved.median()), a / (a + 1), abs_tol=0.05)


@pytest.mark.parametrize("pixels", [512, 1024])
def test_a_stage_names_only_what_the_recipe_under_it_knows(pixels: int) -> None:
    stage = yaml.safe_load((CONFIGS / f"lidit_1b_{pixels}.yaml").read_text())
    assert stage.keys() == {"data"}
    assert stage["data"].keys() == {"train", "val", "batch_size"}
