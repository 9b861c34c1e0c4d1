"""Ways to make one text of several hidden states of an LLM, called levels.

Features hold their levels concatenated, (b l k e) as (b l k*e), the lowest level first.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lidit.models.refiners import LinguisticTokenRefiner


class EachLevel(nn.ModuleList):
    """One module per level, each applied to its own level."""

    def forward(self, x: Float[Tensor, "b l _"], *arguments: Tensor) -> Float[Tensor, "b l _"]:
        parts = zip(self, x.chunk(len(self), -1), strict=True)
        return torch.cat([module(part, *arguments) for module, part in parts], -1)


class LayerMix(nn.Module):
    """A mean of the levels with learnt weights, then a projection (as in ELMo, Peters et al. 2018).

    Args:
        levels: k, the number of levels.
        features: e, channels of a level.
        width: d, channels of the result.
    """

    def __init__(self, levels: int, features: int, width: int):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(levels))
        self.project = nn.Linear(features, width)

    def forward(self, x: Float[Tensor, "b l _"]) -> Float[Tensor, "b l d"]:
        levels = x.unflatten(-1, (len(self.weights), -1))
        return self.project(torch.einsum("blke,k->ble", levels, self.weights.softmax(0)))


class LevelAttention(nn.Module):
    """For each token, attention among its levels, then a learnt sum of them (Krea 2).

    DEVIATION: Krea gates each residual by a sigmoid of the token itself; here there is no gate.

    Args:
        levels: k, the number of levels.
        features: e, channels of a level.
        width: d, channels of the result.
        heads: attention heads.
        depth: blocks.
        mlp_ratio: hidden width of the MLPs over the width.
    """

    def __init__(self, levels: int, features: int, width: int, heads: int, depth: int, mlp_ratio: float):
        super().__init__()
        self.levels = levels
        self.project = nn.Linear(features, width)
        self.place = nn.Parameter(torch.zeros(levels, width))  # tells the levels apart
        self.blocks = LinguisticTokenRefiner(width, heads, depth, gating=False, mlp_ratio=mlp_ratio)
        self.weights = nn.Parameter(torch.full((levels,), 1 / levels))

    def forward(self, x: Float[Tensor, "b l _"]) -> Float[Tensor, "b l d"]:
        tokens = self.project(x.unflatten(-1, (self.levels, -1))) + self.place
        each = tokens.flatten(0, 1)  # a sequence of levels per token
        visible: Bool[Tensor, "n k"] = torch.ones(each.shape[:2], dtype=torch.bool, device=x.device)
        read = self.blocks(each, visible, each[:, 0]).unflatten(0, x.shape[:2])  # ungated: no condition is read
        return torch.einsum("blkd,k->bld", read, self.weights)


class PerBlock(nn.ModuleList):
    """A projection for each level; block i of the backbone reads level i k / depth (Playground v3).

    Args:
        levels: k, the number of levels.
        features: e, channels of a level.
        width: d; the result has k d channels.
    """

    def __init__(self, levels: int, features: int, width: int):
        super().__init__(nn.Linear(features, width) for _ in range(levels))

    def forward(self, x: Float[Tensor, "b l _"]) -> Float[Tensor, "b l _"]:
        return torch.cat([linear(part) for linear, part in zip(self, x.chunk(len(self), -1), strict=True)], -1)


class Unrefined(nn.Module):
    """A refiner that leaves the tokens as they are, of any width."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()

    def forward(
        self, x: Float[Tensor, "b l _"], mask: Bool[Tensor, "b l"], condition: Float[Tensor, "b _"]
    ) -> Float[Tensor, "b l _"]:
        return x
