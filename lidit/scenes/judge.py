"""The judge reads the objects of a scene back from its pixels, and says which facts of a caption hold.

It stands in for BLIP-VQA, UniDet and Mask2Former, which judge in the paper's benchmarks. Nothing is learned: each patch
of foreground is compared by least squares with drawn templates of every shape, texture, size, place and softness. It is
an object only if one template explains it well everywhere and those of every other kind explain it clearly worse. The
judge knows nothing about the scene: it uses only the image's size and pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lidit.scenes.describe import Fact, Look, place_name, relation_between
from lidit.scenes.draw import COLORS, SIZES, grid
from lidit.scenes.patches import difference, patches
from lidit.scenes.templates import PALETTE, Match, make_templates, rank

MIN_FIT = 0.94  # an object's template explains at least this share of its patch's energy ...
MIN_LEAD = 0.2  # ... the next best kind leaves unexplained at least this share more than the best ...
MAX_FLAW = 0.4  # ... and no pixel differs from the template by more than this share of the object's contrast
MAX_COLOR_ERROR = 0.2  # RGB distance between fitted and named colour; the two closest names are 0.33 apart
PLACE_MARGIN = 0.04  # share of the side: an object this close to the border of two thirds lies in both

WORK_CELL = 20  # larger images are shrunk by a whole factor as long as their cells have at least this many pixels


@dataclass(frozen=True)
class Seen:
    """One object read from an image: centre and diameter in pixels; `fit`: the share of its patch that is explained."""

    shape: str
    color: str
    texture: str
    size: str
    x: float
    y: float
    diameter: float
    fit: float


def read(image: np.ndarray) -> list[Seen]:
    """The objects in an image, sorted from top to bottom, then from left to right.

    Args:
        image: uint8 RGB, height x width x 3, with sides of 32 to 256 px.

    Raises:
        ValueError: the image is not of this kind.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"the judge reads uint8 images of height x width x 3, not {image.dtype} {image.shape}")
    rows, cols = grid(image.shape[1], image.shape[0])
    cell = min(image.shape[0] / rows, image.shape[1] / cols)
    shrink = max(1, int(cell // WORK_CELL))
    templates = make_templates(round(cell / shrink, 4))
    pixels, background = difference(image, shrink)
    ranked = [rank(patch, templates, background) for patch in patches(pixels, templates.cell, templates.side)]
    seen = [_seen(matches[0], cell, shrink) for matches in ranked if is_clear(matches)]
    return sorted(seen, key=lambda s: (s.y, s.x))


def is_clear(matches: Sequence[Match]) -> bool:
    """Whether the best match is an object: it explains its patch, no other kind does, and its colour has a name."""
    best, second = matches[:2]
    odd = np.sqrt(((PALETTE - best.color) ** 2).sum(-1).min())
    explained = best.loss <= 1 - MIN_FIT and best.flaw <= MAX_FLAW
    return bool(explained and second.loss >= (1 + MIN_LEAD) * best.loss and odd <= MAX_COLOR_ERROR)


def _seen(match: Match, cell: float, shrink: int) -> Seen:
    """A match in pixels of the image, with the names of the nearest colour and size."""
    color = list(COLORS)[((PALETTE - match.color) ** 2).sum(-1).argmin()]
    x, y, diameter = (value * shrink for value in (match.x, match.y, match.diameter))
    size = min(SIZES, key=lambda name: abs(np.log(SIZES[name] * cell / diameter)))
    return Seen(match.shape, color, match.texture, size, x, y, diameter, 1 - match.loss)


def holds(fact: Fact, seen: Sequence[Seen], width: int, height: int) -> bool:
    """Whether a fact is true of the objects that were seen in an image of width x height pixels."""
    candidates = [s for s in seen if _looks(s, fact.look)]
    if fact.count > 1 and len(candidates) != fact.count:
        return False
    if fact.place is not None:
        candidates = [s for s in candidates if _lies(s, fact.place, width, height)]
    if fact.relation is not None:
        others = [s for s in seen if fact.other is None or _looks(s, fact.other)]
        candidates = [s for s in candidates if any(_related(s, o, fact.relation) for o in others if o is not s)]
    return bool(candidates)


def facts_held(facts: Iterable[Fact], image: np.ndarray) -> list[bool]:
    """For each fact of a caption, whether an image shows it."""
    seen = read(image)
    return [holds(fact, seen, image.shape[1], image.shape[0]) for fact in facts]


def _looks(seen: Seen, look: Look) -> bool:
    return look.matches(Look(seen.shape, seen.color, seen.texture, seen.size))


def _related(a: Seen, b: Seen, relation: str) -> bool:
    return relation_between((a.x, a.y), (b.x, b.y)) == relation


def _lies(seen: Seen, place: str, width: int, height: int) -> bool:
    x, y = seen.x / width, seen.y / height
    around = (-PLACE_MARGIN, 0, PLACE_MARGIN)
    return place in {place_name(max(0.0, x + dx), max(0.0, y + dy)) for dx in around for dy in around}
