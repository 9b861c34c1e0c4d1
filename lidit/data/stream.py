"""The order in which training reads the samples, and how it resumes.

A WebDataset stream cannot say where it is, and exact resume is what users of the peers ask for most. Here the order is
a function of (seed, epoch, position) over an index of the tars: a run's position is one integer, any number of ranks
and workers shows the same global batches, and stopping anywhere resumes exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from lidit.data.index import ShardIndex
from lidit.data.transforms import dropped_captions

LENGTH_WINDOW = 8  # batches whose samples are sorted by caption length


@dataclass(frozen=True)
class Plan:
    """What one rank reads for one global batch: `samples` of one image shape, all with the same kind of caption."""

    number: int  # global batches before this one, since the start of training
    samples: np.ndarray  # int64 (b), rows of the index
    dense: bool  # the synthetic caption rather than the original one
    blank: np.ndarray  # bool (b), captions dropped for classifier-free guidance


class StreamOrder:
    """Which samples make up global batch 0, 1, 2, ...: each epoch shuffles anew and shows a sample at most once.

    A bucket is (height, width, kind of caption), so a batch holds one image shape and captions of similar length. Of
    the full batches of each shape a share of `dense_probability` (rounded up or down at random, right on average)
    takes the dense captions; which samples those are is drawn anew each epoch. The number of batches an epoch is
    thereby constant and batch 1,000,000 is found without going through those before it. What does not fill a batch is
    left out of that epoch: fewer samples per shape than `batch_size`, others each time.

    Args:
        index: the samples.
        batch_size: samples in a global batch, over all ranks.
        seed: of shuffling, kinds of caption and dropped captions.
        dense_probability: share of dense captions, 0 to 1, among samples that have one.
        caption_dropout: share of captions replaced by the empty one, 0 to 1.
        keep_last: show each bucket's incomplete last batch too (validation).
        max_caption_chars: leave out samples whose original caption is longer; none: no limit.

    Raises:
        ValueError: a setting out of range, or no shape has enough samples for one batch.
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
    ) -> None:
        for name, value in (("dense_probability", dense_probability), ("caption_dropout", caption_dropout)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; it is a share from 0 to 1")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it is the number of samples in a global batch, at least 1")
        self.batch_size, self.seed, self.keep_last = batch_size, seed, keep_last
        self.dense_probability, self.caption_dropout = dense_probability, caption_dropout
        self.shapes = _by_shape(index.column("height"), index.column("width"))
        self._lengths = {name: index.column(name) for name in ("caption_chars", "dense_chars")}
        if max_caption_chars is not None:
            short = self._lengths["caption_chars"] <= max_caption_chars
            self.shapes = {shape: samples[short[samples]] for shape, samples in self.shapes.items()}
        self._has_dense = self._lengths["dense_chars"] > 0
        self._epoch, self._batches, self._dense, self._blank = -1, [], [], np.zeros(0, bool)
        full = sum(len(samples) // batch_size for samples in self.shapes.values())
        self.steps_per_epoch = len(self._buckets(0)) if keep_last else full
        if not self.steps_per_epoch:
            sizes = ", ".join(f"{len(s)} of {w}x{h}" for (h, w), s in self.shapes.items()) or "no samples at all"
            raise ValueError(f"no image shape has {batch_size} samples for one batch ({sizes}); lower batch_size")

    @property
    def left_out(self) -> int:
        """Samples an epoch does not show because they do not fill a batch."""
        samples = sum(len(samples) for samples in self.shapes.values())
        return 0 if self.keep_last else samples - self.steps_per_epoch * self.batch_size

    @property
    def never_shown(self) -> dict[tuple[int, int], int]:
        """Image shapes (height, width) with too few samples for one batch, and how many they have."""
        return {s: len(i) for s, i in self.shapes.items() if len(i) < self.batch_size and not self.keep_last}

    def plan(self, number: int, rank: int = 0, world: int = 1) -> Plan:
        """One rank's slice of global batch `number`; the same samples for any number of ranks together."""
        epoch, step = divmod(number, self.steps_per_epoch)
        if epoch != self._epoch:
            self._draw(epoch)
        samples = self._batches[step]
        share = len(samples) // world  # an incomplete last batch gives every rank equally many
        samples = samples[rank * share : (rank + 1) * share]
        return Plan(number, samples, self._dense[step], self._blank[samples])

    def _draw(self, epoch: int) -> None:
        """Put an epoch's batches in their order; one epoch is held at a time."""
        buckets = self._buckets(epoch)
        order = np.random.default_rng([self.seed, epoch, 1]).permutation(len(buckets))
        self._batches, self._dense = [buckets[i][0] for i in order], [buckets[i][1] for i in order]
        self._blank = dropped_captions(self.seed, epoch, len(self._has_dense), self.caption_dropout)
        self._epoch = epoch

    def _buckets(self, epoch: int) -> list[tuple[np.ndarray, bool]]:
        """An epoch's batches, bucket after bucket, each with whether it takes dense captions."""
        rng = np.random.default_rng([self.seed, epoch, 0])
        batches = []
        for samples in self.shapes.values():
            has_dense = self._has_dense[samples]
            dense, plain = rng.permutation(samples[has_dense]), samples[~has_dense]
            batches_with_dense = int(self.dense_probability * self._batches_in(len(dense)) + rng.random())
            dense, rest = np.split(dense, [batches_with_dense * self.batch_size])
            plain = rng.permutation(np.concatenate([rest, plain]))
            for bucket, kind in ((dense, True), (plain, False)):
                cuts = (np.arange(self._batches_in(len(bucket)) + 1) * self.batch_size).tolist()
                bucket = self._by_length(bucket[: cuts[-1]], "dense_chars" if kind else "caption_chars")
                batches += [(bucket[a:b], kind) for a, b in itertools.pairwise(cuts)]
        return batches

    def _by_length(self, bucket: np.ndarray, column: str) -> np.ndarray:
        """Sort by caption length within windows of a few batches: less padding, and batches still mix."""
        window = LENGTH_WINDOW * self.batch_size
        lengths = self._lengths[column]
        pieces = [bucket[a : a + window] for a in range(0, len(bucket), window)]
        return np.concatenate([bucket[:0], *(piece[lengths[piece].argsort(kind="stable")] for piece in pieces)])

    def _batches_in(self, samples: int) -> int:
        return -(-samples // self.batch_size) if self.keep_last else samples // self.batch_size


class Plans:
    """One rank's plans as a sampler, endless.

    Args:
        order: which samples make up a global batch.
        rank: this rank's number.
        world: ranks that share a global batch.
        position: asked at each start for the number of the first global batch.

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
        """Plans in order, from the position."""
        numbers = itertools.count(self._position())
        return (self._order.plan(number, self._rank, self._world) for number in numbers)


class OnePass(Plans):
    """The plans of the first epoch, the same each time."""

    def __iter__(self) -> Iterator[Plan]:
        """Plans in order; an incomplete batch with fewer samples than ranks is skipped by every rank."""
        plans = itertools.islice(super().__iter__(), self._order.steps_per_epoch)
        return (plan for plan in plans if len(plan.samples))

    def __len__(self) -> int:
        """Batches every rank shows."""
        return sum(1 for _ in self)


def _by_shape(height: np.ndarray, width: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """Rows of the index by (height, width)."""
    code = height.astype(np.int64) << 32 | width
    shapes, inverse = np.unique(code, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(inverse, minlength=len(shapes)))[:-1])
    return {(int(s >> 32), int(s & 0xFFFFFFFF)): g for s, g in zip(shapes, groups, strict=True)}
