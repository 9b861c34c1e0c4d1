"""Batches from shards for Lightning: one shape in a batch, a slice for each rank, resumable to the batch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from lidit.data.cache import Cache, Folders
from lidit.data.index import ShardIndex
from lidit.data.mix import Mix, Shards, Weighted, is_weighted, names_in
from lidit.data.remote import Copies
from lidit.data.samples import Batch, Samples, Tally
from lidit.data.stream import OnePass, Plans, StreamOrder
from lidit.data.window import check_room
from lidit.lightning_private import batches_done, replaces_samplers, share

__all__ = ["Batch", "ShardData"]

log = logging.getLogger(__name__)

RECORDED = 16  # sizes that a checkpoint records


class ShardData(LightningDataModule):
    """Training and validation batches from tar shards written by `lidit prep shard`.

    Training is one endless epoch for Lightning: set `trainer.max_steps` and give intervals in steps.

    A shard or sample that cannot be read during training is skipped, named in the log and counted
    (`lidit/data/samples.py`). A fault of an index stops the run before it begins, since the order follows from the
    indices.

    Args:
        train: folder of tars, a tar, a pattern like `shards/{00000..00009}.tar`, or a list of these; each local or a
            URL (http, https, s3, gs). A list of `{shards, weight}` mixes sets by their weights.
        val: the validation shards, named in the same ways and shown in a fixed order; none: no validation.
        test: the shards of `lidit test`, named in the same ways.
        batch_size: samples in a global batch, over all ranks.
        num_workers: processes per rank that read ahead; 0 reads in the training process.
        seed: decides the order, the kinds of caption and which captions are dropped.
        dense_probability: share of synthetic captions, 0 to 1; the others are the original ones.
        caption_dropout: share of captions replaced by the empty one in training (classifier-free guidance), 0 to 1.
        max_caption_chars: leave out training samples whose original caption is longer; none: no limit.
        cache: folder that `lidit prep precompute` made of the training shards, with latents, LLM features or both; or a
            list of such folders, each with a part of these.
        val_cache: the cache of the validation shards.
        test_cache: the cache of the test shards.
        allow_commands: run the commands of `pipe:` entries; only for lists you trust.
        replacement: draw training samples with replacement; an epoch then misses about a third of them.
        shuffle_window: number of shards whose samples are mixed at one time; none: all. Remote shards that do not fit
            into `shard_cache` together need a window.
        shard_cache: folder on a local disk for copies of remote shards, and for the merged indices of all shards, with
            which a large set starts faster.
        shard_cache_gb: largest size of the copies, in 10^9 bytes.
        max_skipped: share of a rank's samples that may be unreadable, 0 to 1; more stops the run.
    """

    def __init__(
        self,
        train: Shards | list[Weighted],
        val: Shards | None = None,
        test: Shards | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        dense_probability: float = 0.5,
        caption_dropout: float = 0.1,
        max_caption_chars: int | None = None,
        cache: Folders | None = None,
        val_cache: Folders | None = None,
        test_cache: Folders | None = None,
        allow_commands: bool = False,
        replacement: bool = False,
        shuffle_window: int | None = None,
        shard_cache: str | None = None,
        shard_cache_gb: float = 100.0,
        max_skipped: float = 0.01,
    ) -> None:
        super().__init__()
        self.train, self.val, self.test = train, val, test
        self.cache, self.val_cache, self.test_cache = cache, val_cache, test_cache
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.dense_probability, self.caption_dropout = dense_probability, caption_dropout
        self.max_caption_chars, self.allow_commands = max_caption_chars, allow_commands
        self.replacement, self.shuffle_window, self.max_skipped = replacement, shuffle_window, max_skipped
        self.shard_cache, self.shard_cache_gb = shard_cache, shard_cache_gb
        self.train_samples: Samples | None = None
        self.val_samples: Samples | None = None
        self.test_samples: Samples | None = None
        self.sizes: list[tuple[int, int]] = []  # (width, height) of the training images, the most frequent first
        self.read_ahead: Callable[[list[str]], Any] | None = None  # the model's; what it makes of captions to be read
        self._resumed: dict | None = None
        self._tally = Tally(max_skipped)

    def setup(self, stage: str | None = None) -> None:
        """Read the indices and open the caches.

        Raises:
            FileNotFoundError: a shard or a cache is missing.
            ValueError: a shard cannot be read, a cache was made for other shards, or there are no test shards.
        """
        if self.train_samples is None and stage in (None, "fit"):
            self.train_samples = self._open(names_in(self.train), self.cache)
        if self.val_samples is None and self.val is not None and stage != "test":
            self.val_samples = self._open(self.val, self.val_cache)
        if self.test_samples is None and stage == "test":
            if self.test is None:
                raise ValueError("there are no test shards; name them as data.test")
            self.test_samples = self._open(self.test, self.test_cache)

    def expect(self, vae: dict | None = None, llms: list[dict] | None = None) -> None:
        """Refuse caches that other models made; call it once both modules are set up.

        Args:
            vae: `FrozenVAE.identity` of the VAE in use; None: latents are not checked.
            llms: `FrozenLLM.identity` of each LLM in use, in order; None: features are not checked.

        Raises:
            ValueError: a cache is stale; the message names the fields that differ and how to make it again.
        """
        for samples in (self.train_samples, self.val_samples, self.test_samples):
            if samples is not None and samples.cache is not None:
                samples.cache.expect(vae, llms)

    def train_dataloader(self) -> DataLoader:
        """Endless batches, beginning where the checkpoint stopped.

        Raises:
            ValueError: the checkpoint has another order, the ranks do not divide the batch, or no shape fills a batch.
        """
        index = self.train_samples.index
        order = StreamOrder(
            index,
            self.batch_size,
            self.seed,
            self.dense_probability,
            self.caption_dropout,
            max_caption_chars=self.max_caption_chars,
            mix=Mix(*self._sets(), self.replacement, self.seed),
            window=self.shuffle_window,
        )
        self._check_resumed()
        self._check_trainer(order.steps_per_epoch)
        by_count = sorted(order.counts.items(), key=lambda item: -item[1])
        self.sizes = [(width, height) for (height, width), _ in by_count[:RECORDED]]
        report(order, index, self._position())
        return self._loader(self.train_samples, Plans(order, *self._rank(), self._position))

    def val_dataloader(self) -> DataLoader | list:
        """One pass over the validation shards in a fixed order, with no caption dropped."""
        return [] if self.val_samples is None else self._one_pass(self.val_samples)

    def test_dataloader(self) -> DataLoader:
        """One pass over the test shards in a fixed order, with no caption dropped."""
        return self._one_pass(self.test_samples)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Scale pixels to [-1, 1] on the device (until here a value is one byte), and count the skipped samples.

        Raises:
            ValueError: more samples were skipped than `max_skipped` allows.
        """
        if not isinstance(batch, Batch):
            return batch
        self._tally.count(batch)
        return batch.signed()

    def teardown(self, stage: str) -> None:
        """Log how many samples were skipped."""
        if self.skipped:
            log.warning("%s", self._tally)

    @property
    def skipped(self) -> int:
        """How many samples this rank could not read since it started."""
        return self._tally.skipped

    def state_dict(self) -> dict:
        """The position in the order, in global batches, and the settings that decide the order."""
        return {"batches": self._position(), "order": self._order_settings()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Remember a checkpoint's position for the next training loader."""
        self._resumed = state_dict

    def _position(self) -> int:
        """Batches trained on so far.

        The trainer counts them: a loader that counted its own batches would be one ahead, since Lightning prefetches.
        The counter `processed` leaves out a batch that an exception interrupted, so that batch is shown again.
        """
        if self.trainer is None:
            return self._resumed["batches"] if self._resumed else 0
        return batches_done(self.trainer)

    def _order_settings(self) -> dict:
        names = ("batch_size", "seed", "dense_probability", "max_caption_chars", "shuffle_window")
        settings = {name: getattr(self, name) for name in names}  # new settings: None by default, as in old checkpoints
        settings |= {"replacement": self.replacement or None, "weights": None}
        if self.train_samples is None:
            return settings
        starts, weights = self._sets()
        sizes = np.diff(starts).tolist()
        return settings | {
            "shards": self.train_samples.index.digest,
            "weights": [list(pair) for pair in zip(sizes, weights, strict=True)] if weights else None,
        }

    def _sets(self) -> tuple[list[int], list[float] | None]:
        """First sample of each training set, one past the last sample, and the sets' weights, if they have any."""
        index = self.train_samples.index
        if not is_weighted(self.train):
            return [0, len(index)], None
        ends = np.cumsum([0, *(len(names_in(one.shards)) for one in self.train)])
        return index.entries[ends].tolist(), [one.weight for one in self.train]

    def _check_resumed(self) -> None:
        """Refuse a checkpoint whose position belongs to another order."""
        now, then = self._order_settings(), self._resumed["order"] if self._resumed else {}
        if then and (differ := [f"{k} was {then.get(k)!r} and is {v!r}" for k, v in now.items() if then.get(k) != v]):
            raise ValueError(
                f"the checkpoint was saved with another order of the data ({'; '.join(differ)}); "
                "resume with the old settings, or start a new run from its weights"
            )

    def _check_trainer(self, steps_per_epoch: int) -> None:
        """Refuse trainer settings that an endless epoch cannot honour."""
        trainer = self.trainer
        if trainer is None:
            return
        if trainer.overfit_batches:
            raise ValueError("trainer.overfit_batches does not work with shards; write a shard of those samples alone")
        if isinstance(trainer.limit_train_batches, int):
            return
        if trainer.max_steps == -1 and trainer.max_epochs != -1:
            raise ValueError(
                f"the training data is endless: set trainer.max_steps (once through it is {steps_per_epoch} batches) "
                "and leave out trainer.max_epochs"
            )
        if self.val is not None and trainer.limit_val_batches and trainer.val_check_interval == 1.0:
            raise ValueError("the training data is endless: set trainer.val_check_interval to a number of batches")

    def _rank(self) -> tuple[int, int]:
        """This rank's number, and how many ranks share a global batch. A tensor-parallel group is one rank here."""
        if self.trainer is None:
            return 0, 1
        rank, world = share(self.trainer)
        if world > 1 and replaces_samplers(self.trainer):
            raise ValueError("ShardData gives each rank its share itself; set trainer.use_distributed_sampler to false")
        return rank, world

    def _open(self, shards: Shards, cache: Folders | None) -> Samples:
        copies = Copies(self.shard_cache, int(self.shard_cache_gb * 1e9)) if self.shard_cache else None
        index = ShardIndex(shards, self.allow_commands, copies, strict=self.max_skipped == 0)
        check_room(index, self.shuffle_window, copies)
        self._tally.expect(len(index) / self._rank()[1])
        return Samples(index, Cache(cache, index) if cache else None)

    def _one_pass(self, samples: Samples) -> DataLoader:
        order = StreamOrder(
            samples.index,
            self.batch_size,
            self.seed,
            self.dense_probability,
            keep_last=True,
            window=self.shuffle_window,
        )
        return self._loader(samples, OnePass(order, *self._rank()))

    def _loader(self, samples: Samples, plans: Plans) -> DataLoader:
        workers = {"persistent_workers": True} if self.num_workers else {}
        collate = partial(_read_ahead, self.read_ahead if self.num_workers else None)
        return DataLoader(
            samples, batch_size=None, sampler=plans, num_workers=self.num_workers, collate_fn=collate, **workers
        )


def _read_ahead(make: Callable[[list[str]], Any] | None, batch: Batch) -> Batch:
    """The batch, with what the model makes of captions whose features are not cached."""
    return batch if make is None or batch.features is not None else replace(batch, ahead=make(batch.prompt))


def report(order: StreamOrder, index: ShardIndex, start: int) -> None:
    """Log how many batches an epoch has and which samples it leaves out, since buckets make that hard to guess."""
    sizes = ", ".join(f"{count} of {w}x{h}" for (h, w), count in order.counts.items())
    times = ", ".join(f"{times:.3g}" for times in order.mix.times)
    mixed = "" if order.mix.plain else f"; an epoch shows a sample of each set {times} times on average"
    rank_zero_info(
        f"Training data: {len(index)} samples in {len(index.paths)} shards ({sizes}); an epoch is "
        f"{order.steps_per_epoch} batches of {order.batch_size} and leaves out {order.left_out} samples that do not "
        f"fill a batch{mixed}; starting at batch {start}."
    )
    for (height, width), samples in order.never_shown.items():
        rank_zero_warn(f"The {samples} images of {width}x{height} are never shown: they do not fill one batch.")
