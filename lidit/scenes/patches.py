"""Connected pieces of an image's foreground, each of which may be an object that the judge names."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lidit.scenes.draw import BACKGROUND

BLUR = 0.7  # pixels (standard deviation); image and templates are blurred alike, so noise and soft edges matter less
FOREGROUND = 0.18  # RGB distance from the background; the palest tone has 0.35, noise of 0.05 has 0.03 after the blur
FAINT = 0.6  # too large a piece is cut along a line that has less foreground than this share of the average line


@dataclass(frozen=True)
class Patch:
    """One connected piece of foreground: its difference from the background, zero outside the piece, and moments."""

    windows: np.ndarray  # y, x, channel, side, side: all windows of the padded difference, as a view
    energy: np.ndarray  # sum of squares per channel
    center: np.ndarray  # x, y of the foreground's centroid
    spread: float  # mean squared distance of the foreground from its centroid, in pixels^2


def difference(image: np.ndarray, shrink: int) -> tuple[np.ndarray, np.ndarray]:
    """The shrunk and blurred image minus its background, and the background: the median colour near BACKGROUND."""
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
    """The pieces of foreground that are large enough for an object; those too large for one are cut first."""
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
    inside = np.zeros_like(difference)
    inside[box] = difference[box] * np.isin(label[box], (0, own))[..., None]
    padded = np.pad(inside, ((side, side), (side, side), (0, 0)))
    weight = strength[piece]
    x, y = (weight * (xs + 0.5)).sum() / weight.sum(), (weight * (ys + 0.5)).sum() / weight.sum()
    spread = (weight * ((xs + 0.5 - x) ** 2 + (ys + 0.5 - y) ** 2)).sum() / weight.sum()
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(0, 1))
    return Patch(windows, (inside**2).sum((0, 1)), np.array([x, y]), float(spread))


def _components(mask: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The connected pieces of a mask (with four neighbours a pixel), each as the rows and the columns of its pixels."""
    stride = mask.shape[1] + 2
    left = np.flatnonzero(np.pad(mask, 1)).tolist()
    todo, pieces = set(left), []
    for start in left:
        if start not in todo:
            continue
        todo.remove(start)
        piece = [start]
        for at in piece:  # the list grows during the loop
            for near in (at - 1, at + 1, at - stride, at + stride):
                if near in todo:
                    todo.remove(near)
                    piece.append(near)
        flat = np.array(piece)
        pieces.append((flat // stride - 1, flat % stride - 1))
    return pieces


def _cut(piece: tuple, strength: np.ndarray, cell: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """The piece itself or, if it is too large for one object, its parts, cut along faint rows and columns.

    A piece that is too large but has no faint line is neither an object nor a row of objects: it has no parts.
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
    """Gaussian smoothing along one axis, as a matrix, by BLUR and then `extra` pixels; beyond the ends is zero."""
    variance = BLUR**2 + extra**2
    i = np.arange(side)
    kernel = np.exp(-((i[:, None] - i) ** 2) / (2 * variance))
    center = np.exp(-(np.arange(-9, 10) ** 2) / (2 * variance)).sum()
    return (kernel / center).astype(np.float32)
