"""Shuffling within a window of shards, so that only few shards are in use at one time."""

from __future__ import annotations

import numpy as np

from lidit.data.index import ShardIndex
from lidit.data.remote import Copies

ORDER = 4  # part of the seed: other random numbers than those that order an epoch without a window


class Window:
    """Puts an epoch's shards in a random order, and its samples near the places of their shards.

    A sample's key is the place of its shard plus a random number from 0 to the width. Sorted by key, the samples of
    about `width` neighbouring shards are mixed, and a shard is in use for a short time only. A batch has a time on the
    same scale. It takes long to fill a batch of a rare image shape, so such a batch holds some samples whose shards
    were in use long before: these samples are not `near`.

    Args:
        shard: the number of each sample's shard.
        shards: number of shards.
        width: number of shards that are mixed at one time.
        seed: decides the order of the shards.

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
        """How many shards are in the current window at one time."""
        return 3 * width + 1

    def draw(self, epoch: int) -> None:
        """Put an epoch's shards in their order."""
        self._rng = np.random.default_rng([self._seed, epoch, ORDER])
        self._place = self._rng.permutation(self._shards).astype(np.float32)

    def sort(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The samples sorted by their keys, and the sorted keys."""
        keys = self._place[self._shard[samples]] + self._rng.random(len(samples), np.float32) * np.float32(self.width)
        order = keys.argsort(kind="stable")
        return samples[order], keys[order]

    def pieces(self, samples: int, batch_size: int, most: int) -> int:
        """How many batches one window of an epoch with `samples` samples holds: at least 1, at most `most`."""
        return max(1, min(most, samples * self.width // (self._shards * batch_size)))

    def times(self, keys: np.ndarray, batch_size: int, batches: int) -> np.ndarray:
        """A time for each batch, drawn between the first and the last key of the group of `batches` it belongs to."""
        first = np.arange(0, len(keys), batch_size)
        first -= first % (batch_size * batches)
        last = np.minimum(first + batch_size * batches, len(keys)) - 1
        start, end = keys[first], keys[last]
        return start + self._rng.random(len(first), np.float32) * (end - start)

    def near(self, samples: np.ndarray, time: float) -> np.ndarray:
        """Which samples belong to shards in the current window: bool, one per sample."""
        place = self._place[self._shard[samples]]
        return (time - 2 * self.width <= place) & (place <= time + self.width)


def check_room(index: ShardIndex, window: int | None, copies: Copies | None) -> None:
    """Refuse a window whose remote shards do not fit into their folder: each would be fetched again and again.

    Raises:
        ValueError: the shards do not fit; the message names a window that fits, or the room that is needed.
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
