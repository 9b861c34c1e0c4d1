"""The judge reads back what was drawn, also through noise and blur, and sees nothing where nothing is drawn."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context

import numpy as np
import pytest

from lidit.scenes.describe import Fact, Look, dense_caption, short_caption
from lidit.scenes.draw import BACKGROUND, COLORS, SIZES, Object, Scene, draw, grid, inside, place, random_scene
from lidit.scenes.judge import Seen, facts_held, holds, read

IMAGE_SIZES = [(64, 64), (96, 64), (64, 96), (128, 128)]
WHITE = np.array(BACKGROUND) * 255


def shifted(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each channel scaled and shifted by up to 2 %; floats in [0, 1] and a little beyond."""
    return image / 255 * (1 + rng.uniform(-0.02, 0.02, 3)) + rng.uniform(-0.02, 0.02, 3)


def to_bytes(image: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] as uint8."""
    return np.round(image.clip(0, 1) * 255).astype(np.uint8)


def noisy(image: np.ndarray, rng: np.random.Generator, sigma: float = 0.05) -> np.ndarray:
    """With Gaussian noise and a colour shift of 2 %."""
    return to_bytes(shifted(image, rng) + rng.normal(0, sigma, image.shape))


def blurred(image: np.ndarray, rng: np.random.Generator, sigma: float = 0.6) -> np.ndarray:
    """With a Gaussian blur and a colour shift of 2 %."""
    kernel = np.exp(-(np.arange(-4, 5) ** 2) / (2 * sigma**2))
    padded = np.pad(shifted(image, rng), ((4, 4), (4, 4), (0, 0)), mode="edge")
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(padded, 9, axis)
        padded = windows @ (kernel / kernel.sum())
    return to_bytes(padded)


def recovered(
    count: int, size: tuple[int, int], alter: Callable | None = None, seed: int = 0, processes: int = 1
) -> tuple[float, float]:
    """Share of the drawn objects read with every attribute in their place, and of the read ones that were drawn."""
    one = partial(counted, size, alter, seed)
    if processes > 1:
        with get_context("fork").Pool(processes) as pool:
            counts = pool.map(one, range(count), chunksize=50)
    else:
        counts = [one(i) for i in range(count)]
    drawn, right, reported = (sum(column) for column in zip(*counts, strict=True))
    return right / drawn, right / reported


def counted(size: tuple[int, int], alter: Callable | None, seed: int, i: int) -> tuple[int, int, int]:
    """Of image i: objects drawn, read rightly, and read."""
    rng = np.random.default_rng([seed, i])
    scene = random_scene(rng, *size)
    image = draw(scene, *size, seed=i)
    seen = read(alter(image, rng) if alter else image)
    places = place(scene, *size, seed=i)
    right = sum(any(is_it(s, o, *p) for s in seen) for o, p in zip(scene.objects, places, strict=True))
    return len(places), right, len(seen)


def is_it(seen: Seen, drawn: Object, x: float, y: float, diameter: float) -> bool:
    """Whether a reading is this object, less than an eighth of its diameter (or a pixel) off its place."""
    same = (seen.shape, seen.color, seen.texture, seen.size) == (drawn.shape, drawn.color, drawn.texture, drawn.size)
    return (
        same
        and max(abs(seen.x - x), abs(seen.y - y)) < max(1, diameter / 8)
        and abs(seen.diameter / diameter - 1) < 0.1
    )


@pytest.mark.parametrize("size", [*IMAGE_SIZES, (32, 32), (57, 83)])
def test_every_object_of_drawn_images_is_read_with_all_attributes_and_no_other(size: tuple[int, int]) -> None:
    recall, precision = recovered(100 if size == (64, 64) else 30, size)
    assert recall >= 0.99
    assert precision >= 0.99


@pytest.mark.parametrize("alter", [noisy, blurred])
@pytest.mark.parametrize("size", IMAGE_SIZES)
def test_objects_are_read_through_noise_or_blur_and_a_color_shift(size: tuple[int, int], alter: Callable) -> None:
    recall, precision = recovered(20, size, alter, seed=1)
    assert recall >= 0.97
    assert precision >= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("size", IMAGE_SIZES)
@pytest.mark.parametrize(("alter", "least", "count"), [(None, 0.99, 2000), (noisy, 0.97, 2000), (blurred, 0.97, 500)])
def test_thousands_of_images_are_read(size: tuple[int, int], alter: Callable | None, least: float, count: int) -> None:
    recall, precision = recovered(count, size, alter, seed=2, processes=os.cpu_count())
    print(f"{size} {getattr(alter, '__name__', 'drawn')}: recall {recall:.4f}, precision {precision:.4f}")
    assert recall >= least
    assert precision >= least


@pytest.mark.slow
def test_reading_an_image_costs_little_more_than_drawing_it() -> None:
    scenes = [random_scene(np.random.default_rng(i)) for i in range(100)]
    read(draw(scenes[0]))
    drawing = reading = 0.0
    for i, scene in enumerate(scenes):  # in turns, so that whatever slows one slows the other
        start = time.process_time()
        image = draw(scene, seed=i)
        middle = time.process_time()
        read(image)
        drawing, reading = drawing + middle - start, reading + time.process_time() - middle
    assert reading < 15 * drawing


@pytest.mark.parametrize("size", IMAGE_SIZES)
def test_a_blank_image_shows_no_object(size: tuple[int, int]) -> None:
    for value in (WHITE, 255, 0, 128, (200, 30, 30)):
        assert read((np.ones((size[1], size[0], 3)) * value).astype(np.uint8)) == []


@pytest.mark.parametrize("size", IMAGE_SIZES)
def test_random_noise_shows_no_object(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    shape = (size[1], size[0], 3)
    for _ in range(5):
        assert read(rng.integers(0, 256, shape).astype(np.uint8)) == []
        assert read(to_bytes(rng.normal(0.5, 0.25, shape))) == []
        for sigma in (0.05, 0.1, 0.2, 0.3, 0.5, 1):
            assert read(to_bytes(rng.normal(BACKGROUND, sigma, shape))) == [], sigma


def painted(mask: Callable, color: str = "blue", size: str = "large") -> np.ndarray:
    """A 64x64 image of one anti-aliased form in its middle cell; `mask` of coordinates in radii."""
    points = ((np.arange(64 * 5) + 0.5) / 5 - 32) / (SIZES[size] * 64 / 6)
    inked = mask(*np.meshgrid(points, points)).reshape(64, 5, 64, 5).mean((1, 3))[..., None]
    return to_bytes(np.array(BACKGROUND) * (1 - inked) + np.array(COLORS[color]) * inked)


def joined(left: str, right: str) -> Callable:
    """The left half of one shape and the right half of another."""
    return lambda u, v: np.where(u < 0, inside(left, u, v), inside(right, u, v))


@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize(
    "mask",
    [
        joined("circle", "square"),
        joined("circle", "star"),
        joined("circle", "triangle"),
        joined("diamond", "square"),
        joined("heart", "square"),
        joined("ring", "star"),
        joined("cross", "heart"),
        lambda u, v: inside("circle", u, v) & (u < 0),
        lambda u, v: inside("ring", u, v) & ~((u > 0) & (np.abs(v) < 0.3)),
        lambda u, v: inside("star", u, -v),
        lambda u, v: (np.abs(u) < 0.9) & (np.abs(v) < 0.3),
    ],
)
def test_a_smudge_between_two_shapes_is_no_object(mask: Callable, size: str) -> None:
    assert read(painted(mask, size=size)) == []


def turned(shape: str, degrees: float, squash: float) -> Callable:
    """A shape turned by an angle and made narrower and taller."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return lambda u, v: inside(shape, (c * u - s * v) / squash, (s * u + c * v) * squash)


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "diamond", "cross", "star", "ring", "heart"])
def test_an_object_slightly_turned_or_squeezed_is_still_read(shape: str) -> None:
    for degrees, squash in ((4, 1), (-4, 1), (0, 0.95), (0, 1.05)):
        assert [(s.shape, s.color, s.size) for s in read(painted(turned(shape, degrees, squash)))] == [
            (shape, "blue", "large")
        ]


def test_an_object_of_a_color_without_a_name_is_not_reported() -> None:
    image = draw(Scene((Object("circle", "red", "plain", "large", 1, 1),)))
    assert len(read(image)) == 1
    grey = np.where((image[..., 1] < 200)[..., None], 130, image).astype(np.uint8)
    assert read(grey) == []


def test_objects_that_nearly_touch_are_told_apart() -> None:
    image = np.full((64, 64, 3), 247, np.uint8)
    image[:, 16:32] = painted(turned("square", 0, 1))[:, 24:40]
    image[:, 32:49] = painted(turned("square", 0, 1), "red")[:, 23:40]  # 1.6 px of background between them
    seen = read(blurred(image, np.random.default_rng(0)))
    assert [(s.shape, s.color) for s in seen] == [("square", "blue"), ("square", "red")]


@pytest.mark.parametrize("size", IMAGE_SIZES[:2])
def test_the_facts_of_captions_hold_on_the_images_they_describe(size: tuple[int, int]) -> None:
    held = []
    for i in range(50):
        rng = np.random.default_rng([4, i])
        scene = random_scene(rng, *size)
        image = draw(scene, *size, seed=i)
        for make in (short_caption, dense_caption):
            held += facts_held(make(scene, rng, grid(*size)).facts, image)
    assert np.mean(held) >= 0.99


def seen(shape: str, color: str, x: float | int, y: float | int, texture: str = "plain", size: str = "small") -> Seen:
    """A reading at a place in a 60x60 image."""
    return Seen(shape, color, texture, size, float(x), float(y), 12.0, 1.0)


def test_a_fact_needs_one_object_with_all_that_it_names() -> None:
    there = [seen("circle", "red", 10, 10, "striped"), seen("square", "blue", 30, 30)]
    for look, holding in (
        (Look("circle"), True),
        (Look("circle", "red"), True),
        (Look("circle", "red", "striped", "small"), True),
        (Look("circle", "blue"), False),
        (Look("circle", "red", "dotted"), False),
        (Look("circle", "red", None, "large"), False),
        (Look("heart"), False),
    ):
        assert holds(Fact(look), there, 60, 60) is holding, look


def test_a_count_above_one_is_exact() -> None:
    stars = [seen("star", "red", 10 + 20 * i, 10) for i in range(3)]
    held = [holds(Fact(Look("star", "red"), n), [*stars, seen("star", "blue", 30, 30)], 60, 60) for n in (1, 2, 3, 4)]
    assert held == [True, False, True, False]


def test_a_relation_holds_between_two_different_objects() -> None:
    there = [seen("circle", "red", 10, 32), seen("square", "blue", 50, 28)]
    red, blue = Look("circle", "red"), Look("square", "blue")
    held = [
        holds(Fact(red, relation=r, other=blue), there, 60, 60)
        for r in ("to the left of", "to the right of", "above", "below")
    ]
    assert held == [True, False, False, False]
    assert holds(Fact(blue, relation="to the right of", other=red), there, 60, 60)
    assert not holds(Fact(red, relation="to the left of", other=Look("circle")), there, 60, 60)
    assert not holds(Fact(red, relation="to the left of", other=Look("star")), there, 60, 60)


def test_an_object_on_the_border_of_two_thirds_lies_in_both() -> None:
    for x, places in ((10, {"left"}), (19, {"left", "center"}), (21, {"left", "center"}), (30, {"center"})):
        there = [seen("star", "red", x, 30)]
        held = {p for p in ("left", "center", "right") if holds(Fact(Look("star"), place=p), there, 60, 60)}
        assert held == places, x


def test_facts_about_a_blank_image_do_not_hold() -> None:
    blank = np.full((64, 64, 3), 247, np.uint8)
    assert facts_held([Fact(Look("star")), Fact(Look("star"), 2)], blank) == [False, False]


@pytest.mark.parametrize(
    "image", [np.zeros((64, 64, 3)), np.zeros((64, 64), np.uint8), np.zeros((64, 64, 4), np.uint8)]
)
def test_what_is_no_rgb_image_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8 images of height x width x 3"):
        read(image)
