"""Drawn templates of every shape, texture and size, and their least-squares comparison with a patch of foreground."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lidit.scenes.draw import COLORS, PALE, SHAPES, TEXTURES, inside, tone
from lidit.scenes.patches import Patch, blur_matrix

COLOR_WEIGHT = 0.25  # price of a colour that is far from all named ones, in the loss of a template
STEPS = 4  # positions of a template within a pixel, along each axis
DIAMETERS = (0.50, 0.54, 0.58, 0.62, 0.66, 0.705, 0.76, 0.81, 0.86, 0.91)  # shares of the cell's shorter side
SOFTNESS = (0.0, 0.6, 1.0)  # pixels of extra blur, because generated edges are softer than drawn ones
KINDS = [(shape, texture) for shape in SHAPES for texture in TEXTURES]
PALETTE = np.array(list(COLORS.values()), np.float32)


def _moves(reach: int, sizes: int, soft: int) -> np.ndarray:
    """All changes (x, y, diameter, softness; in steps of each) up to these sizes; x and y never change together."""
    ways = [(0, 0)] + [(reach, 0), (-reach, 0), (0, reach), (0, -reach)] * (reach > 0)
    return np.array([(*way, d, s) for way in ways for d in range(-sizes, sizes + 1) for s in range(soft + 1)])


# Rounds of the search: how many kinds stay in it afterwards, and the changes that are tried.
SEARCH = ((8, _moves(0, 1, 0)), (5, _moves(2, 0, 2)), (3, _moves(1, 1, 0)))


@dataclass(frozen=True)
class Templates:
    """The templates for one cell size: a window for each kind, diameter, softness and place in a pixel.

    A kind is a shape with a texture. `pixels[..., 0, :]` is the coverage and `pixels[..., 1, :]` the pale share, each a
    flattened window of `side` x `side` pixels.
    """

    cell: float
    side: int
    pixels: np.ndarray  # kind, diameter, softness, step y, step x, 2, side * side
    products: np.ndarray  # kind, diameter, softness, step y, step x, 2, 2: inner products of coverage and pale share
    offset: np.ndarray  # kind, diameter, 2: from the centre to the centroid of the foreground (x, y)
    spread: np.ndarray  # kind, diameter: mean squared distance of the foreground from its centroid


@dataclass(frozen=True)
class Match:
    """One template compared with a patch.

    `x`, `y` and `diameter` are in pixels; `color` is the RGB colour that fits best; `loss` is the share of the patch's
    energy that stays unexplained; `flaw` is the largest difference at one pixel, as a share of the object's contrast.
    """

    shape: str
    texture: str
    x: float
    y: float
    diameter: float
    color: np.ndarray
    loss: float
    flaw: float


@lru_cache(maxsize=2)
def make_templates(cell: float) -> Templates:
    """Draw the templates of every kind, diameter, softness and place within a pixel, for cells of `cell` pixels."""
    side = int(np.ceil(DIAMETERS[-1] * cell)) + 6
    fine = (side + 1) * STEPS
    at = (np.arange(fine) + 0.5) / STEPS - (side // 2 + 1)
    # rows of `gather`: blurred pixels of a window whose centre lies step / STEPS to the right of pixel border side // 2
    pixel = (np.arange(fine) - STEPS + np.arange(STEPS)[:, None]) // STEPS
    boxes = (pixel[:, None] == np.arange(side)[:, None]).astype(np.float32) / STEPS
    gathers = [(blur_matrix(side, extra) @ boxes).reshape(STEPS * side, fine) for extra in SOFTNESS]
    shape = (len(KINDS), len(DIAMETERS), len(SOFTNESS), STEPS, STEPS, 2, side * side)
    pixels = np.empty(shape, np.float32)
    for (k, d, s), gather in zip(np.ndindex(shape[:3]), itertools.cycle(gathers)):
        for part, values in enumerate(_drawn(KINDS[k], at / (DIAMETERS[d] * cell / 2))):
            windows = (gather @ values @ gather.T).reshape(STEPS, side, STEPS, side)
            pixels[k, d, s, :, :, part] = windows.transpose(0, 2, 1, 3).reshape(STEPS, STEPS, side * side)
    return Templates(cell, side, pixels, pixels @ pixels.swapaxes(-1, -2), *_moments_of(pixels[:, :, 0, 0, 0], side))


def _drawn(kind: tuple[str, str], at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each fine point shows the object, and whether its pale tone; `at` is in radii, along each axis."""
    u, v = np.meshgrid(at, at)
    mask = inside(kind[0], u, v).astype(np.float32)
    return mask, (mask * tone(kind[1], u, v)).astype(np.float32)


def _moments_of(pixels: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Offset and spread of the templates' foreground; a pale tone weighs less, like its contrast with white."""
    weight = (pixels[..., 0, :] - PALE * pixels[..., 1, :]).reshape(*pixels.shape[:2], side, side)
    at = np.arange(side) + 0.5 - side // 2
    mass = weight.sum((-1, -2))
    x, y = (weight * at).sum((-1, -2)) / mass, (weight * at[:, None]).sum((-1, -2)) / mass
    square = (weight * (at**2 + at[:, None] ** 2)).sum((-1, -2)) / mass
    return np.stack([x, y], -1), square - x**2 - y**2


def rank(patch: Patch, templates: Templates, background: np.ndarray) -> list[Match]:
    """The kinds that explain a patch best, best first, each with its best place, size, softness and colour.

    Every kind starts with the centroid and the spread of the patch; around this start the better kinds are searched on.
    """
    kinds = np.arange(len(KINDS))
    size, soft = np.abs(templates.spread - patch.spread).argmin(1), np.zeros_like(kinds)
    place = patch.center - templates.offset[kinds, size]
    loss, color = np.ones(len(kinds)), np.zeros((len(kinds), 3))  # nothing is explained yet
    for survivors, moves in SEARCH:
        sizes = (size[:, None] + moves[:, 2]).clip(0, len(DIAMETERS) - 1)
        softs = (soft[:, None] + moves[:, 3]).clip(0, len(SOFTNESS) - 1)
        places = place[:, None] + moves[:, :2] / STEPS
        tried = np.broadcast_to(kinds[:, None], sizes.shape), sizes, softs
        loss, color = _loss(patch, templates, background, tried, places)
        order = loss.min(1).argsort()[:survivors]
        best = order, loss[order].argmin(1)
        kinds, size, soft, place, loss, color = kinds[order], *(a[best] for a in (sizes, softs, places, loss, color))
    flaw = _flaw(patch, templates, background, (kinds, size, soft), place, color)
    return [
        Match(KINDS[k][0], KINDS[k][1], float(x), float(y), DIAMETERS[d] * templates.cell, c, float(left), float(worst))
        for k, d, (x, y), c, left, worst in zip(kinds, size, place, color, loss, flaw, strict=True)
    ]


def _lay(
    patch: Patch, templates: Templates, tried: tuple[np.ndarray, ...], places: np.ndarray
) -> tuple[tuple, np.ndarray]:
    """The indices of templates (kind, diameter, softness) put at `places`, and the patch's pixels in their windows."""
    step = np.floor(places * STEPS + 0.5).astype(int)
    whole, part = step // STEPS, step % STEPS
    corner = (whole + templates.side - templates.side // 2).clip(0, np.array(patch.windows.shape[1::-1]) - 1)
    window = patch.windows[corner[..., 1], corner[..., 0]]
    return (*tried, part[..., 1], part[..., 0]), window.reshape(*window.shape[:-2], templates.side**2)


def _loss(
    patch: Patch, templates: Templates, background: np.ndarray, tried: tuple[np.ndarray, ...], places: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The share of a patch's energy that each template leaves unexplained, and the template's best colour.

    An object of colour C with coverage c and pale share p differs from the background B by `C w - y0` with
    `w = c - PALE p` and `y0 = B c - PALE p`. C is free in each channel, but a colour far from all names has a price.
    """
    index, window = _lay(patch, templates, tried, places)
    own = np.array([1, -PALE], np.float32)  # w
    base = np.stack([background, np.full(3, -PALE, np.float32)])  # y0 per channel
    seen = templates.pixels[index] @ window.swapaxes(-1, -2)  # kind, move, (coverage, pale), channel
    products = templates.products[index]
    crossed = own @ (seen + products @ base)
    norm = (own @ products @ own)[..., None]
    total = patch.energy + (base * (2 * seen + products @ base)).sum(-2)
    color = (crossed / norm).clip(0, 1)
    left = total - 2 * color * crossed + color**2 * norm
    odd = ((color[..., None, :] - PALETTE) ** 2).sum(-1).min(-1)
    return (left.sum(-1) + COLOR_WEIGHT * odd * norm[..., 0]) / patch.energy.sum(), color


def _flaw(
    patch: Patch,
    templates: Templates,
    background: np.ndarray,
    tried: tuple[np.ndarray, ...],
    place: np.ndarray,
    color: np.ndarray,
) -> np.ndarray:
    """The largest difference that each template leaves at one pixel, as a share of its colour's contrast."""
    index, window = _lay(patch, templates, tried, place)
    parts = np.stack([color - background, PALE * (1 - color)], -1)  # what full coverage and a full pale share add
    left = parts @ templates.pixels[index] - window
    return np.sqrt((left**2).sum(-2).max(-1)) / np.linalg.norm(color - background, axis=-1)
