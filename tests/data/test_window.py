"""A window of shards keeps few of them in use, loses nothing, and mixes what is in it."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from lidit.data.datamodule import ShardData
from lidit.data.index import ShardIndex
from lidit.data.mix import Mix
from lidit.data.stream import Plan, Plans, StreamOrder
from lidit.data.window import Window
from tests.data.conftest import Table, fit

COUNT, SHARDS, WIDTH = 100_000, 100, 4


def epoch(order: StreamOrder, number: int = 0) -> list[Plan]:
    steps = order.steps_per_epoch
    return [order.plan(n) for n in range(number * steps, (number + 1) * steps)]


def order(widths: tuple[int, ...] = (256, 320), window: int | None = WIDTH, **settings: object) -> StreamOrder:
    return StreamOrder(Table(COUNT, widths=widths), 64, window=window, **settings)


def fetches(plans: list[Plan], shard: np.ndarray, room: int) -> int:
    """How many shards a folder with room for so many fetches, the one used longest ago going first."""
    held: OrderedDict[int, None] = OrderedDict()
    count = 0
    for plan in plans:
        for s in np.unique(shard[plan.samples if plan.near is None else plan.samples[plan.near]]).tolist():
            count += s not in held
            held[s] = None
            held.move_to_end(s)
            if len(held) > room:
                held.popitem(last=False)
    return count


def test_an_epoch_still_shows_everything_once_up_to_what_fills_no_batch() -> None:
    windowed = order()
    for number in range(2):
        seen = np.concatenate([plan.samples for plan in epoch(windowed, number)])
        assert len(np.unique(seen)) == len(seen) == COUNT - windowed.left_out
        assert windowed.left_out < 2 * 64


def test_each_shard_is_fetched_about_once_an_epoch_with_the_room_that_is_asked_for() -> None:
    shard = Table(COUNT).shard
    plans = epoch(order())
    assert fetches(plans, shard, Window.in_use(WIDTH)) <= 1.02 * SHARDS
    assert np.mean([plan.near.mean() for plan in plans]) > 0.995
    assert fetches(epoch(order(window=None)), shard, Window.in_use(WIDTH)) > 100 * SHARDS


def test_rare_shapes_do_not_fetch_shards_again() -> None:
    rng, table = np.random.default_rng(0), Table(COUNT)
    table.columns["width"] = np.where(rng.random(COUNT) < 0.01, rng.integers(100, 110, COUNT), 256)  # ten of 0.1 %
    plans = epoch(StreamOrder(table, 64, window=WIDTH))
    rare = [plan for plan in plans if table.columns["width"][plan.samples[0]] != 256]
    assert len(rare) >= 8
    assert all(len(np.unique(table.shard[plan.samples])) > 3 * WIDTH for plan in rare)  # they come from far and wide
    assert fetches(plans, table.shard, Window.in_use(WIDTH)) <= 1.02 * SHARDS
    far = sum(int((~plan.near).sum()) for plan in plans)
    assert 0 < far < 0.01 * COUNT  # read alone


def test_samples_of_many_shards_are_mixed_and_batches_of_all_shapes() -> None:
    table, plans = Table(COUNT), epoch(order())
    per_batch = [len(np.unique(table.shard[plan.samples])) for plan in plans[100:-100]]
    assert np.median(per_batch) >= WIDTH
    widths = [int(table.columns["width"][plan.samples[0]]) for plan in plans]
    assert np.mean(np.diff(widths) != 0) == pytest.approx(0.5, abs=0.1)


def test_short_captions_do_not_come_before_long_ones() -> None:
    table, plans = Table(COUNT, dense=0.0), epoch(order())
    lengths = [table.columns["caption_chars"][plan.samples].mean() for plan in plans]
    assert abs(np.corrcoef(lengths[:-1], lengths[1:])[0, 1]) < 0.15


def test_epochs_and_seeds_differ_and_positions_are_found() -> None:
    windowed = order()
    first, second = (np.concatenate([p.samples for p in epoch(windowed, n)]) for n in range(2))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.concatenate([p.samples for p in epoch(order(seed=1))]))
    steps = windowed.steps_per_epoch
    for start in (0, 5, steps - 1, steps, steps + 3, 1_000_000):
        again = itertools.islice(Plans(order(), position=lambda start=start: start), 2)
        assert [p.samples.tolist() for p in again] == [windowed.plan(start + i).samples.tolist() for i in (0, 1)]


def test_ranks_share_batches_and_what_is_near() -> None:
    whole, windowed = order().plan(17), order()
    parts = [windowed.plan(17, rank, 4) for rank in range(4)]
    assert np.array_equal(np.concatenate([part.samples for part in parts]), whole.samples)
    assert np.array_equal(np.concatenate([part.near for part in parts]), whole.near)
    for rank, part in enumerate(parts):
        others = np.delete(whole.samples, np.arange(16 * rank, 16 * rank + 16))
        assert np.array_equal(part.spare.samples, others)


def test_sets_with_weights_are_mixed_within_the_window() -> None:
    mixed = order(mix=Mix([0, 20_000, COUNT], [1.0, 1.0]))
    shares = [np.mean(plan.samples < 20_000) for plan in epoch(mixed)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.01)
    assert fetches(epoch(mixed), Table(COUNT).shard, Window.in_use(WIDTH)) <= 1.02 * SHARDS


@pytest.mark.parametrize("window", [1, 3, 100, 1000])
def test_any_window_works(window: int) -> None:
    seen = np.concatenate([plan.samples for plan in epoch(order(window=window))])
    assert len(np.unique(seen)) == len(seen)


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="shuffle_window is 0; it is a number of shards, at least 1"):
        order(window=0)


def test_validation_shows_everything_with_a_window_too(shards: Path) -> None:
    data = ShardData("x", val=str(shards), batch_size=7, shuffle_window=1)
    data.setup("validate")
    keys = [key for batch in data.val_dataloader() for key in batch.key]
    assert sorted(map(int, keys)) == list(range(60))


def test_a_run_with_a_window_resumes_exactly(shards: Path, tmp_path: Path) -> None:
    settings = {"train": str(shards), "batch_size": 8, "shuffle_window": 1}
    whole = fit(ShardData(**settings), tmp_path / "whole", 15).seen
    first = fit(ShardData(**settings), tmp_path / "parts", 6).seen
    assert first + fit(ShardData(**settings), tmp_path / "parts", 15).seen == whole
    index = ShardIndex(str(shards))
    in_first = {index.place(int(entry.split()[0]))[0] for entry in whole[0]}
    assert len(in_first) <= 2
