"""A frozen LLM of which several hidden states are read, as other systems do."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lidit.models.llm import FrozenLLM


class MultiLevelLLM(FrozenLLM):
    """A `FrozenLLM` whose features are made of several hidden states.

    Args:
        name: the LLM's Hugging Face id, folder, or `bundled:NAME`.
        levels: number of hidden states that are concatenated, evenly spread up to `layer`, the lowest first; mean: the
            mean of all hidden states up to `layer`, each layer-normalised (arXiv 2506.08210).
        settings: other arguments of `FrozenLLM`.

    Raises:
        ValueError: `levels` is below 1, or as for `FrozenLLM`.
    """

    OUTPUTS = {"output_hidden_states": True}

    def __init__(self, name: str, levels: int | Literal["mean"] = 1, **settings: Any) -> None:
        if levels != "mean" and levels < 1:
            raise ValueError(f"levels of {name} is {levels}; it must be at least 1, or mean")
        super().__init__(name, **settings)
        self.levels = levels

    @property
    def width(self) -> int:
        """Channels of a feature over all levels; only the config is read."""
        return super().width * (1 if self.levels == "mean" else self.levels)

    @property
    def taps(self) -> list[int]:
        """The hidden states that are read, as transformers numbers them.

        Raises:
            ValueError: there are fewer blocks than levels.
        """
        count = self.depth if self.levels == "mean" else self.levels
        if count > max(self.depth, 1):
            raise ValueError(f"{self.name} has {self.depth} blocks up to layer {self.layer}, and levels is {count}")
        return [self.depth * (i + 1) // count for i in range(count)]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """`FrozenLLM`'s identity, and the number of levels if there are several."""
        return super().identity | ({} if self.levels == 1 else {"levels": self.levels})

    def _tapped(self, output: Any) -> Float[Tensor, "b l e"]:
        """A forward pass's hidden states at `taps`, concatenated, or their mean."""
        states = [output.hidden_states[tap] for tap in self.taps]
        if self.levels == "mean":
            return torch.stack([F.layer_norm(state, state.shape[-1:]) for state in states]).mean(0)
        return torch.cat(states, -1)
