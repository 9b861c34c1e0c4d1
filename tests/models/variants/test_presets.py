"""How other systems read an LLM, by name: what the page says, over any recipe, and what the command line changes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from lidit.cli import main
from lidit.models.prompt_encoder import PromptEncoder
from lidit.models.refiners import CollaborativeRefiner
from lidit.models.variants.encoder import VariantEncoder
from lidit.models.variants.presets import PRESETS
from lidit.plan import read

PAGE = Path(__file__).parents[3] / "docs/prompt_encoders.md"


def test_every_preset_is_explained_with_its_source() -> None:
    page = PAGE.read_text()
    assert re.findall(r"^## `([\w-]+)`$", page, re.MULTILINE) == list(PRESETS)
    for preset in PRESETS.values():
        assert preset.source in page


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains(name: str, tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = yaml.safe_load(tiny_recipe.read_text())
    recipe["model"]["llms"] = [{"name": f"bundled:llm_{llm}", "dtype": "float32"} for llm in ("llama", "qwen")]
    recipe["model"]["backbone"]["init_args"]["depth"] = 6
    recipe["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path)
    recipe["trainer"] |= {"callbacks": [], "enable_checkpointing": False, "max_steps": 2, "limit_val_batches": 0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", str(tmp_path / "recipe.yaml"), "--preset", name]) == 0
    (saved,) = tmp_path.rglob("config.yaml")
    kept = yaml.safe_load(saved.read_text())
    model = kept["model"]
    assert kept["preset"] is None  # its settings are there instead, whatever it may mean later
    assert PRESETS[name].prompt_encoder.items() <= model["prompt_encoder"]["init_args"].items()
    assert PRESETS[name].backbone.items() <= model["backbone"]["init_args"].items()
    assert all(PRESETS[name].llm.items() <= llm["init_args"].items() for llm in model["llms"])


def test_a_preset_that_does_not_exist_lists_those_that_do(tiny_recipe: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["fit", "--config", str(tiny_recipe), "--preset", "hunian"]) == 1
    assert "there is no preset 'hunian'; the presets are li-dit, hunyuan" in capsys.readouterr().err


def test_a_preset_for_llms_is_refused_with_a_t5(tiny_recipe: Path, capsys: pytest.CaptureFixture) -> None:
    t5 = '[{"class_path": "lidit.models.t5.FrozenT5", "init_args": {"name": "x"}}]'
    chosen = ["--preset", "krea", "--model.llms", t5]
    assert main(["fit", "--config", str(tiny_recipe), *chosen]) == 1
    assert (
        "preset krea sets levels of every LLM, and lidit.models.t5.FrozenT5 in the recipe has none"
        in capsys.readouterr().err
    )


def table() -> dict[str, list[str]]:
    """The page's table: a preset's cells after its name."""
    rows = [line.strip("| ").split("|") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("recipe", ["mini", "mini_ablation"])
def test_over_a_recipe_a_preset_is_what_the_page_says(name: str, recipe: str) -> None:
    chosen = ["--config", f"experiments/configs/{recipe}.yaml", "--preset", name]
    two = [] if recipe == "mini" else ["--model.llms", '[{"name": "bundled:llm_llama"}, {"name": "bundled:llm_qwen"}]']
    _, model = read([*chosen, *two])
    with torch.device("meta"):
        _, encoder = model.build()
    _, instruction, cut, refiner, _, fusion, once = table()[name]
    assert [bool(llm.prompts.instruction) for llm in model.llms] == [instruction == "sentence"] * 2
    assert encoder.timeless == (once == "yes")
    if cut:
        where = encoder.truncate if isinstance(encoder, VariantEncoder) else "after"
        assert where == {"kept": "never"}.get(cut, cut)
    assert name != "li-dit" or type(encoder) is PromptEncoder
    assert len(encoder.refiners[0].blocks) == (0 if refiner == "none" else 2)
    assert isinstance(encoder.fusion, CollaborativeRefiner) == (fusion == "collaborative")


def test_what_the_command_line_sets_beside_a_preset_stays_and_is_named(
    tiny_recipe: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    changed = ["--preset=hunyuan", "--model.prompt_encoder.pool=linear"]
    changed += ["--model.prompt_encoder.fusion=collaborative", "--trainer.max_steps=0"]
    changed += [f"--trainer.logger.init_args.save_dir={tmp_path}"]
    with caplog.at_level("INFO"):
        assert main(["fit", "--config", str(tiny_recipe), *changed]) == 0
    said = caplog.text.replace(" (as on the command line)", "*")
    assert "Preset hunyuan (HunyuanVideo" in said
    assert {"truncate=before", "pool=linear*", "fusion=collaborative*"} <= set(said.replace("\n", " ").split(", ")) | {
        part.rpartition(" ")[2] for part in said.split(", ")
    }
    (saved,) = tmp_path.rglob("config.yaml")
    again = ["fit", "--config", str(saved), "--trainer.max_steps=0"]
    assert main(again) == 0  # the saved recipe is the run's: the preset is not laid over what was changed
    kept = [yaml.safe_load(path.read_text())["model"]["prompt_encoder"] for path in tmp_path.rglob("config.yaml")]
    assert kept[0] == kept[-1]


def test_a_preset_in_a_recipe_is_laid_over_it_and_the_command_line_over_the_preset(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    recipe = yaml.safe_load(tiny_recipe.read_text()) | {"preset": "hunyuan"}
    recipe["model"]["prompt_encoder"]["init_args"] |= {"gating": False, "fusion": "collaborative"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    _, model = read(["--config", str(tmp_path / "recipe.yaml"), "--model.prompt_encoder.refiner_depth=1"])
    _, encoder = model.build()
    assert encoder.truncate == "before"
    assert encoder.refiners[0].blocks[0].gates is not None  # the preset's
    assert len(encoder.refiners[0].blocks) == 1  # the command line's
    assert encoder.norms[0].whiten  # the recipe's: no preset is about it


def test_llms_of_the_command_line_are_read_as_the_preset_says_but_for_what_they_name(tiny_recipe: Path) -> None:
    llms = '[{"name": "bundled:llm_llama"}, {"name": "bundled:llm_qwen", "layer": -2}]'
    _, model = read(["--config", str(tiny_recipe), "--preset", "sana", "--model.llms", llms])
    assert [llm.layer for llm in model.llms] == [-1, -2]


def test_a_preset_over_an_encoder_of_ones_own_is_refused(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(tiny_recipe.read_text())
    recipe["model"]["prompt_encoder"] = {
        "class_path": "lidit.models.llmdiff.LLMDiffEncoder",
        "init_args": {"levels": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match="the recipe's prompt_encoder is lidit.models.llmdiff.LLMDiffEncoder"):
        read(["--config", str(tmp_path / "recipe.yaml"), "--preset", "plain"])
