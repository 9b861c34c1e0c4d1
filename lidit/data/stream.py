"""The order in which training reads the samples, and how training resumes in it.

A WebDataset stream cannot say where it is, and users of other codebases ask most for an exact resume. Here the order is
a function of (seed, epoch, position) over an index of the tars: a run's position is one integer, any number of ranks
and workers shows the same global batches, and a run that stops anywhere resumes exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from lidit.data.index import ShardIndex
from lidit.data.mix import Mix
from lidit.data.window import Window

LENGTH_WINDOW = 8  # batches whose samples are sorted together by caption length
PIECE = 1 << 20  # samples that are grouped at one time


@dataclass(frozen=True)
class Plan:
    """What one rank reads for one global batch: `samples` of one image shape, all with the same kind of caption."""

    number: int  # global batches before this one, since the start of training
    samples: np.ndarray  # int64 (b), rows of the index
    dense: bool  # the synthetic caption rather than the original one
    blank: np.ndarray  # bool (b), captions dropped for classifier-free guidance
    near: np.ndarray | None = None  # bool (b), samples of shards in the current window; None: all
    spare: Plan | None = None  # what other ranks read: one of these is shown if none of `samples` can be read


class StreamOrder:
    """Which samples make up global batch 0, 1, 2, ...: each epoch is shuffled anew and shows a sample at most once.

    A bucket is (height, width, kind of caption), so a batch holds one image shape and captions of similar length. A
    share of each shape's full batches, `dense_probability`, shows dense captions; the share is rounded up or down at
    random, so it is right on average, and its samples are drawn anew each epoch. Every epoch thus has the same number
    of batches, and batch 1,000,000 is found without going through those before it. Samples that do not fill a batch are
    left out of the epoch: fewer than `batch_size` per shape, and other samples each time.

    Args:
        index: the samples.
        batch_size: samples in a global batch, over all ranks.
        seed: decides the order, the kinds of caption and which captions are dropped.
        dense_probability: share of dense captions, 0 to 1, among samples that have one.
        caption_dropout: share of captions replaced by the empty one, 0 to 1.
        keep_last: also show each bucket's last batch, which may be incomplete (validation).
        max_caption_chars: leave out samples whose original caption is longer; none: no limit.
        mix: how often an epoch shows each of several sets; none: every sample once.
        window: number of shards whose samples are mixed at one time; none: all.

    Raises:
        ValueError: a setting is out of range, or no shape has enough samples for one batch.
    """

    def __init__(
        self,
        index: ShardIndex,
        batch_size: int,
        seed: int = 0,
        dense_probability: float = 0.5,
        caption_dropout: float = 0.0,
        keep_last: bool = False,
        max_caption_chars: int | None = None,
        mix: Mix | None = None,
        window: int | None = None,
    ) -> None:
        for name, value in (("dense_probability", dense_probability), ("caption_dropout", caption_dropout)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; it is a share from 0 to 1")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it is the number of samples in a global batch, at least 1")
        self.batch_size, self.seed, self.keep_last = batch_size, seed, keep_last
        self.dense_probability, self.caption_dropout = dense_probability, caption_dropout
        self._lengths = {name: index.column(name) for name in ("caption_chars", "dense_chars")}
        self._has_dense = self._lengths["dense_chars"] > 0
        self.shapes = _by_shape(index.column("height"), index.column("width"))
        if max_caption_chars is not None:
            short = self._lengths["caption_chars"] <= max_caption_chars
            self.shapes = {shape: samples[short[samples]] for shape, samples in self.shapes.items()}
        self.mix = mix or Mix([0, len(self._has_dense)])
        self.mix.fit(list(self.shapes.values()))
        self.counts = {shape: self.mix.count(samples) for shape, samples in self.shapes.items()}
        self._window = None if window is None else Window(index.shard, len(index.paths), window, seed)
        self._epoch, self._batches, self._dense, self._blank = -1, [], [], np.zeros(0, bool)
        self._times: list[float] = []
        full = sum(count // batch_size for count in self.counts.values())
        self.steps_per_epoch = len(self._buckets(0)) if keep_last else full
        if not self.steps_per_epoch:
            sizes = ", ".join(f"{n} of {w}x{h}" for (h, w), n in self.counts.items()) or "no samples at all"
            raise ValueError(f"no image shape has {batch_size} samples for one batch ({sizes}); lower batch_size")

    @property
    def left_out(self) -> int:
        """How many samples an epoch leaves out because they do not fill a batch."""
        return 0 if self.keep_last else sum(self.counts.values()) - self.steps_per_epoch * self.batch_size

    @property
    def never_shown(self) -> dict[tuple[int, int], int]:
        """Image shapes (height, width) with too few samples for one batch, each with its number of samples."""
        return {s: n for s, n in self.counts.items() if n < self.batch_size and not self.keep_last}

    def plan(self, number: int, rank: int = 0, world: int = 1) -> Plan:
        """One rank's slice of global batch `number`, whose samples are the same for any number of ranks."""
        epoch, step = divmod(number, self.steps_per_epoch)
        if epoch != self._epoch:
            self._draw(epoch)
        samples = self._batches[step].astype(np.int64)
        share = len(samples) // world  # of an incomplete last batch, too, every rank gets equally many
        own = np.arange(rank * share, (rank + 1) * share)
        spare = self._part(number, step, np.delete(samples, own)) if world > 1 else None
        return self._part(number, step, samples[own], spare)

    def _part(self, number: int, step: int, samples: np.ndarray, spare: Plan | None = None) -> Plan:
        near = self._window.near(samples, self._times[step]) if self._window else None
        return Plan(number, samples, self._dense[step], self._blank[samples], near, spare)

    def _draw(self, epoch: int) -> None:
        """Put an epoch's batches in their order, in place of those of the epoch before."""
        self._epoch, self._batches = -1, []
        buckets = self._buckets(epoch)
        order = np.random.default_rng([self.seed, epoch, 1]).permutation(len(buckets))
        if self._window is not None:
            order = np.argsort([time for _, _, time in buckets], kind="stable")
        self._batches, self._dense = [buckets[i][0] for i in order], [buckets[i][1] for i in order]
        self._times = [buckets[i][2] for i in order]
        self._blank = dropped_captions(self.seed, epoch, len(self._has_dense), self.caption_dropout)
        self._epoch = epoch

    def _buckets(self, epoch: int) -> list[tuple[np.ndarray, bool, float]]:
        """An epoch's batches, bucket after bucket: samples, whether captions are dense, time in the window."""
        rng = np.random.default_rng([self.seed, epoch, 0])
        if self._window is not None:
            self._window.draw(epoch)
        batches = []
        for number, group in enumerate(self.shapes.values()):
            samples = self.mix.take(group, number, epoch)
            has_dense = self._has_dense[samples]
            dense, plain = rng.permutation(samples[has_dense]), samples[~has_dense]
            batches_with_dense = int(self.dense_probability * self._batches_in(len(dense)) + rng.random())
            dense, rest = np.split(dense, [batches_with_dense * self.batch_size])
            plain = rng.permutation(np.concatenate([rest, plain]))
            batches += self._cut(dense, True) + self._cut(plain, False)
        return batches

    def _cut(self, bucket: np.ndarray, dense: bool) -> list[tuple[np.ndarray, bool, float]]:
        """A bucket's batches: samples, whether captions are dense, time in the window."""
        cuts = np.arange(self._batches_in(len(bucket)) + 1) * self.batch_size
        bucket, together, times = bucket[: cuts[-1]], LENGTH_WINDOW, [0.0] * (len(cuts) - 1)
        if self._window is not None and len(bucket):
            bucket, keys = self._window.sort(bucket)
            together = self._window.pieces(len(bucket), self.batch_size, LENGTH_WINDOW)
            times = self._window.times(keys, self.batch_size, together).tolist()
        bucket = self._by_length(bucket, "dense_chars" if dense else "caption_chars", together * self.batch_size)
        return [(bucket[a:b], dense, t) for (a, b), t in zip(itertools.pairwise(cuts.tolist()), times, strict=True)]

    def _by_length(self, bucket: np.ndarray, column: str, window: int) -> np.ndarray:
        """Sort by caption length within windows of a few batches: padding is less, and batches are still mixed."""
        lengths = self._lengths[column][bucket]
        order = [a + lengths[a : a + window].argsort(kind="stable") for a in range(0, len(bucket), window)]
        return bucket[np.concatenate(order)] if order else bucket

    def _batches_in(self, samples: int) -> int:
        return -(-samples // self.batch_size) if self.keep_last else samples // self.batch_size


class Plans:
    """An endless sampler that gives one rank's plans.

    Args:
        order: which samples make up a global batch.
        rank: this rank's number.
        world: ranks that share a global batch.
        position: gives, at each start, the number of the first global batch.

    Raises:
        ValueError: the ranks do not divide the global batch.
    """

    def __init__(
        self, order: StreamOrder, rank: int = 0, world: int = 1, position: Callable[[], int] = lambda: 0
    ) -> None:
        if order.batch_size % world:
            raise ValueError(
                f"batch_size is the global batch, {order.batch_size}, and {world} ranks do not divide it; "
                f"set it to a multiple of {world}, for example {-(-order.batch_size // world) * world}"
            )
        self._order, self._rank, self._world, self._position = order, rank, world, position

    def __iter__(self) -> Iterator[Plan]:
        """Plans in order, beginning at the position."""
        numbers = itertools.count(self._position())
        return (self._order.plan(number, self._rank, self._world) for number in numbers)


class OnePass(Plans):
    """A sampler that gives the plans of the first epoch, the same each time."""

    def __iter__(self) -> Iterator[Plan]:
        """Plans in order; an incomplete batch with fewer samples than ranks is skipped by every rank."""
        plans = itertools.islice(super().__iter__(), self._order.steps_per_epoch)
        return (plan for plan in plans if len(plan.samples))

    def __len__(self) -> int:
        """How many batches every rank shows."""
        return sum(1 for _ in self)


def _by_shape(height: np.ndarray, width: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """Rows of the index by (height, width), ascending; made in pieces, since ten million rows need much memory."""
    pieces = [slice(first, first + PIECE) for first in range(0, len(height), PIECE)]

    def code(piece: slice) -> np.ndarray:
        return height[piece].astype(np.int64) << 32 | width[piece].astype(np.int64)

    shapes = np.unique(np.concatenate([np.zeros(0, np.int64), *(np.unique(code(piece)) for piece in pieces)]))
    number = np.empty(len(height), np.uint16 if len(shapes) < 2**16 else np.int64)
    for piece in pieces:
        number[piece] = shapes.searchsorted(code(piece))
    rows = number.argsort(kind="stable").astype(np.int32)  # numbers of 16 bits are sorted by radix, which is fast
    groups = np.split(rows, np.bincount(number).cumsum()[:-1])
    return {(int(s >> 32), int(s & 0xFFFFFFFF)): g for s, g in zip(shapes, groups, strict=True)}


def dropped_captions(seed: int, epoch: int, count: int, probability: float) -> np.ndarray:
    """Which of `count` samples lose their caption in an epoch (classifier-free guidance), bool (count).

    A function of its arguments alone, and the draw of sample i does not depend on `count`.
    """
    return np.random.default_rng([seed, epoch, 2]).random(count, dtype=np.float32) < probability
