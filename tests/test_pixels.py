"""Pixels: to the range of the models and back."""

from __future__ import annotations

import numpy as np
import torch

from lidit.pixels import to_tensor, to_uint8


def test_every_byte_is_the_same_after_the_way_to_the_model_and_back() -> None:
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    seen = to_tensor([image])
    assert seen.min() == -1
    assert seen.max() == 1
    assert np.array_equal(to_uint8(seen)[0], image)


def test_what_lies_outside_of_the_range_is_black_or_white() -> None:
    image = torch.tensor([-7.0, 7.0, 0.0]).view(1, 3, 1, 1)
    assert to_uint8(image)[0].tolist() == [[[0, 255, 128]]]
