"""Random numbers that do not depend on the number of ranks or on the device.

A rank draws the numbers of the whole batch and takes those of its own rows, so one process and many train alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


class SharedDraws:
    """Random numbers for a global batch, of which a rank takes its rows: the same for any number of ranks.

    Args:
        seed: numbers that decide the draws, such as a run's seed and the batch's number.
        device: device on which the numbers are drawn.
        rank: index of this process's share of the batch.
        world: number of equal shares of the batch.
    """

    def __init__(self, seed: Sequence[int], device: torch.device | str = "cpu", rank: int = 0, world: int = 1) -> None:
        state = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
        self.generator = torch.Generator(device).manual_seed(int(state) >> 1)
        self.rank, self.world = rank, world


Draws = torch.Generator | SharedDraws | None
"""A source of random numbers; None is PyTorch's global generator."""


def draw(distribution: Callable, shape: Sequence[int], draws: Draws, device: torch.device | str) -> Tensor:
    """A tensor of random numbers on a device, the same on every device if the generator is on the CPU.

    Args:
        distribution: torch.rand or torch.randn.
        shape: shape of this rank's rows.
        draws: source of the numbers.
        device: device of the result.
    """
    if isinstance(draws, SharedDraws):
        everyone = draw(distribution, (shape[0] * draws.world, *shape[1:]), draws.generator, device)
        return everyone.chunk(draws.world)[draws.rank]
    source = device if draws is None else draws.device
    return distribution(tuple(shape), generator=draws, device=source).to(device)
