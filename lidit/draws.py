"""Random numbers that a sample has for itself, whatever the number of ranks.

A rank draws for its own samples alone, on its own device, and one process and many train alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


class SampleDraws:
    """Random numbers that follow from a seed and a sample's number: the same for any number of ranks and passes.

    The samples of a batch have numbers in a row. A second draw for the same samples gives other numbers than the first.
    Devices of another kind draw other numbers.

    Args:
        seed: numbers that decide the draws, such as a run's seed.
        first: number of the first sample of the batch; at least 0.
    """

    def __init__(self, seed: Sequence[int], first: int = 0) -> None:
        self.seed, self.first = tuple(seed), first
        self.drawn = 0  # how often numbers were drawn for these samples

    def draw(self, distribution: Callable, shape: Sequence[int], device: torch.device | str) -> Tensor:
        """A tensor of this shape, of which each row has its sample's numbers."""
        rows, generator = torch.empty(tuple(shape), device=device), torch.Generator(device)
        for number, row in enumerate(rows, self.first):
            state = np.random.SeedSequence([*self.seed, number, self.drawn]).generate_state(1, np.uint64)[0]
            distribution(row.shape, generator=generator.manual_seed(int(state) >> 1), out=row)
        self.drawn += 1
        return rows


Draws = torch.Generator | SampleDraws | None
"""A source of random numbers; None is PyTorch's global generator."""


def draw(distribution: Callable, shape: Sequence[int], draws: Draws, device: torch.device | str) -> Tensor:
    """A tensor of random numbers on a device, the same on every device if the source is a generator on the CPU.

    Args:
        distribution: torch.rand or torch.randn.
        shape: number of this rank's samples, then the shape of what is drawn for each.
        draws: source of the numbers.
        device: device of the result.
    """
    if isinstance(draws, SampleDraws):
        return draws.draw(distribution, shape, device)
    source = device if draws is None else draws.device
    return distribution(tuple(shape), generator=draws, device=source).to(device)
