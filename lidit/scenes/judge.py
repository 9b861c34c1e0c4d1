"""Reads the objects of a scene back from its pixels, and says which facts of a caption hold.

The stand-in for BLIP-VQA, UniDet and Mask2Former, which the paper's benchmarks judge with. Nothing is learned: each patch of
foreground is compared by least squares with drawn templates of every shape, texture, size and place, and is an object
only if one of them explains it well and every other one clearly worse. Only the image's size and its pixels are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lidit.scenes.describe import Fact, Look, place_name, relation_between
from lidit.scenes.draw import BACKGROUND, COLORS, PALE, SHAPES, SIZES, TEXTURES, grid, inside, tone

MIN_FIT = 0.90  # an object's template explains at least this share of its patch's energy ...
MIN_MARGIN = 0.012  # ... and the runner-up, another shape or texture, explains less by at least this share
MAX_COLOR_ERROR = 0.2  # distance in RGB from the fitted to the named colour; the closest two names are 0.33 apart
COLOR_WEIGHT = 0.25  # how much a template that needs an odd colour counts as explaining less
PLACE_MARGIN = 0.04  # an object this close to the border between two thirds (share of the side) lies in both

BLUR = 0.7  # pixels; image and templates are blurred alike, so that noise and soft edges matter less
FOREGROUND = (
    0.18  # RGB distance from the background; the palest tone lies at 0.35, noise of 0.05 at 0.03 after the blur
)
WORK_CELL = 20  # larger images are shrunk by a whole factor while their cells keep this many pixels
STEPS = 4  # template positions per pixel along each axis
DIAMETERS = (0.50, 0.54, 0.58, 0.62, 0.66, 0.705, 0.76, 0.81, 0.86, 0.91)  # of the cell's shorter side
KINDS = [(shape, texture) for shape in SHAPES for texture in TEXTURES]
PALETTE = np.array(list(COLORS.values()), np.float32)


@dataclass(frozen=True)
class Seen:
    """One object read from an image; centre and diameter in pixels, `fit` the share of its patch that is explained."""

    shape: str
    color: str
    texture: str
    size: str
    x: float
    y: float
    diameter: float
    fit: float


@dataclass(frozen=True)
class Templates:
    """Drawn kinds for one cell size: kind x diameter x (place in the pixel) windows, and sums over each window.

    `pixels[..., 0, :]` is the coverage and `pixels[..., 1, :]` the pale share, flattened `side` x `side` windows.
    """

    side: int
    pixels: np.ndarray  # kind, diameter, step y, step x, 2, side * side
    products: np.ndarray  # kind, diameter, step y, step x, 2, 2: inner products of coverage and pale share
    offset: np.ndarray  # kind, diameter, 2: from the centre to the centroid of the foreground (x, y)
    spread: np.ndarray  # kind, diameter: mean squared distance of the foreground from its centroid


@dataclass(frozen=True)
class Patch:
    """One connected piece of foreground: its difference from the background, zero elsewhere, and its moments."""

    windows: np.ndarray  # view y, x, channel, side, side of the padded difference
    energy: np.ndarray  # sum of squares per channel
    center: np.ndarray  # x, y of the foreground's centroid
    spread: float


def read(image: np.ndarray) -> list[Seen]:
    """The objects in an image, from the top left, row by row of pixels.

    Args:
        image: uint8 RGB, height x width x 3, sides of 32 to 256 px.

    Raises:
        ValueError: not such an image.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"the judge reads uint8 images of height x width x 3, not {image.dtype} {image.shape}")
    height, width = image.shape[:2]
    rows, cols = grid(width, height)
    cell = min(height / rows, width / cols)
    shrink = max(1, int(cell // WORK_CELL))
    templates = make_templates(round(cell / shrink, 4))
    difference, background = _difference(image, shrink)
    found = [
        _match(p, templates, background, cell / shrink) for p in _patches(difference, cell / shrink, templates.side)
    ]
    seen = [_scaled(s, shrink) for s in found if s is not None]
    return sorted(seen, key=lambda s: (s.y, s.x))


def holds(fact: Fact, seen: Sequence[Seen], width: int, height: int) -> bool:
    """Whether a caption's fact is true of the objects seen in an image of that size."""
    candidates = [s for s in seen if _looks(s, fact.look)]
    if fact.count > 1 and len(candidates) != fact.count:
        return False
    if fact.place is not None:
        candidates = [s for s in candidates if _lies(s, fact.place, width, height)]
    if fact.relation is not None:
        others = [s for s in seen if fact.other is None or _looks(s, fact.other)]
        candidates = [s for s in candidates if any(_stands(s, o, fact.relation) for o in others if o is not s)]
    return bool(candidates)


def facts_held(facts: Iterable[Fact], image: np.ndarray) -> list[bool]:
    """Which facts of a caption an image shows."""
    seen = read(image)
    return [holds(fact, seen, image.shape[1], image.shape[0]) for fact in facts]


def _looks(seen: Seen, look: Look) -> bool:
    return look.matches(Look(seen.shape, seen.color, seen.texture, seen.size))


def _stands(a: Seen, b: Seen, relation: str) -> bool:
    return relation_between((a.x, a.y), (b.x, b.y)) == relation


def _lies(seen: Seen, place: str, width: int, height: int) -> bool:
    x, y = seen.x / width, seen.y / height
    around = (-PLACE_MARGIN, 0, PLACE_MARGIN)
    return place in {place_name(min(1, max(0, x + dx)), min(1, max(0, y + dy))) for dx in around for dy in around}


def _scaled(seen: Seen, factor: int) -> Seen:
    return Seen(
        seen.shape,
        seen.color,
        seen.texture,
        seen.size,
        seen.x * factor,
        seen.y * factor,
        seen.diameter * factor,
        seen.fit,
    )


def _blur_matrix(side: int) -> np.ndarray:
    """Gaussian smoothing along one axis as a matrix, zero beyond the ends."""
    i = np.arange(side)
    kernel = np.exp(-((i[:, None] - i) ** 2) / (2 * BLUR**2))
    centre = np.exp(-(np.arange(-5, 6) ** 2) / (2 * BLUR**2)).sum()
    return (kernel / centre).astype(np.float32)


@lru_cache(maxsize=4)
def make_templates(cell: float) -> Templates:
    """Draw every kind at every diameter and place within a pixel, for cells of this many pixels."""
    side = int(np.ceil(DIAMETERS[-1] * cell)) + 6
    fine = (side + 1) * STEPS
    at = (np.arange(fine) + 0.5) / STEPS - (side // 2 + 1)
    # rows of `gather`: blurred pixels of a window whose centre lies step / STEPS right of pixel border side // 2
    pixel = (np.arange(fine) - STEPS + np.arange(STEPS)[:, None]) // STEPS
    boxes = (pixel[:, None] == np.arange(side)[:, None]).astype(np.float32) / STEPS
    gather = (_blur_matrix(side) @ boxes).reshape(STEPS * side, fine)
    pixels = np.empty((len(KINDS), len(DIAMETERS), STEPS, STEPS, 2, side * side), np.float32)
    for k, (shape, texture) in enumerate(KINDS):
        for d, diameter in enumerate(DIAMETERS):
            u, v = np.meshgrid(at / (diameter * cell / 2), at / (diameter * cell / 2))
            mask = inside(shape, u, v).astype(np.float32)
            for part, values in enumerate((mask, mask * tone(texture, u, v))):
                windows = (gather @ values.astype(np.float32) @ gather.T).reshape(STEPS, side, STEPS, side)
                pixels[k, d, :, :, part] = windows.transpose(0, 2, 1, 3).reshape(STEPS, STEPS, side * side)
    products = pixels @ pixels.swapaxes(-1, -2)
    return Templates(side, pixels, products, *_moments_of(pixels[:, :, 0, 0], side))


def _moments_of(pixels: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Offset and spread of the templates' foreground, a pale tone counting as its distance from white does."""
    weight = (pixels[..., 0, :] - PALE * pixels[..., 1, :]).reshape(*pixels.shape[:2], side, side)
    at = np.arange(side) + 0.5 - side // 2
    mass = weight.sum((-1, -2))
    x, y = (weight * at).sum((-1, -2)) / mass, (weight * at[:, None]).sum((-1, -2)) / mass
    square = (weight * (at**2 + at[:, None] ** 2)).sum((-1, -2)) / mass
    return np.stack([x, y], -1), square - x**2 - y**2


def _difference(image: np.ndarray, shrink: int) -> tuple[np.ndarray, np.ndarray]:
    """The image shrunk and blurred, minus its background, and that background (BACKGROUND unless most of it is close by)."""
    height, width = (side // shrink for side in image.shape[:2])
    small = image[: height * shrink, : width * shrink].astype(np.float32) / 255
    small = small.reshape(height, shrink, width, shrink, 3).mean((1, 3))
    background = np.array(BACKGROUND, np.float32)
    near = np.abs(small - background).max(-1) < 0.12
    if near.mean() > 0.1:
        background = np.median(small[near], axis=0)
    difference = small - background
    rows, cols = _blur_matrix(height), _blur_matrix(width)
    return np.einsum("yh,hwc,xw->yxc", rows, difference, cols, optimize=True), background


def _patches(difference: np.ndarray, cell: float, side: int) -> list[Patch]:
    """The pieces of foreground that are large enough to be an object; pieces too large for one are cut in two."""
    strength = np.sqrt((difference**2).sum(-1))
    pieces = [
        part
        for piece in _components(strength > FOREGROUND)
        for part in _cut(piece, strength, cell)
        if len(part[0]) > (0.2 * cell) ** 2
    ]
    label = np.zeros(strength.shape, int)
    for i, piece in enumerate(pieces):
        label[piece] = i + 1
    return [_patch(difference, strength, label, i + 1, piece, side) for i, piece in enumerate(pieces)]


def _patch(difference: np.ndarray, strength: np.ndarray, label: np.ndarray, own: int, piece: tuple, side: int) -> Patch:
    ys, xs = piece
    box = (slice(max(0, ys.min() - 2), ys.max() + 3), slice(max(0, xs.min() - 2), xs.max() + 3))
    kept = np.zeros_like(difference)
    kept[box] = difference[box] * np.isin(label[box], (0, own))[..., None]
    padded = np.pad(kept, ((side, side), (side, side), (0, 0)))
    weight = strength[piece]
    x, y = (weight * (xs + 0.5)).sum() / weight.sum(), (weight * (ys + 0.5)).sum() / weight.sum()
    spread = (weight * ((xs + 0.5 - x) ** 2 + (ys + 0.5 - y) ** 2)).sum() / weight.sum()
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(0, 1))
    return Patch(windows, (kept**2).sum((0, 1)), np.array([x, y]), float(spread))


def _components(mask: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The connected pieces of a mask (four neighbours), each as its pixels' rows and columns."""
    stride = mask.shape[1] + 2
    left = np.flatnonzero(np.pad(mask, 1)).tolist()
    todo, pieces = set(left), []
    for start in left:
        if start not in todo:
            continue
        todo.remove(start)
        piece = [start]
        for at in piece:  # grows while it is walked
            for near in (at - 1, at + 1, at - stride, at + stride):
                if near in todo:
                    todo.remove(near)
                    piece.append(near)
        flat = np.array(piece)
        pieces.append((flat // stride - 1, flat % stride - 1))
    return pieces


def _cut(piece: tuple, strength: np.ndarray, cell: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """A piece that is too large for one object, cut along its faintest row or column until the parts are small enough."""
    extents = [int(p.max() - p.min()) + 1 for p in piece]
    axis = int(np.argmax(extents))
    if extents[axis] <= 0.92 * cell + 4:
        return [piece]
    line = piece[axis] - piece[axis].min()
    faintness = np.bincount(line, strength[piece], extents[axis])
    edge = int(0.35 * cell)
    at = edge + int(np.argmin(faintness[edge : extents[axis] - edge]))
    halves = [tuple(p[keep] for p in piece) for keep in (line < at, line > at)]
    return [part for half in halves if len(half[0]) for part in _cut(half, strength, cell)]


def _match(patch: Patch, templates: Templates, background: np.ndarray, cell: float) -> Seen | None:
    """The object that a patch shows, or None where no template or more than one explains it."""
    kinds = np.arange(len(KINDS))
    size = np.abs(templates.spread - patch.spread).argmin(1)
    place = patch.center - templates.offset[kinds, size]
    for best, reach, sizes in ((8, 0, 1), (5, 2, 0), (3, 1, 1)):  # keep so many, search so far
        steps = np.arange(-1, 2) * reach / STEPS if reach else np.zeros(1)
        dx, dy, ds = (a.ravel() for a in np.meshgrid(steps, steps, np.arange(-sizes, sizes + 1)))
        tried = (size[:, None] + ds).clip(0, len(DIAMETERS) - 1)
        places = place[:, None] + np.stack([dx, dy], -1)
        loss, color = _loss(
            patch, templates, background, np.repeat(kinds, len(ds)), tried.ravel(), places.reshape(-1, 2)
        )
        loss, color = loss.reshape(tried.shape), color.reshape(*tried.shape, 3)
        winner, one = loss.argmin(1), np.arange(len(kinds))
        lowest = loss[one, winner]
        order = lowest.argsort()[:best]
        kinds, size = kinds[order], tried[one, winner][order]
        place, color, lowest = places[one, winner][order], color[one, winner][order], lowest[order]
    fit, margin = 1 - lowest[0], lowest[1] - lowest[0]
    errors = np.sqrt(((PALETTE - color[0]) ** 2).sum(-1))
    if fit < MIN_FIT or margin < MIN_MARGIN or errors.min() > MAX_COLOR_ERROR:
        return None
    shape, texture = KINDS[kinds[0]]
    diameter = DIAMETERS[size[0]]
    name = min(SIZES, key=lambda s: abs(np.log(SIZES[s] / diameter)))
    where = (float(place[0, 0]), float(place[0, 1]))
    return Seen(shape, list(COLORS)[errors.argmin()], texture, name, *where, diameter * cell, float(fit))


def _loss(
    patch: Patch, templates: Templates, background: np.ndarray, kind: np.ndarray, size: np.ndarray, place: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What each template leaves unexplained of a patch, as a share of its energy, and the colour that it fits best with.

    An object of colour C with coverage c and pale share p differs from the background B by
    `C w - y0` with `w = c - PALE p` and `y0 = B c - PALE p`; C is free, per channel, at a price for odd colours.
    """
    step = np.floor(place * STEPS + 0.5).astype(int)
    whole, part = step // STEPS, step % STEPS
    index = (kind, size, part[:, 1], part[:, 0])
    side = templates.side
    corner = (whole + side - side // 2).clip(0, np.array(patch.windows.shape[1::-1]) - 1)
    window = patch.windows[corner[:, 1], corner[:, 0]].reshape(len(kind), 3, side * side)
    seen = templates.pixels[index] @ window.swapaxes(-1, -2)  # template, (coverage, pale), channel
    products = templates.products[index]
    weights = np.stack([background, np.full(3, -PALE, np.float32)])  # y0 = weights . (coverage, pale), per channel
    own = np.array([1, -PALE], np.float32)  # w
    crossed = np.einsum("a,kac->kc", own, seen) + np.einsum("a,kab,bc->kc", own, products, weights)
    norm = np.einsum("a,kab,b->k", own, products, own)[:, None]
    total = patch.energy + 2 * np.einsum("ac,kac->kc", weights, seen)
    total = total + np.einsum("ac,kab,bc->kc", weights, products, weights)
    color = (crossed / norm).clip(0, 1)
    left = total - 2 * color * crossed + color**2 * norm
    odd = ((color[:, None] - PALETTE) ** 2).sum(-1).min(-1)
    return (left.sum(-1) + COLOR_WEIGHT * odd * norm[:, 0]) / patch.energy.sum(), color
