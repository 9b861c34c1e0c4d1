"""The order is a function of (seed, epoch, position): no repeats, no lost samples, any number of ranks."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import pytest

from lidit.data.index import ShardIndex
from lidit.data.stream import OnePass, Plan, Plans, StreamOrder
from tests.data.conftest import Table


@pytest.fixture(scope="module")
def index(shards: Path) -> ShardIndex:
    return ShardIndex(str(shards))


def epoch(order: StreamOrder, number: int = 0) -> list[Plan]:
    steps = order.steps_per_epoch
    return [order.plan(n) for n in range(number * steps, (number + 1) * steps)]


def shown(plans: list[Plan]) -> list[int]:
    return [int(sample) for plan in plans for sample in plan.samples]


def test_captions_of_a_batch_are_of_similar_length() -> None:
    table = Table(6400, dense=0.0)
    plans = epoch(StreamOrder(table, 32))
    spreads = [np.ptp(table.column("caption_chars")[plan.samples]) for plan in plans]
    assert np.mean(spreads) < 0.25 * np.ptp(table.column("caption_chars"))


def test_an_epoch_shows_no_sample_twice_and_leaves_out_what_it_says(index: ShardIndex) -> None:
    order = StreamOrder(index, 8)
    for number in range(4):
        seen = shown(epoch(order, number))
        assert len(set(seen)) == len(seen) == len(index) - order.left_out
    assert order.left_out == 4  # 40 = 5 batches of 8; 20 = 2 batches and 4


def test_every_sample_is_shown_in_some_epoch(index: ShardIndex) -> None:
    order = StreamOrder(index, 8)
    assert set(shown([plan for number in range(6) for plan in epoch(order, number)])) == set(range(len(index)))


def test_a_batch_holds_one_shape_and_one_kind_of_caption(index: ShardIndex) -> None:
    order = StreamOrder(index, 4)
    for plan in epoch(order):
        assert len(np.unique(index.column("width")[plan.samples])) == 1
    assert {plan.dense for plan in epoch(order)} == {True, False}


def test_epochs_differ_and_shapes_are_mixed(index: ShardIndex) -> None:
    order = StreamOrder(index, 4)
    first, second = epoch(order, 0), epoch(order, 1)
    assert shown(first) != shown(second)
    widths = [int(index.column("width")[plan.samples[0]]) for plan in first]
    assert widths not in (sorted(widths), sorted(widths, reverse=True))


def test_the_same_seed_gives_the_same_order_and_another_seed_another(index: ShardIndex) -> None:
    orders = [shown(epoch(StreamOrder(index, 8, seed=seed))) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_dense_captions_have_their_share(share: float) -> None:
    order = StreamOrder(Table(1000), 16, dense_probability=share)
    kinds = [plan.dense for number in range(50) for plan in epoch(order, number)]
    assert np.mean(kinds) == pytest.approx(share, abs=0.02)


def test_each_sample_is_sometimes_shown_with_either_caption() -> None:
    order = StreamOrder(Table(200), 10)
    kinds: dict[int, set[bool]] = {}
    for plan in (plan for number in range(20) for plan in epoch(order, number)):
        for sample in plan.samples:
            kinds.setdefault(int(sample), set()).add(plan.dense)
    assert all(kind == {True, False} for kind in kinds.values())


def test_a_sample_without_a_dense_caption_is_never_shown_with_one() -> None:
    table = Table(1000, dense=0.4)
    order = StreamOrder(table, 16, dense_probability=0.9)
    plans = epoch(order)
    assert all(table.column("dense_chars")[plan.samples].all() for plan in plans if plan.dense)
    assert len(set(shown(plans))) == order.steps_per_epoch * 16


def test_captions_are_dropped_at_their_rate_and_drawn_anew_each_epoch() -> None:
    order = StreamOrder(Table(4000), 16, caption_dropout=0.1)
    dropped = [{int(s) for p in epoch(order, n) for s in p.samples[p.blank]} for n in (0, 1)]
    assert [len(d) for d in dropped] == pytest.approx([400, 400], abs=70)
    assert len(dropped[0] & dropped[1]) < 100


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_show_the_global_batches_of_one_rank(index: ShardIndex, world: int) -> None:
    order = StreamOrder(index, 8, caption_dropout=0.3)
    ranks = [list(itertools.islice(Plans(order, rank, world), 20)) for rank in range(world)]
    for whole, *parts in zip(itertools.islice(Plans(order), 20), *ranks, strict=True):
        assert np.array_equal(np.concatenate([part.samples for part in parts]), whole.samples)
        assert np.array_equal(np.concatenate([part.blank for part in parts]), whole.blank)
        assert {part.dense for part in parts} == {whole.dense}
        assert {len(part.samples) for part in parts} == {8 // world}


def test_starting_at_any_position_continues_the_order(index: ShardIndex) -> None:
    whole = shown(list(itertools.islice(Plans(StreamOrder(index, 8)), 30)))
    for start in (1, 7, 8, 13, 29):
        rest = itertools.islice(Plans(StreamOrder(index, 8), position=lambda start=start: start), 30 - start)
        assert shown(list(rest)) == whole[8 * start :]


def test_ranks_that_do_not_divide_the_batch_are_refused(index: ShardIndex) -> None:
    with pytest.raises(ValueError, match="3 ranks do not divide it; set it to a multiple of 3, for example 9"):
        Plans(StreamOrder(index, 8), 0, 3)


def test_a_batch_larger_than_every_shape_is_refused(index: ShardIndex) -> None:
    with pytest.raises(ValueError, match="40 of 64x64, 20 of 96x64.*lower batch_size"):
        StreamOrder(index, 41)


@pytest.mark.parametrize("setting", [{"dense_probability": 1.5}, {"caption_dropout": -0.1}, {"batch_size": 0}])
def test_settings_out_of_range_are_refused(index: ShardIndex, setting: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        StreamOrder(index, **{"batch_size": 8} | setting)


def test_a_shape_too_rare_for_a_batch_is_reported(index: ShardIndex) -> None:
    assert StreamOrder(index, 32).never_shown == {(64, 96): 20}
    assert StreamOrder(index, 20).never_shown == {}


def test_one_pass_shows_everything_once_and_the_same_each_time(index: ShardIndex) -> None:
    passes = OnePass(StreamOrder(index, 7, keep_last=True))
    first, second = list(passes), list(passes)
    assert sorted(shown(first)) == list(range(len(index)))
    assert shown(first) == shown(second)
    assert len(first) == len(passes)


def test_ranks_of_one_pass_take_equally_many_batches_of_equal_size(index: ShardIndex) -> None:
    ranks = [list(OnePass(StreamOrder(index, 8, keep_last=True), rank, 4)) for rank in range(4)]
    sizes = [[len(plan.samples) for plan in plans] for plans in ranks]
    assert sizes[0] == sizes[1] == sizes[2] == sizes[3]
    assert all(size > 0 for size in sizes[0])


@pytest.mark.slow
def test_position_one_million_of_ten_million_samples_takes_seconds() -> None:
    table = Table(10_000_000)
    start = time.process_time()
    plan = StreamOrder(table, 128).plan(1_000_000)
    assert len(plan.samples) == 128
    assert time.process_time() - start < 15
