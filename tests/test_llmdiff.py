"""The second system through the same commands: trained, checkpointed without what is frozen, exported, drawn with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from PIL import Image

from lidit.cli import main

ENCODER = {"class_path": "lidit.models.llmdiff.LLMDiffEncoder", "init_args": {"levels": 5}}


@pytest.fixture
def recipe(tiny_recipe: Path, tiny_llama: Path, tmp_path: Path) -> dict:
    content = yaml.safe_load(tiny_recipe.read_text())
    settings = {"name": str(tiny_llama), "dtype": "float32", "instruction": ""}
    content["model"]["llms"] = [{"class_path": "lidit.models.llmdiff.BlockwiseLLM", "init_args": settings}]
    content["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path / "logs")
    content["trainer"]["callbacks"] = [
        content["trainer"]["callbacks"][0],
        {"class_path": "lidit.callbacks.checkpoints.Checkpoints", "init_args": {"every_n_steps": 2}},
        {"class_path": "lidit.callbacks.throughput.Throughput", "init_args": {"every_n_steps": 2, "warmup_batches": 1}},
    ]
    content["trainer"] |= {"max_steps": 4, "val_check_interval": 4}
    return content


def trained_and_drawn(content: dict, folder: Path) -> dict[str, torch.Tensor]:
    """Weights of the checkpoint, after the commands that a user would give."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    run, out, png = folder / "run", folder / "exported", folder / "a.png"
    assert main(["fit", "--config", str(folder / "recipe.yaml"), "--run", str(run)]) == 0
    latest = run / "checkpoints/latest"
    assert main(["export", "--checkpoint", str(latest), "--out", str(out)]) == 0
    draw = ["a red circle", "--size", "32x32", "--steps", "2", "--checkpoint"]
    assert main(["sample", *draw, str(out), "--out", str(png)]) == 0
    assert Image.open(png).size == (32, 32)
    return torch.load(latest, weights_only=True)["state_dict"]


def test_the_adapter_is_trained_on_a_frozen_unet_and_drawn_with(recipe: dict, tmp_path: Path) -> None:
    sizes = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 4}
    kinds = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    unet = UNet2DConditionModel(in_channels=4, out_channels=4, cross_attention_dim=24, **sizes, **kinds)
    unet.save_pretrained(tmp_path / "base/unet")
    recipe["model"]["prompt_encoder"] = {**ENCODER, "init_args": {"levels": 5, "project": False}}
    backbone = {"name": str(tmp_path / "base"), "text_width": 32}
    recipe["model"]["backbone"] = {"class_path": "lidit.models.adapter.AdaptedUNet", "init_args": backbone}
    recipe["model"]["objective"] = {
        "class_path": "lidit.objectives.DDPM",
        "init_args": {"schedule": "scaled_linear"},
    }
    weights = trained_and_drawn(recipe, tmp_path)
    assert {name.split(".")[1] for name in weights} == {"g", "h", "norm", "phi", "adapters"}
    assert any(w.any() for name, w in weights.items() if name.endswith("a2"))  # it began at zero


def test_the_encoding_feeds_lidit_too(recipe: dict, tmp_path: Path) -> None:
    recipe["model"]["prompt_encoder"] = ENCODER
    weights = trained_and_drawn(recipe, tmp_path)
    assert {"prompt_encoder.g", "prompt_encoder.project.weight"} <= weights.keys()


def test_what_cannot_be_honoured_is_refused(recipe: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe["model"]["prompt_encoder"] = {**ENCODER, "init_args": {"levels": 3}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", str(tmp_path / "recipe.yaml")]) == 1
    assert "160 feature channels do not divide into 3 levels" in capsys.readouterr().err
