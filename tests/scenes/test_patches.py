"""The foreground falls into pieces, one for each object."""

from __future__ import annotations

import numpy as np

from lidit.scenes.draw import BACKGROUND, draw, random_scene
from lidit.scenes.patches import blur_matrix, difference, patches

CELL = 64 / 3


def test_each_object_is_one_patch_centred_on_it() -> None:
    for seed in range(20):
        scene = random_scene(np.random.default_rng(seed))
        pixels, _ = difference(draw(scene, seed=seed), 1)
        found = patches(pixels, CELL, 26)
        cells = sorted((int(p.center[1] // CELL), int(p.center[0] // CELL)) for p in found)
        assert cells == sorted((o.row, o.col) for o in scene.objects)


def test_the_background_is_measured_where_most_of_the_image_is_near_it() -> None:
    shade = np.array(BACKGROUND) - [0.05, 0, 0.03]
    image = np.round(np.ones((64, 64, 3)) * shade * 255).astype(np.uint8)
    image[10:20, 10:20] = 0
    assert np.abs(difference(image, 1)[1] - shade).max() < 0.01
    np.testing.assert_allclose(difference(np.zeros((64, 64, 3), np.uint8), 1)[1], BACKGROUND)


def test_two_squares_with_a_faint_seam_are_cut_apart_and_a_solid_bar_is_dropped() -> None:
    pixels = np.zeros((64, 64, 3), np.float32)
    pixels[10:26, 4:40] = -0.8
    assert patches(pixels, CELL, 26) == []
    pixels[10:26, 22] = -0.3
    left, right = patches(pixels, CELL, 26)
    assert abs(left.center[0] - 13) < 1
    assert abs(right.center[0] - 31.5) < 1


def test_specks_are_no_patches() -> None:
    pixels = np.zeros((64, 64, 3), np.float32)
    pixels[5:8, 5:8] = -0.8
    assert patches(pixels, CELL, 26) == []


def test_blurring_keeps_the_sum_and_adds_variances() -> None:
    sharp = np.zeros(41)
    sharp[20] = 1
    soft = blur_matrix(41, 1.0) @ sharp
    assert abs(soft.sum() - 1) < 1e-5
    assert abs((soft * (np.arange(41) - 20) ** 2).sum() - (0.7**2 + 1)) < 0.01
