"""How other systems read an LLM, by name: what the page says, over any recipe, and what the command line changes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from lidit.cli import main
from lidit.fit import read_recipe
from lidit.models.prompt_encoder import PromptEncoder
from lidit.models.refiners import CollaborativeRefiner
from lidit.models.variants.encoder import VariantEncoder
from lidit.models.variants.presets import PRESETS
from lidit.recipe import completed

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
    _, model, _ = read_recipe([*chosen, *two])
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
    _, model, _ = read_recipe(["--config", str(tmp_path / "recipe.yaml"), "--model.prompt_encoder.refiner_depth=1"])
    _, encoder = model.build()
    assert encoder.truncate == "before"
    assert encoder.refiners[0].blocks[0].gates is not None  # the preset's
    assert len(encoder.refiners[0].blocks) == 1  # the command line's
    assert encoder.norms[0].whiten  # the recipe's: no preset is about it


def test_llms_of_the_command_line_are_read_as_the_preset_says_but_for_what_they_name(tiny_recipe: Path) -> None:
    llms = '[{"name": "bundled:llm_llama"}, {"name": "bundled:llm_qwen", "layer": -2}]'
    _, model, _ = read_recipe(["--config", str(tiny_recipe), "--preset", "sana", "--model.llms", llms])
    assert [llm.layer for llm in model.llms] == [-1, -2]


def test_a_preset_over_an_encoder_of_ones_own_is_refused(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(tiny_recipe.read_text())
    recipe["model"]["prompt_encoder"] = {
        "class_path": "lidit.models.llmdiff.LLMDiffEncoder",
        "init_args": {"levels": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match="the recipe's prompt_encoder is lidit.models.llmdiff.LLMDiffEncoder"):
        read_recipe(["--config", str(tmp_path / "recipe.yaml"), "--preset", "plain"])


def files(folder: Path, tiny_recipe: Path, **more: str) -> list[str]:
    """The tiny recipe and further files, by name, each as a path."""
    (folder / "b.yaml").write_text(tiny_recipe.read_text())
    for name, text in more.items():
        (folder / f"{name}.yaml").write_text(text)
    return [str(folder / f"{name}.yaml") for name in ("b", *more)]


@pytest.mark.parametrize("option", ["--config", "-c"])
def test_further_files_change_parts_that_the_preset_then_overrides(
    option: str, tiny_recipe: Path, tmp_path: Path
) -> None:
    more = {"heads": "model: {prompt_encoder: {init_args: {heads: 4}}, backbone: {init_args: {depth: 3}}}\n"}
    first, second = files(tmp_path, tiny_recipe, **more)
    _, model, _ = read_recipe([option, first, option, second, "--preset", "sana"])
    backbone, encoder = model.build()
    assert encoder.truncate == "never"
    assert (backbone.text_norm.weight == 0.01).all()
    assert len(backbone.blocks) == 3


@pytest.mark.parametrize("place", [0, 2, 4])
def test_the_command_line_stands_over_the_preset_wherever_its_words_are(
    place: int, tiny_recipe: Path, tmp_path: Path
) -> None:
    (path,) = files(tmp_path, tiny_recipe)
    words = ["--config", path, "--preset", "hunyuan"]
    _, model, _ = read_recipe([*words[:place], "--model.prompt_encoder.pool=linear", *words[place:]])
    _, encoder = model.build()
    assert isinstance(encoder.pool[0], torch.nn.Linear)
    assert encoder.truncate == "before"


def test_a_printed_recipe_is_the_run_that_printed_it(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (path,) = files(tmp_path, tiny_recipe)
    changed = ["--preset=hunyuan", "--model.prompt_encoder.pool=linear", "--print_config"]
    assert main(["fit", "--config", path, *changed]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["preset"] is None
    assert printed["model"]["prompt_encoder"]["init_args"]["pool"] == "linear"


def test_a_recipe_may_name_its_parts_in_other_files_beside_it(tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(tiny_recipe.read_text())
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(recipe["model"]))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"model": "model.yaml", "preset": "hunyuan"}))
    _, model, _ = read_recipe(["--config", str(tmp_path / "recipe.yaml")])
    assert model.build()[1].truncate == "before"


def test_a_file_may_hold_a_preset_alone(tiny_recipe: Path, tmp_path: Path) -> None:
    first, second = files(tmp_path, tiny_recipe, alone="preset: hunyuan\n")
    words, name = completed(["--config", first, "--config", second])
    assert name == "hunyuan"
    assert words[:3] == ["--config", first, "--config"]
    assert yaml.safe_load(words[3]) == {}  # its settings, which follow, take its place


@pytest.mark.parametrize("none", ["--preset=null", "--preset=~", "--preset="])
def test_a_recipes_preset_can_be_left_out_on_the_command_line(none: str, tiny_recipe: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(tiny_recipe.read_text()) | {"preset": "hunyuan"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    _, model, _ = read_recipe(["--config", str(tmp_path / "recipe.yaml"), none])
    assert type(model.build()[1]) is PromptEncoder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"preset": ["a"]}, "there is no preset"),
        ({"preset": "plain", "model": 3}, "model"),
        ({"preset": "plain", "prompt_encoder": [1]}, "prompt_encoder"),
        ({"preset": "plain", "backbone": {"class_path": [1]}}, "backbone"),
    ],
)
def test_a_broken_recipe_with_a_preset_is_one_line(
    change: dict, said: str, tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = yaml.safe_load(tiny_recipe.read_text())
    for key, value in change.items():
        (recipe if key in ("preset", "model") else recipe["model"])[key] = value
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", str(tmp_path / "recipe.yaml")]) in (1, 2)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lidit: error")]
    assert len(error) == 1
    assert said in error[0]


def test_the_old_place_of_a_preset_on_the_command_line_says_the_new_one(
    tiny_recipe: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["fit", "--config", str(tiny_recipe), "--model.prompt_encoder.preset=hunyuan"]) == 1
    assert "say --preset NAME" in capsys.readouterr().err
