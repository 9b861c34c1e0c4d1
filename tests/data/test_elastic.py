"""Any number of ranks and workers shows the same global batches, also when a run is killed and goes on as another."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lidit.data.datamodule import Batch, ShardData
from tests.data.conftest import QUIET, Witness, fit


def rank_of(data: ShardData, rank: int, world: int) -> ShardData:
    """As the trainer of a process of that rank would see it."""
    data._rank = lambda: (rank, world)
    return data


def shown(rank: int, world: int, workers: int, count: int, **settings: object) -> list[list[str]]:
    data = rank_of(ShardData(batch_size=8, num_workers=workers, caption_dropout=0.2, **settings), rank, world)
    data.setup("fit")
    loader = itertools.islice(data.train_dataloader(), count)
    return [[f"{k} {p}" for k, p in zip(batch.key, batch.prompt, strict=True)] for batch in loader]


ORDERS = {"plain": {}, "window": {"shuffle_window": 1}, "with replacement": {"replacement": True}}


@pytest.mark.parametrize("settings", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_global_batches_are_the_same(shards: Path, world: int, workers: int, settings: dict) -> None:
    whole = shown(0, 1, 0, 9, train=str(shards), **settings)  # into the second epoch
    ranks = [shown(rank, world, workers, 9, train=str(shards), **settings) for rank in range(world)]
    assert [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)] == whole


def test_one_shard_feeds_more_ranks_and_workers_than_there_are_shards(shards: Path) -> None:
    train = f"{shards}/00000.tar"  # 16 samples, 11 of them of one shape: one batch an epoch
    whole = shown(0, 1, 0, 5, train=train)
    ranks = [shown(rank, 8, 2, 5, train=train) for rank in range(8)]
    assert [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)] == whole


class DieAt(Callback):
    """Writes down which batches were shown; at one of them the process dies without a word."""

    def __init__(self, batch: int, shown: Path) -> None:
        self.batch, self.shown = batch, shown

    def on_train_batch_start(self, trainer: Trainer, model: Witness, batch: Batch, _: int) -> None:
        if len(model.seen) == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)
        with self.shown.open("a") as file:
            file.write(json.dumps([f"{k} {p}" for k, p in zip(batch.key, batch.prompt, strict=True)]) + "\n")


def run(shards: Path, folder: Path, workers: int, die_at: int) -> None:
    """Train to batch 15, from the last checkpoint where there is one; one is saved every second step."""
    torch.set_num_threads(1)
    callbacks = [ModelCheckpoint(folder, every_n_train_steps=2, save_last="link"), DieAt(die_at, folder / "shown")]
    data = ShardData(str(shards), batch_size=8, num_workers=workers)
    last = "last" if list(folder.glob("*.ckpt")) else None
    trainer = Trainer(max_steps=15, default_root_dir=folder, callbacks=callbacks, **QUIET)
    trainer.fit(Witness(), data, ckpt_path=last, weights_only=True)


def test_a_run_killed_twice_goes_on_with_other_workers_and_misses_and_repeats_nothing(
    shards: Path, tmp_path: Path
) -> None:
    whole, folder, start = fit(ShardData(str(shards), batch_size=8), tmp_path / "whole", 15).seen, tmp_path / "parts", 0
    folder.mkdir()
    for workers, die_at, end in ((0, 5, 5), (2, 3, 7), (1, 99, 15)):
        process = multiprocessing.get_context("fork").Process(target=run, args=(shards, folder, workers, die_at))
        process.start()
        process.join(60)
        assert process.exitcode == (0 if end == 15 else -signal.SIGKILL)
        shown = [json.loads(line) for line in (folder / "shown").read_text().splitlines()]
        (folder / "shown").unlink()
        assert shown == whole[start:end]
        start = torch.load(folder / "last.ckpt", weights_only=True)["ShardData"]["batches"]
        assert start in (end - 1, end - 2)  # of the last checkpoint before the kill
