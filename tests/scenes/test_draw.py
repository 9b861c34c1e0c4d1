"""Drawn scenes are what they say, wherever and however often they are drawn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lidit.scenes.draw import (
    BACKGROUND,
    COLORS,
    MARGIN,
    PALE,
    SHAPES,
    SIZES,
    TEXTURES,
    Object,
    Scene,
    draw,
    grid,
    held_out,
    inside,
    place,
    random_object,
    random_scene,
    stamp,
    tone,
)

ONE = Object("circle", "red", "plain", "large", 1, 1)


def test_the_same_arguments_draw_the_same_pixels() -> None:
    scene = random_scene(np.random.default_rng(0), 96, 64)
    first, again = (draw(scene, 96, 64, seed=3) for _ in range(2))
    assert first.dtype == np.uint8
    assert first.shape == (64, 96, 3)
    np.testing.assert_array_equal(first, again)


def test_another_seed_moves_the_objects_inside_their_cells() -> None:
    scene = Scene((Object("star", "blue", "plain", "small", 0, 2),))
    places = np.array([place(scene, 64, 64, seed)[0][:2] for seed in range(200)])
    assert np.ptp(places, axis=0).min() > 4
    assert (places - SIZES["small"] * 64 / 6 >= [2 * 64 / 3 + MARGIN, MARGIN]).all()
    assert (places + SIZES["small"] * 64 / 6 <= [64 - MARGIN, 64 / 3 - MARGIN]).all()


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (96, 64), (64, 96), (128, 128), (256, 32), (57, 211), (256, 256)])
def test_every_size_has_room_for_a_scene_on_cells_of_sixteen_pixels(size: tuple[int, int]) -> None:
    rows, cols = grid(*size)
    assert size[1] / rows >= 16
    assert size[0] / cols >= 16
    scene = random_scene(np.random.default_rng(1), *size)
    image = draw(scene, *size)
    assert image.shape == (size[1], size[0], 3)
    assert (image != np.round(np.array(BACKGROUND) * 255)).any()


@pytest.mark.parametrize("size", [(31, 64), (64, 257)])
def test_a_side_out_of_range_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="32 to 256 px"):
        draw(Scene((ONE,)), *size)


def test_a_scene_has_one_to_eight_objects_in_cells_of_their_own() -> None:
    with pytest.raises(ValueError, match="this one has 0"):
        Scene(())
    with pytest.raises(ValueError, match="this one has 9"):
        Scene(tuple(Object("circle", "red", "plain", "small", 0, i) for i in range(9)))
    with pytest.raises(ValueError, match="share a cell"):
        Scene((ONE, ONE))


def test_an_object_outside_the_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="outside the 3x3 grid"):
        draw(Scene((Object("circle", "red", "plain", "small", 0, 3),)), 64, 64)


def test_pixels_far_from_every_object_are_background() -> None:
    image = draw(Scene((ONE,)), 64, 64)
    image[20:44, 20:44] = 247
    assert (image == 247).all()


def test_edges_are_soft_and_the_middle_has_the_exact_color() -> None:
    image = draw(Scene((ONE,)), 64, 64).astype(int)
    np.testing.assert_array_equal(image[32, 32], np.round(np.array(COLORS["red"]) * 255))
    between = (image[..., 1] > 40) & (image[..., 1] < 240)
    assert between.sum() > 20


def test_a_texture_alternates_the_color_and_its_pale_tone() -> None:
    for texture in TEXTURES[1:]:
        image = draw(Scene((Object("square", "blue", texture, "large", 1, 1),)), 128, 128) / 255
        color = np.array(COLORS["blue"])
        for value in (color, color + PALE * (1 - color)):
            assert (np.abs(image - value).max(-1) < 0.01).sum() > 50, texture


def test_no_two_kinds_of_object_look_alike() -> None:
    kinds = itertools.product(SHAPES, TEXTURES, SIZES)
    masks = {k: np.concatenate(stamp(k[0], k[1], (16.0, 16.0), SIZES[k[2]] * 21, 32, 32)) for k in kinds}
    for a, b in itertools.combinations(masks, 2):
        assert np.abs(masks[a] - masks[b]).sum() > 5, (a, b)


def test_an_unknown_shape_or_texture_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match="'blob'"):
        inside("blob", np.zeros(1), np.zeros(1))
    with pytest.raises(ValueError, match="'furry'"):
        tone("furry", np.zeros(1), np.zeros(1))


def test_about_a_tenth_of_pairs_is_held_out_whatever_their_order_size_and_place() -> None:
    rng = np.random.default_rng(2)
    pairs = [(random_object(rng, 0, 0), random_object(rng, 0, 1)) for _ in range(4000)]
    assert 0.08 < np.mean([held_out(p) for p in pairs]) < 0.12
    for a, b in pairs[:200]:
        moved = Object(a.shape, a.color, a.texture, "small" if a.size == "large" else "large", 2, 2)
        assert held_out((a, b)) == held_out((b, moved))


def test_random_scenes_show_everything_there_is_and_as_many_objects_as_asked() -> None:
    rng = np.random.default_rng(3)
    objects = [o for _ in range(200) for o in random_scene(rng, count=5).objects]
    assert len(objects) == 1000
    for name, values in (("shape", SHAPES), ("color", COLORS), ("texture", TEXTURES), ("size", SIZES)):
        assert {getattr(o, name) for o in objects} == set(values)
    with pytest.raises(ValueError, match="room for 4 objects"):
        random_scene(rng, 32, 32, count=5)
