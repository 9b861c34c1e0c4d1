"""Pixels between bytes, as they are stored and shown, and the range [-1, 1], in which models compute."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

HALF = 127.5  # half the range of a byte: 0 becomes -1 and 255 becomes 1


def signed(pixels: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Pixels from 0 to 255 as float32 in [-1, 1]."""
    return pixels.contiguous().float().div_(HALF).sub_(1)


def to_tensor(images: list[np.ndarray]) -> Float[Tensor, "b 3 h w"]:
    """Images of one shape, uint8 (h w 3), as float32 in [-1, 1]."""
    return signed(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))


def to_uint8(images: Float[Tensor, "b 3 h w"]) -> list[np.ndarray]:
    """Images in [-1, 1] as uint8 (h w 3); values outside of the range become black or white."""
    pixels = ((images.float().clamp(-1, 1) + 1) * HALF).round().byte()
    return list(pixels.permute(0, 2, 3, 1).cpu().numpy())
