"""How often an epoch shows the samples of each of several sets: weights, and drawing with or without replacement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAW = 3  # keeps these random numbers apart from those that order an epoch

Shards = str | list[str]


@dataclass
class Weighted:
    """A set of shards that is mixed with others.

    Args:
        shards: as for `ShardData`.
        weight: the set's share of the samples shown, against the other sets' weights; above 0.
    """

    shards: Shards
    weight: float


class Mix:
    """Which samples of a group (an image shape) an epoch shows, and how often.

    An epoch shows as many samples as all sets have together, of each set as many as its weight says: of a set that is
    to come 2.5 times an epoch, the first epoch shows the samples two or three times each and the second likewise, so
    that after two it was five times. Each pass over a set shuffles it anew, and the next begins only when it is
    through: without replacement, no sample comes twice more than another of its set and group. How many samples a
    group takes is the same in every epoch, so any position is found without going through those before it.

    Args:
        starts: first sample of each set and, last, one past the last sample.
        weights: of the sets; none: every sample once an epoch.
        replacement: draw each sample independently of what came before; an epoch then misses about a third.
        seed: of the draws.

    Raises:
        ValueError: the weights do not fit the sets, or one is not above 0.
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
        """Whether an epoch simply shows every sample once."""
        return self._weights is None and not self._replacement

    def fit(self, groups: Sequence[np.ndarray]) -> None:
        """Set how often each set comes, now that it is known how many samples each has in all groups.

        Raises:
            ValueError: a set with a weight has no samples.
        """
        if self._weights is None:
            return
        counts = np.sum([[len(part) for part in self._parts(group)] for group in groups], axis=0, initial=0)
        if not np.all(counts):
            raise ValueError(f"set {int(np.argmin(counts))} of those with weights has no samples that may be shown")
        weights = np.array(self._weights)
        self.times = weights / weights.sum() * counts.sum() / counts

    def count(self, group: np.ndarray) -> int:
        """How many samples of a group an epoch shows."""
        return sum(self._count(part, i) for i, part in enumerate(self._parts(group)))

    def take(self, group: np.ndarray, number: int, epoch: int) -> np.ndarray:
        """The samples of group `number` (rising rows of the index) that an epoch shows; some may come several times."""
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
        """A group's samples by set."""
        return np.split(group, np.searchsorted(group, self._starts[1:-1]))


def is_weighted(train: Shards | list[Weighted]) -> bool:
    """Whether sets are mixed by weights."""
    return isinstance(train, list) and any(isinstance(one, Weighted) for one in train)


def names_in(train: Shards | list[Weighted]) -> list[str]:
    """What is named, one after the other."""
    if isinstance(train, str):
        return [train]
    return [name for one in train for name in (names_in(one.shards) if isinstance(one, Weighted) else [one])]
