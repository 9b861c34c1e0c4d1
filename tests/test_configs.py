"""Recipes are constructors' arguments: what ships parses without a weight, and a mistake is named, never ignored."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace

from lidit.callbacks.ema import EMA
from lidit.cli import main
from lidit.fit import read_recipe
from lidit.module import TextToImage

CONFIGS = Path(__file__).parents[1] / "experiments/configs"
RECIPES = sorted(path.name for path in CONFIGS.glob("*.yaml") if "trainer" in yaml.safe_load(path.read_text()))


def parsed(name: str) -> tuple[Namespace, TextToImage]:
    """What `lidit fit` would train, with every constructor called and nothing else."""
    given, model, _ = read_recipe(["--config", str(CONFIGS / name)])
    return given, model


def test_the_paper_and_the_miniature_have_recipes() -> None:
    assert {"mini.yaml", "lidit_1b.yaml", "lidit_10b.yaml", "ablation.yaml"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_parses_and_builds_nothing_heavy(name: str) -> None:
    given, model = parsed(name)
    assert model.backbone is None
    assert list(model.parameters()) == []
    assert model.vae._model is None
    assert all(llm._model is None for llm in model.llms)
    assert any(isinstance(callback, EMA) for callback in given.trainer.callbacks)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_by_steps_and_validates_by_steps(name: str) -> None:
    trainer = parsed(name)[0].trainer
    assert trainer.max_steps > 0
    assert trainer.max_epochs == -1
    assert trainer.check_val_every_n_epoch is None
    assert trainer.val_check_interval > 1


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_reading_a_recipe_makes_and_looks_for_nothing(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--run", "runs/new", "--ckpt_path", "nowhere.ckpt", "--trainer.accelerator", "gpu", "--asked", "3"]
    given, model, data = read_recipe(
        ["--config", str(CONFIGS / "mini.yaml"), *words], lambda parser: parser.add_argument("--asked", type=int), verb
    )
    assert given.asked == 3
    assert model.backbone is None
    assert data.batch_size == 128
    assert list(tmp_path.iterdir()) == []


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
