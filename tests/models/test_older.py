"""What earlier versions wrote still loads: exports predict what they did then, and recipes mean what they did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lidit.models.lidit import LIDiT
from lidit.models.older import updated, updated_model
from lidit.models.prompt_encoder import PromptEncoder
from lidit.models.variants.backbone import VariantLIDiT
from lidit.models.variants.encoder import VariantEncoder
from lidit.pipeline import Pipeline

OLDER = Path(__file__).parent / "older"  # exports of version 0.1.0, with what each predicted
PROMPTS = ["a red circle", "two blue squares above a green star"]
CLASSES = {
    "li-dit": (PromptEncoder, LIDiT),
    "kandinsky": (VariantEncoder, LIDiT),
    "layerwise": (VariantEncoder, VariantLIDiT),
}


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_an_export_of_before_predicts_what_it_did(name: str) -> None:
    model = Pipeline.load(str(OLDER / name)).model
    assert (type(model.prompt_encoder), type(model.backbone)) == CLASSES[name]
    then = load_file(OLDER / name / "prediction.safetensors")
    now = model.predict(then["x"], torch.tensor([0.3, 0.8]), model.encode_prompts(PROMPTS))
    torch.testing.assert_close(now, then["prediction"], atol=1e-4, rtol=1e-4)


def test_the_bundled_models_configuration_is_of_a_version_before() -> None:
    config = json.loads((Path(__file__).parents[2] / "lidit/assets/lidit/config.json").read_text())["model"]
    assert config["prompt_encoder"]["class_path"] == "lidit.models.prompt_encoder.PromptEncoder"
    now = updated_model(config)["prompt_encoder"]
    assert now["class_path"] == "lidit.models.variants.encoder.VariantEncoder"
    assert now["init_args"]["truncate"] == "before"


def encoder(**arguments: object) -> dict:
    return {"class_path": "lidit.models.prompt_encoder.PromptEncoder", "init_args": arguments}


def test_what_lidit_has_is_left_out_and_anything_else_keeps_its_meaning() -> None:
    plain = encoder(heads=2, truncate="after", positions=False, levels=1, mix="together", pool="linear", preset=None)
    assert updated({"model": {"prompt_encoder": plain}}) == {"model": {"prompt_encoder": encoder(heads=2)}}
    pooled = updated({"model": {"prompt_encoder": encoder(heads=2, pool="mlp")}})["model"]["prompt_encoder"]
    assert pooled == {
        "class_path": "lidit.models.variants.encoder.VariantEncoder",
        "init_args": {"heads": 2, "pool": "mlp"},
    }


def test_a_preset_among_the_encoders_arguments_leaves_what_the_recipe_sets_otherwise_than_by_default() -> None:
    """As it did then; a preset of today is laid over all of the recipe."""
    recipe = {
        "model": {
            "prompt_encoder": encoder(preset="hunyuan", heads=4, fusion="collaborative", refiner_depth=2),
            "llms": [{"name": "a", "layer": -2}, {"name": "b"}],
            "backbone": {"class_path": "lidit.models.lidit.LIDiT", "init_args": {"depth": 3}},
        }
    }
    now = updated(recipe)
    assert "preset" not in now
    assert now["model"]["prompt_encoder"]["class_path"] == "lidit.models.variants.encoder.VariantEncoder"
    arguments = now["model"]["prompt_encoder"]["init_args"]
    assert (arguments["truncate"], arguments["pool"], arguments["fusion"]) == ("before", "mlp", "collaborative")
    assert arguments["heads"] == 4
    assert [llm["init_args"]["layer"] for llm in now["model"]["llms"]] == [-2, -3]
    assert recipe["model"]["prompt_encoder"]["init_args"]["preset"] == "hunyuan"  # the given one is as it was


@pytest.mark.parametrize(
    ("arguments", "levels"),
    [({"mix": "per_block"}, 1), ({"mix": "per_block", "levels": 3}, 3), ({"mix": "weights"}, 1)],
)
def test_the_backbone_is_told_of_levels_only_where_there_are_several(arguments: dict, levels: int) -> None:
    backbone = {"class_path": "lidit.models.lidit.LIDiT", "init_args": {"depth": 2}}
    now = updated_model({"prompt_encoder": encoder(**arguments), "backbone": backbone})["backbone"]
    assert now["init_args"].get("levels", 1) == levels
    own = {"class_path": "mine.Backbone", "init_args": {}}
    assert updated_model({"prompt_encoder": encoder(**arguments), "backbone": own})["backbone"] == own


@pytest.mark.parametrize("mix", ["weights", "attention", "per_block"])
def test_one_level_that_is_mixed_has_the_weights_it_had(mix: str) -> None:
    settings = {"refiner_depth": 0, "fusion": "concat"}
    names = VariantEncoder([32], 16, heads=2, mix=mix, **settings).state_dict()
    assert any(name.startswith("project.0.") and name.count(".") > 2 for name in names) or mix == "per_block"
    assert "project.0.weight" not in names


def test_an_llm_without_a_class_that_reads_several_states_gets_one() -> None:
    llms = updated_model({"llms": [{"name": "a", "levels": 6}, {"name": "b", "levels": 1}, {"name": "c"}]})["llms"]
    assert llms[0] == {"class_path": "lidit.models.variants.llm.MultiLevelLLM", "init_args": {"name": "a", "levels": 6}}
    assert llms[1:] == [{"name": "b"}, {"name": "c"}]


@pytest.mark.parametrize("part", [None, "mine.Encoder", {"class_path": "mine.Encoder", "init_args": {"levels": 3}}, 3])
def test_what_it_does_not_know_comes_back_as_it_was(part: object) -> None:
    assert updated({"model": {"prompt_encoder": part}}) == {"model": {"prompt_encoder": part}}
