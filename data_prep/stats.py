"""Says what a set of shards holds: samples by bucket, lengths of captions, and histograms of the resolutions.

lidit prep stats shards/train --png resolutions.png
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lidit.data.index import ShardIndex

SHARES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
LISTED = 30  # buckets that get a row; the others share one


def stats(shards: str | list[str], png: str = "resolutions.png") -> None:
    """Print counts by bucket and the lengths of captions, and draw a histogram of the resolutions.

    Only the indices are read.

    Args:
        shards: the shards, named in the ways that `ShardData` reads.
        png: image file to write.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a shard cannot be read, or there are no samples.
    """
    index = ShardIndex(shards)
    if not len(index):
        raise ValueError(f"{index.source} holds no samples")
    print(f"{index.source}: {len(index)} samples in {len(index.paths)} shards\n")
    print("\n".join([*_buckets(index), "", *_lengths(index)]))
    draw(index.column("width"), index.column("height"), Path(png))
    print(f"\n{png}: the resolutions", flush=True)


def _buckets(index: ShardIndex) -> Iterator[str]:
    """A row for each image shape, the most frequent first; a training batch has images of one shape."""
    counts = buckets(index.column("width"), index.column("height"))
    yield f"{'bucket':>12}{'aspect':>8}{'samples':>12}{'share':>8}"
    for (width, height), count in list(counts.items())[:LISTED]:
        yield f"{f'{width}x{height}':>12}{width / height:>8.2f}{count:>12}{count / len(index):>8.1%}"
    if rest := list(counts.values())[LISTED:]:
        yield f"{f'{len(rest)} others':>12}{'':>8}{sum(rest):>12}{sum(rest) / len(index):>8.1%}"


def buckets(width: np.ndarray, height: np.ndarray) -> dict[tuple[int, int], int]:
    """How many images there are of each (width, height), the most frequent first.

    Args:
        width: width of each image, in pixels.
        height: height of each image, in pixels.
    """
    shapes, counts = np.unique(width.astype(np.int64) << 32 | height, return_counts=True)  # quicker than pairs
    order = np.argsort(-counts, kind="stable")
    return {(s >> 32, s & 0xFFFFFFFF): c for s, c in zip(shapes[order].tolist(), counts[order].tolist(), strict=True)}


def _lengths(index: ShardIndex) -> Iterator[str]:
    """A row for each kind of caption: quantiles of its length, in characters, over the samples that have one."""
    yield f"{'characters':>12}{'captions':>12}" + "".join(f"{f'{share:.0%}':>8}" for share in SHARES)
    for kind in ("caption", "dense"):
        chars = index.column(f"{kind}_chars")
        chars = chars[chars > 0]
        # this method gives lengths that occur, not means of two lengths
        found = np.quantile(chars, SHARES, method="inverted_cdf") if len(chars) else []
        yield f"{kind:>12}{len(chars):>12}" + "".join(f"{int(length):>8}" for length in found)


def draw(width: np.ndarray, height: np.ndarray, png: Path) -> None:
    """Draw histograms of the resolution, as the side of a square with as many pixels, and of the aspect.

    Args:
        width: width of each image, in pixels.
        height: height of each image, in pixels.
        png: image file to write.
    """
    from matplotlib.figure import Figure  # without pyplot, a figure is drawn by Agg, which needs no display

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    side, aspect = figure.subplots(1, 2)
    sides = np.log2(width.astype(np.float64) * height) / 2
    side.hist(sides, bins=50, range=(np.floor(sides.min()), np.floor(sides.max()) + 1))
    powers = np.arange(np.floor(sides.min()), np.floor(sides.max()) + 2)
    side.set_xticks(powers, [f"{2**power:.0f}" for power in powers])
    side.set(xlabel="√(width · height) in pixels", ylabel="images", title=f"{len(width)} images")
    aspect.hist(np.log2(width / height), bins=50)
    ratios = ("1:4", "1:3", "1:2", "2:3", "1:1", "3:2", "2:1", "3:1", "4:1")
    aspect.set_xticks([np.log2(int(ratio[0]) / int(ratio[2])) for ratio in ratios], ratios)
    aspect.set(xlabel="width : height")
    figure.savefig(png, dpi=120)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    try:
        auto_cli(stats, as_positional=False)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
