"""Makes stored samples into what the model reads: pixels in [-1, 1], and captions, some of them dropped."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def to_tensor(images: list[np.ndarray]) -> Float[Tensor, "b 3 h w"]:
    """Images of one shape, uint8 (H W 3), as float32 in [-1, 1]. As in the paper, there is no augmentation."""
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return stacked.contiguous().float().div_(127.5).sub_(1)


def dropped_captions(seed: int, epoch: int, count: int, probability: float) -> np.ndarray:
    """Which of `count` samples lose their caption in an epoch (classifier-free guidance), bool (count).

    The result depends on the arguments alone, and the draw of sample i does not depend on `count`.
    """
    return np.random.default_rng([seed, epoch, 2]).random(count, dtype=np.float32) < probability


def caption(text: dict[str, str], dense: bool, blank: bool) -> str:
    """The caption that a sample is shown with: the original one, the dense one, or the empty one."""
    return "" if blank else text["dense" if dense else "caption"]
