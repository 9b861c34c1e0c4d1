"""Pictures: sizes as they are written, images side by side, and PNG files that are whole or not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lidit.pictures import grid, parse_size, save_image, tiled


def test_a_size_is_width_and_height() -> None:
    assert parse_size("96x64") == parse_size("96X64") == (96, 64)


@pytest.mark.parametrize("size", ["64", "64x", "x64", "64*64", "6.4x64", "-64x64", "64x64x64", "0x64", "64x²", ""])
def test_a_size_of_another_form_is_refused(size: str) -> None:
    with pytest.raises(ValueError, match="is not of the form WIDTHxHEIGHT"):
        parse_size(size)


def test_a_grid_is_near_square_in_reading_order() -> None:
    images = [np.full((4, 6, 3), i, np.uint8) for i in range(5)]
    picture = grid(images)
    assert picture.shape == (2 * 6 + 2, 3 * 8 + 2, 3)
    assert [picture[3, 3, 0], picture[3, 11, 0], picture[9, 3, 0], picture[9, 19, 0]] == [0, 1, 3, 255]


def test_no_square_of_three_tiles() -> None:
    with pytest.raises(ValueError, match="3 tiles make no square"):
        tiled([np.zeros((2, 2, 3), np.uint8)] * 3)


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(OSError, match="taken.png"):
        save_image(np.zeros((8, 8, 3), np.uint8), tmp_path / "taken.png", {"prompt": "x"})
    assert [path.name for path in tmp_path.iterdir()] == ["taken.png"]
