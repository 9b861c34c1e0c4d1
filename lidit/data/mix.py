"""How often an epoch shows the samples of each of several sets: weights, and drawing with or without replacement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAW = 3  # part of the seed: other random numbers than those that order an epoch

Shards = str | list[str]


@dataclass
class Weighted:
    """A set of shards that is mixed with others.

    Args:
        shards: the set's shards, named in the ways that `ShardData` reads.
        weight: the set's share of the samples shown, relative to the other sets' weights; above 0.
    """

    shards: Shards
    weight: float


class Mix:
    """Which samples of a group (an image shape) an epoch shows, and how often.

    An epoch shows as many samples as all sets have together, and each set's share of them follows from its weight. If a
    set's samples are to be shown 2.5 times an epoch, the first and the second epoch show each of them two or three
    times, and both together five times. Each pass over a set shuffles it anew, and the next pass begins only when this
    one has ended: without replacement, two samples of one set and group are shown equally often, or once more or less.
    A group shows the same number of samples in every epoch, so any position is found without going through those
    before it.

    Args:
        starts: first sample of each set, and one past the last sample.
        weights: a weight for each set; none: every sample is shown once an epoch.
        replacement: draw each sample independently of the earlier ones; an epoch then misses about a third.
        seed: decides the draws.

    Raises:
        ValueError: there is not one weight for each set, or a weight is not above 0.
    """

    def __init__(
        self,
        starts: Sequence[int],
        weights: Sequence[float] | None = None,
        replacement: bool = False,
        seed: int = 0,
    ) -> None:
        if weights is not None and len(weights) != len(starts) - 1:
            raise ValueError(f"there are {len(weights)} weights for {len(starts) - 1} sets of shards")
        if wrong := [weight for weight in weights or [] if not 0 < weight < float("inf")]:
            raise ValueError(f"the weight of a set of shards is {wrong[0]}; it must be above 0")
        self._starts, self._weights, self._replacement, self._seed = starts, weights, replacement, seed
        self.times = np.ones(len(starts) - 1)  # how often an epoch shows a sample of each set, on average

    @property
    def plain(self) -> bool:
        """Whether an epoch shows every sample exactly once."""
        return self._weights is None and not self._replacement

    def fit(self, groups: Sequence[np.ndarray]) -> None:
        """Set how often an epoch shows each set, from the number of samples that each set has in all groups.

        Raises:
            ValueError: a set with a weight has no samples.
        """
        if self._weights is None:
            return
        counts = np.sum([[len(part) for part in self._parts(group)] for group in groups], axis=0, initial=0)
        if not np.all(counts):
            raise ValueError(f"set {int(np.argmin(counts))} of those with weights has no samples that can be shown")
        weights = np.array(self._weights)
        self.times = weights / weights.sum() * counts.sum() / counts

    def count(self, group: np.ndarray) -> int:
        """How many samples of a group an epoch shows."""
        return sum(self._count(part, i) for i, part in enumerate(self._parts(group)))

    def take(self, group: np.ndarray, number: int, epoch: int) -> np.ndarray:
        """The samples of group `number` (ascending rows of the index) that an epoch shows; some may be repeated."""
        if self.plain:
            return group
        parts = [self._draw(part, [number, i], epoch) for i, part in enumerate(self._parts(group))]
        return np.concatenate(parts)

    def _draw(self, part: np.ndarray, place: list[int], epoch: int) -> np.ndarray:
        count = self._count(part, place[-1])
        if self._replacement:
            rng = np.random.default_rng([self._seed, epoch, DRAW, *place])
            return part[rng.integers(0, len(part), count)] if count else part[:0]
        first, last = epoch * count, (epoch + 1) * count
        passes = range(first // len(part), -(-last // len(part))) if count else range(0)
        shuffled = [np.random.default_rng([self._seed, n, DRAW, *place]).permutation(part) for n in passes]
        skip = first - passes.start * len(part)
        return np.concatenate([part[:0], *shuffled])[skip : skip + count]

    def _count(self, part: np.ndarray, which: int) -> int:
        return round(self.times[which] * len(part))

    def _parts(self, group: np.ndarray) -> list[np.ndarray]:
        """A group's samples, split by set."""
        return np.split(group, np.searchsorted(group, self._starts[1:-1]))


def is_weighted(train: Shards | list[Weighted]) -> bool:
    """Whether the training sets are mixed by weights."""
    return isinstance(train, list) and any(isinstance(one, Weighted) for one in train)


def names_in(train: Shards | list[Weighted]) -> list[str]:
    """The names of all shards, set after set."""
    if isinstance(train, str):
        return [train]
    return [name for one in train for name in (names_in(one.shards) if isinstance(one, Weighted) else [one])]
