"""Recipes are constructors' arguments: what ships parses without a weight, and a mistake is named, never ignored."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lidit.callbacks.ema import EMA
from lidit.cli import main
from lidit.data.datamodule import ShardData
from lidit.fit import RecipeCLI
from lidit.module import TextToImage

CONFIGS = Path(__file__).parents[1] / "experiments/configs"
RECIPES = sorted(path.name for path in CONFIGS.glob("*.yaml") if "trainer" in yaml.safe_load(path.read_text()))


class Recipe(LightningCLI):
    """A recipe with what `lidit fit` knows beside Lightning's own keys."""

    add_arguments_to_parser = RecipeCLI.add_arguments_to_parser


def parsed(name: str, *arguments: str) -> LightningCLI:
    """What `lidit fit` would train, with every constructor called and nothing else."""
    return Recipe(
        TextToImage,
        ShardData,
        args=["--config", str(CONFIGS / name), *arguments],
        run=False,
        save_config_callback=None,
        parser_kwargs={"allow_abbrev": False},
        auto_configure_optimizers=False,
    )


def test_the_paper_and_the_miniature_have_recipes() -> None:
    assert {"mini.yaml", "lidit_1b.yaml", "lidit_10b.yaml", "ablation.yaml"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_parses_and_builds_nothing_heavy(name: str) -> None:
    cli = parsed(name)
    assert cli.model.backbone is None
    assert list(cli.model.parameters()) == []
    assert cli.model.vae._model is None
    assert all(llm._model is None for llm in cli.model.llms)
    assert any(isinstance(callback, EMA) for callback in cli.trainer.callbacks)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_by_steps_and_validates_by_steps(name: str) -> None:
    trainer = parsed(name).trainer
    assert trainer.max_steps > 0
    assert trainer.max_epochs == -1
    assert trainer.check_val_every_n_epoch is None
    assert trainer.val_check_interval > 1


MISTAKES = {
    "--model.lerning_rate=1e-3": "learning_rate",  # unknown key: the nearest one is named
    "--model.learn=1e-3": "model.learn",  # an abbreviation is an unknown key
    "--trainer.max_step=3": "max_steps",
    "--model.learning_rate=fast": "model.learning_rate",
    "--data.batch_size=many": "data.batch_size",
    "--model.backbone.init_args.depth=deep": "depth",
    "--model.backbone.init_args.dept=2": "dept",
    "--model.prompt_encoder.init_args.fusion=sum": "fusion",
    "--model.objective.init_args.base=8": "base",
    "--data.trian=x": "train",
}


@pytest.mark.parametrize(("argument", "named"), MISTAKES.items())
def test_a_mistake_on_the_command_line_is_one_line_that_names_the_key(
    argument: str, named: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["fit", "--config", str(CONFIGS / "mini.yaml"), argument]) == 2
    message = capsys.readouterr().err.strip()
    assert message.count("\n") == 0
    assert message.startswith("lidit: error: ")
    assert re.search(rf"\b{re.escape(named)}\b", message)


CHANGES = {
    "unknown key": (("model", "learning_rat"), 1e-3, "learning_rat"),
    "abbreviation": (("data", "batch"), 8, "batch"),
    "wrong type": (("trainer", "max_steps"), "soon", "max_steps"),
    "unknown section": (("modle",), {"learning_rate": 1e-3}, "modle"),
    "wrong type in a list": (("model", "llms", 0, "max_tokens"), "all", "max_tokens"),
    "unknown key in a list": (("model", "llms", 1, "max_token"), 8, "max_token"),
    "unknown callback option": (("trainer", "callbacks", 0, "init_args", "deacy"), 0.9, "deacy"),
    "wrong type of a callback option": (("trainer", "callbacks", 0, "init_args", "decay"), "slow", "decay"),
    "unknown callback": (("trainer", "callbacks", 0, "class_path"), "lidit.callbacks.ema.EMMA", "EMMA"),
    "unknown option of another callback": (("trainer", "callbacks", 1, "init_args", "every"), 5, "every"),
    "wrong choice": (("model", "prompt_encoder", "init_args", "truncate"), "later", "truncate"),
}


@pytest.mark.parametrize(("place", "value", "named"), CHANGES.values(), ids=CHANGES)
def test_a_mistake_in_a_recipe_is_one_line_that_names_the_key(
    place: tuple, value: object, named: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = yaml.safe_load((CONFIGS / "mini.yaml").read_text())
    *path, last = place
    section = recipe
    for key in path:
        section = section[key]
    section[last] = value
    changed = tmp_path / "recipe.yaml"
    changed.write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", str(changed)]) == 2
    message = capsys.readouterr().err.strip()
    assert message.count("\n") == 0
    assert re.search(rf"\b{named}\b", message)
    assert list(tmp_path.iterdir()) == [changed]


def test_a_recipe_that_is_not_there_is_named(capsys: pytest.CaptureFixture) -> None:
    assert main(["fit", "--config", "no/such.yaml"]) == 2
    assert "no/such.yaml" in capsys.readouterr().err
