"""Shuffling within a window of shards, so that only few shards are in use at one time."""

from __future__ import annotations

import numpy as np

from lidit.data.index import ShardIndex
from lidit.data.remote import Copies

ORDER = 4  # keeps these random numbers apart from those that order an epoch otherwise


class Window:
    """An epoch's shards in a random order, and its samples about where their shards stand.

    A sample's key is the place of its shard plus a random part of the width: sorted by key, the samples of about
    `width` neighbouring shards are mixed, and a shard's turn ends soon after it began. A batch has a time on the same
    scale. The samples of a rare image shape gather slowly, so that a batch of them holds some whose shards had their
    turn long before: these are not `near`.

    Args:
        shard: each sample's shard.
        shards: how many there are.
        width: shards that are mixed.
        seed: of their order.

    Raises:
        ValueError: the width is below 1.
    """

    def __init__(self, shard: np.ndarray, shards: int, width: int, seed: int) -> None:
        if width < 1:
            raise ValueError(f"shuffle_window is {width}; it is a number of shards, at least 1")
        self._shard, self._shards, self.width, self._seed = shard, shards, width, seed
        self._rng = np.random.default_rng(0)
        self._place = np.zeros(0, np.float32)

    @staticmethod
    def in_use(width: int) -> int:
        """How many shards are near at one time."""
        return 3 * width + 1

    def draw(self, epoch: int) -> None:
        """Put an epoch's shards in their order."""
        self._rng = np.random.default_rng([self._seed, epoch, ORDER])
        self._place = self._rng.permutation(self._shards).astype(np.float32)

    def sort(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Samples by their keys, and these."""
        keys = self._place[self._shard[samples]] + self._rng.random(len(samples), np.float32) * np.float32(self.width)
        order = keys.argsort(kind="stable")
        return samples[order], keys[order]

    def pieces(self, samples: int, batch_size: int, most: int) -> int:
        """Of so many samples in an epoch, how many batches' worth one window holds: at least 1, at most `most`."""
        return max(1, min(most, samples * self.width // (self._shards * batch_size)))

    def times(self, keys: np.ndarray, batch_size: int, batches: int) -> np.ndarray:
        """A time for each batch, at random between the first and the last key of the `batches` it is one of."""
        first = np.arange(0, len(keys), batch_size)
        first -= first % (batch_size * batches)
        last = np.minimum(first + batch_size * batches, len(keys)) - 1
        start, end = keys[first], keys[last]
        return start + self._rng.random(len(first), np.float32) * (end - start)

    def near(self, samples: np.ndarray, time: float) -> np.ndarray:
        """Which samples' shards have their turn at a time: bool, one per sample."""
        place = self._place[self._shard[samples]]
        return (time - 2 * self.width <= place) & (place <= time + self.width)


def check_room(index: ShardIndex, window: int | None, copies: Copies | None) -> None:
    """Refuse a window whose remote shards do not fit into their folder: each would be fetched again and again.

    Raises:
        ValueError: with the window that fits, or the room that it needs.
    """
    sizes = index.remote_bytes
    in_use = len(sizes) if window is None else Window.in_use(window)
    if copies is None or (needed := int(sizes[:in_use].sum())) <= copies.limit:
        return
    fits = (copies.limit // int(sizes[0]) - 1) // 3
    smaller = f"set data.shuffle_window to at most {fits} shards or " if fits > 0 else ""
    raise ValueError(
        f"{min(in_use, len(sizes))} remote shards are in use at one time, {needed / 1e9:.1f} GB, and shard_cache_gb is "
        f"{copies.limit / 1e9:.1f}; {smaller}raise data.shard_cache_gb"
    )
