"""Scenes of coloured shapes and their pixels.

A scene has one to eight objects in the cells of a grid. It stands in for a photograph in the miniature world: every
attribute that the paper's benchmarks ask for (colour, shape, texture, size, count, spatial relation) is drawn exactly,
so that `judge` can read it back without a learned model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star", "ring", "heart")
COLORS = {
    "red": (0.87, 0.13, 0.15),
    "green": (0.10, 0.60, 0.22),
    "blue": (0.13, 0.28, 0.85),
    "yellow": (0.96, 0.80, 0.06),
    "purple": (0.56, 0.16, 0.72),
    "orange": (0.97, 0.47, 0.05),
    "cyan": (0.05, 0.74, 0.82),
    "black": (0.08, 0.08, 0.08),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = {"large": 0.86, "small": 0.58}  # diameter as a share of the cell's shorter side
BACKGROUND = (0.97, 0.97, 0.97)
PALE = 0.6  # a texture's second tone is this share of the way from the object's colour to white
MIN_SIDE, MAX_SIDE, MIN_CELL = 32, 256, 16
MAX_OBJECTS = 8
SUPERSAMPLE = 5
MARGIN = 0.75  # pixels between an object and its cell's border that stay free


@dataclass(frozen=True)
class Object:
    """One object: its look and the grid cell it lies in."""

    shape: str
    color: str
    texture: str
    size: str
    row: int
    col: int


@dataclass(frozen=True)
class Scene:
    """One to eight objects in distinct cells."""

    objects: tuple[Object, ...]

    def __post_init__(self) -> None:
        """Refuse a scene that cannot be drawn."""
        if not 1 <= len(self.objects) <= MAX_OBJECTS:
            raise ValueError(f"a scene has 1 to {MAX_OBJECTS} objects, this one has {len(self.objects)}")
        if len({(o.row, o.col) for o in self.objects}) < len(self.objects):
            raise ValueError("two objects of a scene share a cell; give each object its own cell")


def grid(width: int, height: int) -> tuple[int, int]:
    """Rows and columns of an image's grid: three cells along the shorter side, fewer if cells would be under 16 pixels.

    Args:
        width: image width in pixels, 32 to 256.
        height: image height in pixels, 32 to 256.

    Raises:
        ValueError: a side is outside 32 to 256 pixels.
    """
    for side in (width, height):
        if not MIN_SIDE <= side <= MAX_SIDE:
            raise ValueError(f"scenes are drawn with sides of {MIN_SIDE} to {MAX_SIDE} px, not {width}x{height}")
    short = min(width, height)
    cell = short / min(3, short // MIN_CELL)
    return int(height / cell + 1e-6), int(width / cell + 1e-6)


def place(scene: Scene, width: int, height: int, seed: int) -> list[tuple[float, float, float]]:
    """Where each object is drawn: centre x, centre y and diameter in pixels, jittered inside its cell.

    Raises:
        ValueError: an object lies outside the image's grid.
    """
    rows, cols = grid(width, height)
    cell_h, cell_w = height / rows, width / cols
    rng = np.random.default_rng([seed, 7])
    places = []
    for o in scene.objects:
        if not (0 <= o.row < rows and 0 <= o.col < cols):
            raise ValueError(f"cell ({o.row}, {o.col}) is outside the {rows}x{cols} grid of a {width}x{height} image")
        diameter = SIZES[o.size] * min(cell_h, cell_w)
        room = np.array([cell_w, cell_h]) / 2 - diameter / 2 - MARGIN
        jitter = rng.uniform(-1, 1, 2) * room.clip(0)
        places.append(((o.col + 0.5) * cell_w + jitter[0], (o.row + 0.5) * cell_h + jitter[1], diameter))
    return places


def inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points lie inside a shape; u points right, v down, both in units of the shape's radius."""
    r = np.hypot(u, v)
    au, av = np.abs(u), np.abs(v)
    if shape == "circle":
        return r <= 1
    if shape == "square":
        return np.maximum(au, av) <= 0.84
    if shape == "triangle":
        return (v <= 0.8) & (au <= (v + 1) * 0.55)
    if shape == "diamond":
        return au / 0.8 + av <= 1
    if shape == "cross":
        return (np.minimum(au, av) <= 0.32) & (np.maximum(au, av) <= 0.95)
    if shape == "ring":
        return (r <= 1) & (r >= 0.52)
    if shape == "heart":
        x, y = u * 1.22, -v * 1.22 + 0.12
        return (x**2 + y**2 - 1) ** 3 - x**2 * y**3 <= 0
    if shape == "star":
        return _star(u, v)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points lie inside a five-pointed star with one point up, tested after folding all spikes into one."""
    angle = np.arctan2(u, -v) % (2 * np.pi / 5)
    angle = np.minimum(angle, 2 * np.pi / 5 - angle)  # fold all points into one half spike
    r = np.hypot(u, v)
    x, y = r * np.cos(angle), r * np.sin(angle)
    inner = 0.5
    ix, iy = inner * np.cos(np.pi / 5), inner * np.sin(np.pi / 5)
    return (x - 1) * iy - (ix - 1) * y <= 0  # inside the edge from the tip (1, 0) to (ix, iy)


def tone(texture: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """1 where a texture shows its pale second tone, 0 where it shows the object's colour; u and v as in `inside`."""
    if texture == "plain":
        return np.zeros_like(u)
    if texture == "striped":
        return (np.cos(np.pi * v / 0.4) < 0).astype(u.dtype)
    if texture == "checkered":
        return (np.floor(u / 0.5) + np.floor(v / 0.5)) % 2
    if texture == "dotted":
        du, dv = (np.mod(x + 0.35, 0.7) - 0.35 for x in (u, v))
        return (np.hypot(du, dv) <= 0.24).astype(u.dtype)
    raise ValueError(f"unknown texture {texture!r}; known: {', '.join(TEXTURES)}")


def stamp(
    shape: str, texture: str, center: tuple[float, float], diameter: float, width: int, height: int
) -> tuple[np.ndarray, np.ndarray]:
    """Anti-aliased coverage and pale share (both height x width, in [0, 1]) of one object on an empty canvas."""
    half = diameter / 2 + 1
    x0, x1 = max(0, int(center[0] - half)), min(width, int(center[0] + half) + 2)
    y0, y1 = max(0, int(center[1] - half)), min(height, int(center[1] + half) + 2)
    sub = (np.arange(SUPERSAMPLE) + 0.5) / SUPERSAMPLE
    xs = (np.arange(x0, x1)[:, None] + sub).ravel()
    ys = (np.arange(y0, y1)[:, None] + sub).ravel()
    u, v = np.meshgrid((xs - center[0]) / (diameter / 2), (ys - center[1]) / (diameter / 2))
    mask = inside(shape, u, v).astype(np.float64)
    coverage, pale = np.zeros((height, width)), np.zeros((height, width))
    blocks = (y1 - y0, SUPERSAMPLE, x1 - x0, SUPERSAMPLE)
    coverage[y0:y1, x0:x1] = mask.reshape(blocks).mean((1, 3))
    pale[y0:y1, x0:x1] = (mask * tone(texture, u, v)).reshape(blocks).mean((1, 3))
    return coverage, pale


def draw(scene: Scene, width: int = 64, height: int = 64, seed: int = 0) -> np.ndarray:
    """Draw a scene: uint8 RGB, height x width x 3, the same for the same arguments.

    Args:
        scene: what to draw.
        width: image width in pixels, 32 to 256.
        height: image height in pixels, 32 to 256.
        seed: decides the jitter of the objects inside their cells.

    Raises:
        ValueError: a side is out of range or an object lies outside the image's grid.
    """
    image = np.ones((height, width, 3)) * BACKGROUND
    for o, (x, y, diameter) in zip(scene.objects, place(scene, width, height, seed), strict=True):
        coverage, pale = stamp(o.shape, o.texture, (x, y), diameter, width, height)
        color = np.array(COLORS[o.color])
        light = color + PALE * (1 - color)
        image = image * (1 - coverage[..., None]) + color * (coverage - pale)[..., None] + light * pale[..., None]
    return np.round(image * 255).clip(0, 255).astype(np.uint8)


def held_out(objects: Iterable[Object]) -> bool:
    """Whether a scene's set of (colour, shape, texture) is in the tenth of all sets that training never shows."""
    looks = sorted(f"{o.color} {o.shape} {o.texture}" for o in objects)
    return hashlib.sha256("; ".join(looks).encode()).digest()[0] % 10 == 0


def random_object(rng: np.random.Generator, row: int, col: int) -> Object:
    """An object with uniformly random attributes, except that half of all objects are plain."""
    texture = "plain" if rng.random() < 0.5 else str(rng.choice(TEXTURES[1:]))
    return Object(
        str(rng.choice(SHAPES)), str(rng.choice(list(COLORS))), texture, str(rng.choice(list(SIZES))), row, col
    )


def random_scene(rng: np.random.Generator, width: int = 64, height: int = 64, count: int | None = None) -> Scene:
    """A scene of independent objects in random cells.

    Args:
        rng: the source of randomness.
        width: width in pixels of the image that it is for.
        height: height in pixels of the image that it is for.
        count: number of objects; by default random, from 1 to 8 or to the number of cells.

    Raises:
        ValueError: `count` is above 8, or above the number of cells.
    """
    rows, cols = grid(width, height)
    room = min(MAX_OBJECTS, rows * cols)
    if count is None:
        count = int(rng.integers(1, room + 1))
    if count > room:
        raise ValueError(f"a {width}x{height} image has room for {room} objects, not {count}")
    cells = rng.permutation(rows * cols)[:count]
    return Scene(tuple(random_object(rng, int(c) // cols, int(c) % cols) for c in cells))
