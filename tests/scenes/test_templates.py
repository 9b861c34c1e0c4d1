"""Templates are what `draw` draws, and the best of them is found with its place, size and colour."""

from __future__ import annotations

import numpy as np

from lidit.scenes.draw import COLORS, SHAPES, TEXTURES, Object, Scene, draw, place, stamp
from lidit.scenes.patches import blur_matrix, difference, patches
from lidit.scenes.templates import DIAMETERS, KINDS, STEPS, make_templates, rank

CELL = 64 / 3


def test_a_template_is_the_drawn_stamp_blurred() -> None:
    templates = make_templates(CELL)
    side, d = templates.side, DIAMETERS.index(0.86)
    blur = blur_matrix(side)
    for k, (shape, texture) in enumerate(KINDS):
        for step in range(STEPS):
            middle = float(side // 2)
            drawn = stamp(shape, texture, (middle + step / STEPS, middle), 0.86 * CELL, side, side)
            for part, pixels in enumerate(drawn):
                template = templates.pixels[k, d, 0, 0, step, part].reshape(side, side)
                error = np.abs(template - blur @ pixels @ blur.T)  # sampled more coarsely than `draw` does
                assert error.max() < 0.1, (shape, texture)
                assert error.mean() < 0.01, (shape, texture)


def test_the_best_match_names_the_kind_and_measures_place_size_and_color() -> None:
    templates = make_templates(CELL)
    for i, (shape, texture) in enumerate((s, t) for s in SHAPES for t in TEXTURES):
        scene = Scene((Object(shape, "purple", texture, "small", 1, 1),))
        pixels, background = difference(draw(scene, seed=i), 1)
        (patch,) = patches(pixels, CELL, templates.side)
        best, second = rank(patch, templates, background)[:2]
        ((x, y, diameter),) = place(scene, 64, 64, seed=i)
        assert (best.shape, best.texture) == (shape, texture)
        assert max(abs(best.x - x), abs(best.y - y)) < 0.5
        assert abs(best.diameter / diameter - 1) < 0.08
        assert np.linalg.norm(best.color - COLORS["purple"]) < 0.12
        assert best.loss < second.loss
