"""Where samples come from: one generator per source, all yielding the same record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lidit.scenes.corpus import examples


@dataclass(frozen=True)
class Record:
    """One sample before it is written to a shard."""

    key: str  # unique in its set; the name of its files in the tar
    image: np.ndarray  # uint8 (H W 3), RGB
    caption: str  # the original caption
    dense: str = ""  # the synthetic one, empty where there is none


def scenes(
    count: int, seed: int = 0, width: int = 64, height: int = 64, held: bool = False, start: int = 0
) -> Iterator[Record]:
    """Records `start` to `start + count` of the endless set of drawn scenes that belongs to a seed.

    Record i depends on the seed, the size, `held` and i alone, so any process can draw any part of the set.

    Args:
        count: how many.
        seed: another seed, another set; 0 to 2^31.
        width: image width in pixels, 32 to 256.
        height: image height in pixels, 32 to 256.
        held: only scenes with looks that training never shows, instead of none of them.
        start: the first record's number.
    """
    for i in range(start, start + count):
        # A corpus seed of its own for each record, since a corpus can only be drawn from its beginning. The shift keeps
        # these seeds apart from the small ones that others give to the corpus.
        (example,) = examples(((seed + 1) << 32) + i, 1, width, height, held)
        yield Record(f"{i:08d}", example.image, example.short.text, example.dense.text)
