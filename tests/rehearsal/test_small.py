"""Only sizes of a recipe become small, by the rule of lidit/rehearsal/small.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lidit.fit import unstarted
from lidit.models.source import sizes_alone
from lidit.rehearsal.rehearse import strangers
from lidit.rehearsal.small import Ranks, changes, ranks_of, shapes, small

CONFIGS = Path("experiments/configs")


def whole(*files: str, more: tuple[str, ...] = ()) -> dict[str, Any]:
    with sizes_alone():
        argv = [word for file in files for word in ("--config", str(CONFIGS / file))]
        return yaml.safe_load(unstarted([*argv, *more]).text())


@pytest.mark.parametrize(
    ("trainer", "ranks"),
    [
        (
            {"devices": 8, "num_nodes": 64, "strategy": {"class_path": "x.Sharded", "init_args": {"replicate": 8}}},
            (2, 2),
        ),
        (
            {"devices": 8, "num_nodes": 1, "strategy": {"class_path": "x.Sharded", "init_args": {"replicate": 1}}},
            (1, 2),
        ),
        ({"devices": 8, "num_nodes": 1, "strategy": "sharded"}, (1, 2)),
        ({"devices": 8, "num_nodes": 1, "strategy": "ddp"}, (2, 1)),
        ({"devices": "auto", "num_nodes": 1, "strategy": "auto"}, (2, 1)),
        ({"devices": 1, "num_nodes": 1, "strategy": "auto"}, (1, 1)),
    ],
)
def test_the_mesh_keeps_its_shape(trainer: dict[str, Any], ranks: tuple[int, int]) -> None:
    assert ranks_of(trainer) == Ranks(*ranks)


def test_on_gpus_there_are_as_many_ranks_as_gpus() -> None:
    assert [Ranks(2, 2).within(gpus).all for gpus in (0, 1, 2, 3, 4, 8)] == [4, 1, 2, 2, 4, 4]


def test_precision_strategy_accumulation_callbacks_and_optimizer_stay(tmp_path: Path) -> None:
    recipe = whole("lidit_10b.yaml", "lidit_10b_1024.yaml", "cluster/lidit_10b_1024.yaml")
    made = small(recipe, tmp_path, pixels=1024)
    before, after = recipe["trainer"], made["trainer"]
    for key in ("precision", "gradient_clip_val", "accumulate_grad_batches", "logger", "check_val_every_n_epoch"):
        assert after[key] == before[key], key
    assert [c["class_path"] for c in after["callbacks"]] == [c["class_path"] for c in before["callbacks"]]
    assert after["strategy"] == {
        "class_path": "lidit.strategy.Sharded",
        "init_args": {"replicate": 2, "timeout": 1800.0},
    }
    assert made["model"]["optimizer"] == recipe["model"]["optimizer"]
    changed = {line.partition(":")[0].rpartition(".")[2] for line in changes(recipe, made)}
    assert changed == {
        *("accelerator", "devices", "num_nodes", "replicate", "max_steps", "val_check_interval", "limit_val_batches"),
        *("log_every_n_steps", "enable_progress_bar", "every_n_steps", "prompts", "steps", "batch_size"),
        *(
            "enable_checkpointing",
            "short",
            "dense",
            "pretrained",
            "warmup_batches",
            "name",
            "depth",
            "width",
            "heads",
            "base_size",
        ),
        *("warmup_steps", "num_workers", "shuffle_window", "shard_cache", "compile_backend"),
    }


def test_the_backbone_and_the_llms_are_small_and_tapped_where_they_were(tmp_path: Path) -> None:
    made = small(whole("lidit_1b.yaml"), tmp_path, pixels=256)
    sizes = made["model"]["backbone"]["init_args"]
    assert {key: sizes[key] for key in ("depth", "width", "heads", "patch")} == {
        "depth": 2,
        "width": 64,
        "heads": 4,
        "patch": 2,
    }
    assert [llm["init_args"]["layer"] for llm in made["model"]["llms"]] == [-3, -3]
    assert made["model"]["objective"]["init_args"]["base_size"] == 8  # 64 px are its 256 px


def test_a_preset_stays(tmp_path: Path) -> None:
    recipe = whole("lidit_1b.yaml", more=("--preset", "layer-mix"))
    made = small(recipe, tmp_path, pixels=256)
    for part in ("prompt_encoder", "backbone"):
        assert made["model"][part]["class_path"] == recipe["model"][part]["class_path"]
    levels = [llm["init_args"]["levels"] for llm in made["model"]["llms"]]
    assert levels == [llm["init_args"]["levels"] for llm in recipe["model"]["llms"]]


def test_remote_windowed_and_cached_data_stay_so(tmp_path: Path) -> None:
    recipe = whole("lidit_1b.yaml")
    assert recipe["data"]["shuffle_window"] == 64
    made = small(recipe, tmp_path, pixels=256)
    assert made["data"]["shuffle_window"] == 2
    assert made["data"]["shard_cache"] == str(tmp_path / "shard_cache")


def test_shapes_are_multiples_of_a_patch_in_the_recipe_s_aspects() -> None:
    assert shapes(16, []) == [(64, 64), (80, 48), (48, 80)]
    assert shapes(64, []) == [(64, 64), (128, 64), (64, 128)]
    assert shapes(16, [(1024, 1024), (1536, 640), (640, 1536)]) == [(64, 64), (96, 48), (48, 96)]


def test_modules_of_one_s_own_are_the_ones_to_trust() -> None:
    recipe = {"a": {"class_path": "lidit.x.Y"}, "b": [{"class_path": "mine.net.Net", "init_args": {}}]}
    assert strangers(recipe) == ["mine.net"]
