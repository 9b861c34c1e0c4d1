"""Sets come as often as their weights say, evenly, and from any position on."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.cli import LightningCLI

from lidit.data.datamodule import ShardData
from lidit.data.mix import Mix, Weighted
from lidit.data.stream import Plan, Plans, StreamOrder
from lidit.module import TextToImage
from tests.data.conftest import Table, batches, fit

STARTS = [0, 3000, 4000, 10_000]


def order(weights: list[float] | None, seed: int = 0, replacement: bool = False, **settings: object) -> StreamOrder:
    return StreamOrder(Table(10_000), 50, seed, mix=Mix(STARTS, weights, replacement, seed), **settings)


def epochs(order: StreamOrder, count: int) -> list[Plan]:
    return [order.plan(n) for n in range(count * order.steps_per_epoch)]


def shown(plans: list[Plan]) -> np.ndarray:
    return np.concatenate([plan.samples for plan in plans])


def by_set(samples: np.ndarray) -> np.ndarray:
    return np.histogram(samples, STARTS)[0]


def test_each_set_has_its_share_of_the_samples() -> None:
    mixed = order([0.2, 0.5, 0.3])
    samples = shown(epochs(mixed, 2))
    assert by_set(samples) / len(samples) == pytest.approx([0.2, 0.5, 0.3], abs=0.005)
    assert mixed.mix.times == pytest.approx([2 / 3, 5, 0.5])
    assert len(samples) == pytest.approx(20_000, abs=200)  # as many as the sets have, but for what fills no batch


def test_weights_are_relative() -> None:
    assert shown(epochs(order([2.0, 5.0, 3.0]), 1)).tolist() == shown(epochs(order([0.2, 0.5, 0.3]), 1)).tolist()


def test_without_replacement_no_sample_comes_much_more_often_than_another_of_its_set() -> None:
    mixed = order([0.2, 0.5, 0.3])
    taken = [mixed.mix.take(group, i, e) for e in range(6) for i, group in enumerate(mixed.shapes.values())]
    counts = np.bincount(np.concatenate(taken), minlength=10_000)  # before what fills no batch is left out
    for group in mixed.shapes.values():
        for part, expected in zip(np.split(group, np.searchsorted(group, STARTS[1:-1])), (4, 30, 3), strict=True):
            assert np.ptp(counts[part]) <= 1
            assert counts[part].mean() == pytest.approx(expected, abs=0.01)


def test_half_a_set_an_epoch_is_another_half_the_next() -> None:
    mixed = order([0.2, 0.5, 0.3])
    first, second = (set(shown(epochs(mixed, 1)).tolist()) for mixed in (mixed, mixed))
    assert first == second
    steps = mixed.steps_per_epoch
    later = {int(s) for n in range(steps, 2 * steps) for s in mixed.plan(n).samples}
    in_both = [s for s in first & later if s >= 4000]
    assert len(in_both) < 100  # of 6000, only around what filled no batch


def test_equal_shares_of_what_there_is_are_an_epoch_of_everything() -> None:
    samples = shown(epochs(order([3.0, 1.0, 6.0]), 1))
    assert len(set(samples.tolist())) == len(samples) > 9900


def test_any_position_is_found_without_those_before_it() -> None:
    mixed = order([0.2, 0.5, 0.3])
    whole = [plan.samples.tolist() for plan in epochs(mixed, 3)]
    for start in (0, 1, mixed.steps_per_epoch - 1, mixed.steps_per_epoch, 2 * mixed.steps_per_epoch + 7):
        plans = itertools.islice(Plans(order([0.2, 0.5, 0.3]), position=lambda start=start: start), 3)
        assert [plan.samples.tolist() for plan in plans] == whole[start : start + 3]
    assert len(mixed.plan(1_000_000).samples) == 50


@pytest.mark.parametrize("replacement", [False, True])
def test_ranks_together_show_the_batches_of_one(replacement: bool) -> None:
    one = order([0.2, 0.5, 0.3], replacement=replacement)
    for number in (0, 150, 777):
        parts = [order([0.2, 0.5, 0.3], replacement=replacement).plan(number, rank, 5).samples for rank in range(5)]
        assert np.concatenate(parts).tolist() == one.plan(number).samples.tolist()


def test_every_epoch_has_equally_many_batches_of_one_shape_each() -> None:
    mixed = order([0.2, 0.5, 0.3], dense_probability=0.7)
    table = Table(10_000)
    for plan in epochs(mixed, 3):
        assert len(plan.samples) == 50
        assert len(set(table.column("width")[plan.samples])) == 1


def test_with_replacement_an_epoch_misses_about_a_third() -> None:
    drawn = order(None, replacement=True)
    counts = Counter(shown(epochs(drawn, 1)).tolist())
    assert 1 - len(counts) / 10_000 == pytest.approx(np.exp(-1), abs=0.02)
    assert shown(epochs(drawn, 1)).tolist() == shown(epochs(order(None, replacement=True), 1)).tolist()
    assert shown(epochs(drawn, 2)[drawn.steps_per_epoch :]).tolist() != shown(epochs(drawn, 1)).tolist()


def test_with_replacement_the_shares_hold_too() -> None:
    samples = shown(epochs(order([0.2, 0.5, 0.3], replacement=True), 2))
    assert by_set(samples) / len(samples) == pytest.approx([0.2, 0.5, 0.3], abs=0.005)


def test_no_weights_and_no_replacement_is_the_order_without_a_mix() -> None:
    plain = StreamOrder(Table(10_000), 50)
    assert all(np.array_equal(order(None).plan(n).samples, plain.plan(n).samples) for n in (0, 5, 250))


def test_a_filter_does_not_change_the_shares() -> None:
    mixed = order([0.2, 0.5, 0.3], max_caption_chars=60)
    samples = shown(epochs(mixed, 4))
    assert by_set(samples) / len(samples) == pytest.approx([0.2, 0.5, 0.3], abs=0.02)
    assert Table(10_000).column("caption_chars")[samples].max() <= 60


@pytest.mark.parametrize(
    ("starts", "weights", "reason"),
    [
        ([0, 5, 10], [1.0], "1 weights for 2 sets"),
        ([0, 5, 10], [1.0, 0.0], "weight of a set of shards is 0.0"),
        ([0, 5, 10], [1.0, -2.0], "weight of a set of shards is -2.0"),
        ([0, 5, 10], [1.0, float("nan")], "weight of a set of shards is nan"),
    ],
)
def test_weights_that_mean_nothing_are_refused(starts: list[int], weights: list[float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Mix(starts, weights)


def test_a_set_with_a_weight_and_no_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="set 1 of those with weights has no samples"):
        StreamOrder(Table(1000), 50, mix=Mix([0, 1000, 1000], [1.0, 1.0]))


def weighted(shards: Path, weights: tuple[float, float] = (3.0, 1.0)) -> list[Weighted]:
    parts = (f"{shards}/{{00000..00002}}.tar", [f"{shards}/00003.tar"])
    return [Weighted(part, weight) for part, weight in zip(parts, weights, strict=True)]


def test_a_mix_resumes_exactly_and_says_what_it_is(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"train": weighted(shards), "batch_size": 4}
    with caplog.at_level("INFO"):
        whole = fit(ShardData(**settings), tmp_path / "whole", 20).seen
    first = fit(ShardData(**settings), tmp_path / "parts", 9).seen
    rest = fit(ShardData(**settings), tmp_path / "parts", 20).seen
    assert first + rest == whole
    assert "an epoch shows a sample of each set 0.938, 1.25 times on average" in caplog.text
    keys = [int(entry.split()[0]) for batch in whole for entry in batch]
    assert sum(key >= 48 for key in keys) / len(keys) == pytest.approx(0.25, abs=0.06)


@pytest.mark.parametrize(
    "change",
    [{"train": (1.0, 1.0)}, {"replacement": True}, {"shuffle_window": 2}],
    ids=lambda change: next(iter(change)),
)
def test_a_checkpoint_of_another_mix_is_refused(shards: Path, tmp_path: Path, change: dict) -> None:
    settings = {"train": weighted(shards), "batch_size": 4}
    fit(ShardData(**settings), tmp_path, 3)
    if "train" in change:
        change = {"train": weighted(shards, change["train"])}
    with pytest.raises(ValueError, match=r"another order of the data \((weights|replacement|shuffle_window) was"):
        fit(ShardData(**settings | change), tmp_path, 6)


def test_a_checkpoint_from_before_there_were_mixes_is_resumed(shards: Path) -> None:
    data = ShardData(str(shards), batch_size=8)
    names = ("batch_size", "seed", "dense_probability", "max_caption_chars", "shards")
    data.setup("fit")
    state = data.state_dict()
    state["order"] = {name: state["order"][name] for name in names}
    data.load_state_dict({"batches": 9} | {"order": state["order"]})
    assert next(iter(data.train_dataloader())).key == batches(ShardData(str(shards), batch_size=8), 10)[9].key


def test_a_recipe_names_sets_and_weights(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data:\n  train:\n  - {shards: a, weight: 0.7}\n  - {shards: [b, 's3://c/d'], weight: 3}\n")
    base = Path(__file__).parents[2] / "experiments/configs/mini.yaml"
    cli = LightningCLI(
        TextToImage,
        ShardData,
        args=["--config", str(base), "--config", str(recipe)],
        run=False,
        save_config_callback=None,
        auto_configure_optimizers=False,
    )
    assert cli.datamodule.train == [Weighted("a", 0.7), Weighted(["b", "s3://c/d"], 3.0)]
