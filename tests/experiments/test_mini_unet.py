"""The miniature latent diffusion model: its text tower is the bundled CLIP's, its U-Net a checkpoint's."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDPMScheduler, UNet2DConditionModel

from data_prep.shard import shard
from experiments import mini_unet, picture_scores
from lidit.cli import main
from lidit.eval.openclip import OpenCLIP
from lidit.models.clip import FrozenCLIPText
from lidit.objectives import DDPM

CONFIGS = Path(__file__).parents[2] / "experiments/configs"


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unet") / "text_encoder"
    mini_unet.text_encoder(out=str(folder))
    return folder


def test_the_tower_gives_what_open_clip_gives(tower: Path) -> None:
    prompts = ["a red circle to the left of a blue square", ""]
    clip = OpenCLIP(pretrained="bundled:clip").load()
    model, seen = clip._model, []
    model.ln_final.register_forward_hook(lambda module, given, output: seen.append(output))
    clip.texts(prompts)
    tokens, _, _ = FrozenCLIPText(str(tower), max_tokens=62)(prompts)
    assert torch.allclose(tokens, seen[0], atol=5e-2)  # the weights are stored in float16
    assert torch.nn.functional.cosine_similarity(tokens, seen[0], dim=-1).min() > 0.999


@pytest.mark.slow
def test_the_recipe_trains_and_is_bundled_in_diffusers_layout(tower: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shard(str(shards), count=16, sizes=("64x64",), shard_size=16, workers=1)
    recipe = yaml.safe_load((CONFIGS / "mini_unet.yaml").read_text())
    recipe["model"]["llms"][0]["init_args"]["name"] = str(tower)
    recipe["data"] |= {"train": str(shards), "batch_size": 4, "max_caption_chars": None}
    recipe["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "log_every_n_steps": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run, out = tmp_path / "run", tower.parent
    assert main(["fit", "--config", str(tmp_path / "recipe.yaml"), "--run", str(run)]) == 0
    mini_unet.bundle(str(run / "checkpoints/latest"), str(out), count=1)
    unet = UNet2DConditionModel.from_pretrained(out, subfolder="unet")
    assert unet.config.cross_attention_dim == 64
    found = DDPMScheduler.from_pretrained(out, subfolder="scheduler").alphas_cumprod
    assert torch.allclose(found, DDPM("scaled_linear").alpha_bar[1:].float(), atol=1e-6)


def test_the_adapted_recipe_differs_from_the_base_in_the_model_and_its_steps_alone() -> None:
    base, adapted = (yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("mini_unet", "llmdiff_mini"))
    same = copy.deepcopy(adapted)
    for part in ("llms", "prompt_encoder", "backbone"):
        same["model"][part] = base["model"][part]
    same["trainer"]["max_steps"] = base["trainer"]["max_steps"]
    assert same == base


def test_pictures_are_scored_by_the_prompt_they_carry(tmp_path: Path) -> None:
    draw = ["sample", "a red circle", "--steps", "1", "--out", str(tmp_path / "drawn/a.png")]
    assert main(draw) == 0
    picture_scores.score(str(tmp_path / "drawn"), str(tmp_path / "out"), "bundled:clip", "bundled:siglip")
    scores = yaml.safe_load((tmp_path / "out/scores.json").read_text())
    assert scores["images_scored"] == 1
    assert set(scores["scores"]) == {"clip", "siglip", "clip_iqa"}
    assert 0 <= scores["scores"]["clip_iqa"] <= 1
    with pytest.raises(ValueError, match="there is no PNG in"):
        picture_scores.score(str(tmp_path / "out"), str(tmp_path / "out"), "bundled:clip", "bundled:siglip")
