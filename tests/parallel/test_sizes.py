"""The paper's sizes on a cluster that is not there: overlays, and what each rank of the sharding plan holds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from lidit.fit import run
from lidit.models.source import sizes_alone
from lidit.parallel import BYTES_PER_PARAMETER, choose, shard, units
from lidit.plan.costs import ranks as ranks_of
from lidit.plan.memory import GB
from lidit.plan.plan import ROOM, read
from lidit.strategy import Sharded
from tests.plan.stages import CONFIGS, STAGES, laid_out, words

BUDGET = 3.5e9  # bytes of weights, gradients, optimizer and average on each of 64 ranks of the 10B
GPU = 80e9


def overlay(name: str) -> Path:
    return CONFIGS / "cluster" / f"{name}.yaml"


def test_every_overlay_is_of_a_stage() -> None:
    assert {path.stem for path in (CONFIGS / "cluster").glob("*.yaml")} == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_an_overlay_lies_over_its_recipe(name: str) -> None:
    here = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1", "--print_config"]
    with pytest.raises(SystemExit) as stop:
        run("fit", words(STAGES[name].recipes, name) + here)
    assert stop.value.code == 0


@pytest.mark.parametrize("name", STAGES)
def test_a_step_is_of_the_papers_batch_and_divides_over_the_ranks(name: str) -> None:
    given, _ = read(words(STAGES[name].recipes, name))
    trainer, size, ranks = given.trainer, given.data.batch_size, ranks_of(given.trainer)
    assert size * trainer.accumulate_grad_batches == STAGES[name].batch
    assert size % ranks == 0
    if isinstance(trainer.strategy, Sharded):
        assert ranks % trainer.strategy.replicate == 0


@pytest.mark.parametrize("name", STAGES)
def test_an_overlay_starts_the_ranks_that_it_says_and_explains_compilation(name: str) -> None:
    given, text = read(words(STAGES[name].recipes, name))[0], overlay(name).read_text()
    assert f"--nodes {given.trainer.num_nodes} --gpus-per-node {given.trainer.devices} " in text
    assert given.parallel.compile
    assert given.parallel.compile_backend == "inductor"
    assert "\n# compile: inductor " in text
    assert all(f"--config experiments/configs/{recipe}.yaml" in text for recipe in STAGES[name].recipes)
    assert f"--config experiments/configs/cluster/{name}.yaml" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_the_expected_memory_is_the_one_that_is_counted_and_fits(name: str, no_hub: None) -> None:
    recipes, pixels, _ = STAGES[name]
    _, _, plan, _ = laid_out(recipes, name, pixels)
    stated = re.search(r"Expected per GPU: (\d+) GB", overlay(name).read_text())
    assert int(stated[1]) == pytest.approx(plan.total / GB, abs=1)
    assert plan.total < ROOM * GPU  # what NCCL and the allocator take is not counted


@pytest.fixture
def pretended_ranks() -> Iterator[int]:
    """A process group of 64 of which this process is the first, without the others."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=64)
    yield 64
    torch.distributed.destroy_process_group()


def test_no_rank_of_64_holds_more_of_the_10b_than_its_budget(pretended_ranks: int, no_hub: None) -> None:
    mesh = init_device_mesh("cpu", (pretended_ranks,), mesh_dim_names=("shard",))
    _, model = read(words(("lidit_10b",)))
    with sizes_alone():
        skeleton = model.skeleton()
    backbone, encoder = skeleton["backbone"], skeleton["prompt_encoder"]
    whole = sum(p.numel() for part in (backbone, encoder) for p in part.parameters())
    assert whole > 10e9
    shard(units(backbone, encoder), mesh, torch.bfloat16)
    # no rank's share of a weight is larger than that of the first, to which the rows that remain are given
    first = sum(p.to_local().numel() for part in (backbone, encoder) for p in part.parameters())
    assert whole / pretended_ranks <= first
    assert first * sum(BYTES_PER_PARAMETER.values()) <= BUDGET


def test_a_model_that_fits_on_each_rank_is_not_sharded() -> None:
    name, why = choose(parameters=1_100_000_000, ema=True, memory=int(GPU))
    assert name == "ddp"
    assert "22.0 GB, within 60% of a device's 80.0 GB" in why
    assert choose(1_100_000_000, True, int(GPU), others=int(27.5e9))[0] == "sharded"  # beside two frozen LLMs
    assert choose(10_500_000_000, False, int(GPU))[0] == "sharded"
