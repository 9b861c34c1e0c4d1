"""The foreground of an image in connected pieces, each of which may be one object for the judge to name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lidit.scenes.draw import BACKGROUND

BLUR = 0.7  # pixels; image and templates are blurred alike, so that noise and soft edges matter less
FOREGROUND = 0.18  # RGB distance from the background; the palest tone: 0.35, noise of 0.05: 0.03 after the blur
FAINT = 0.6  # a piece too large for one object is cut at a line with less foreground than this share of the average


@dataclass(frozen=True)
class Patch:
    """One connected piece of foreground: its difference from the background, zero elsewhere, and its moments."""

    windows: np.ndarray  # view y, x, channel, side, side of the padded difference
    energy: np.ndarray  # sum of squares per channel
    center: np.ndarray  # x, y of the foreground's centroid
    spread: float


def difference(image: np.ndarray, shrink: int) -> tuple[np.ndarray, np.ndarray]:
    """The image shrunk and blurred, minus its background, and that background: the median near BACKGROUND."""
    height, width = (side // shrink for side in image.shape[:2])
    small = image[: height * shrink, : width * shrink].astype(np.float32) / 255
    small = small.reshape(height, shrink, width, shrink, 3).mean((1, 3))
    background = np.array(BACKGROUND, np.float32)
    near = np.abs(small - background).max(-1) < 0.12
    if near.mean() > 0.1:
        background = np.median(small[near], axis=0)
    rows, cols = blur_matrix(height), blur_matrix(width)
    return np.einsum("yh,hwc,xw->yxc", rows, small - background, cols, optimize=True), background


def patches(difference: np.ndarray, cell: float, side: int) -> list[Patch]:
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
    """A piece as it is or, if too large for one object, cut along faint rows and columns until the parts are not.

    A large piece without a faint line is no object and no row of objects: nothing of it is kept.
    """
    extents = [int(p.max() - p.min()) + 1 for p in piece]
    axis = int(np.argmax(extents))
    if extents[axis] <= 0.92 * cell + 4:
        return [piece]
    line = piece[axis] - piece[axis].min()
    faintness = np.bincount(line, strength[piece], extents[axis])
    edge = int(0.35 * cell)
    at = edge + int(np.argmin(faintness[edge : extents[axis] - edge]))
    if faintness[at] > FAINT * faintness.mean():
        return []
    halves = [tuple(p[keep] for p in piece) for keep in (line < at, line > at)]
    return [part for half in halves if len(half[0]) for part in _cut(half, strength, cell)]


def blur_matrix(side: int, extra: float = 0.0) -> np.ndarray:
    """Gaussian smoothing by BLUR and `extra` pixels more along one axis as a matrix, zero beyond the ends."""
    variance = BLUR**2 + extra**2
    i = np.arange(side)
    kernel = np.exp(-((i[:, None] - i) ** 2) / (2 * variance))
    center = np.exp(-(np.arange(-9, 10) ** 2) / (2 * variance)).sum()
    return (kernel / center).astype(np.float32)
