"""A run's record says what it was made with and how long all its starts together took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lidit.callbacks.provenance import Provenance, commit, machine
from lidit.cli import main


@pytest.fixture
def recipe(tiny_recipe: Path, tmp_path: Path) -> Path:
    given = yaml.safe_load(tiny_recipe.read_text())
    given["data"].pop("val")
    given["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path / "logs")
    given["trainer"]["callbacks"] = [
        given["trainer"]["callbacks"][0],
        {"class_path": "lidit.callbacks.checkpoints.Checkpoints", "init_args": {"every_n_steps": 2}},
        {"class_path": "lidit.callbacks.provenance.Provenance", "init_args": {"every_n_steps": 1}},
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(given))
    return path


def test_steps_seconds_versions_and_machine_are_kept_and_a_second_start_adds_up(recipe: Path, tmp_path: Path) -> None:
    def record(steps: int) -> dict:
        run = ["--run", str(tmp_path / "run"), "--resume", "auto", "--trainer.max_steps", str(steps)]
        assert main(["fit", "--config", str(recipe), *run]) == 0
        return json.loads((tmp_path / "run/record.json").read_text())

    first, second = record(2), record(4)
    assert (first["steps"], second["steps"]) == (2, 4)
    assert second["seconds"] >= first["seconds"] > 0
    assert {"torch", "transformers"} <= set(first["versions"])
    assert first["machine"] == machine(1)
    assert first["commit"] == commit()
    again = record(4)
    assert (again["steps"], again["seconds"]) == (4, pytest.approx(second["seconds"], abs=0.5))


def test_a_number_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps of Provenance is 0"):
        Provenance(0)
