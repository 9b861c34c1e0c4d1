"""Refiners of other systems: with rotary positions, and with shift and scale beside the gates."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lidit.models.layers import Attention, PreciseLinear, modulate
from lidit.models.refiners import LinguisticTokenRefiner, RefinerBlock, zeroed


def rotary(x: Float[Tensor, "b heads l d"]) -> Float[Tensor, "b heads l d"]:
    """Queries or keys, rotated by their positions in the sequence (RoFormer, Su et al. 2021, base 10,000)."""
    half, wide = x.shape[-1] // 2, torch.promote_types(x.dtype, torch.float32)
    frequencies = torch.exp(torch.arange(half, device=x.device, dtype=wide) * (-math.log(10_000) / half))
    angles = torch.arange(x.shape[2], device=x.device)[:, None] * frequencies
    a, b = x.to(wide).chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1).to(x.dtype)


class RotaryAttention(Attention):
    """Self-attention whose queries and keys are rotated by their positions in the sequence."""

    def queries(self, x: Float[Tensor, "b q d"]) -> Float[Tensor, "b heads q d/heads"]:
        return rotary(super().queries(x))

    def keys_values(self, context: Float[Tensor, "b k d"]) -> tuple[Tensor, Tensor]:
        key, value = super().keys_values(context)
        return rotary(key), value


class ModulatedBlock(RefinerBlock):
    """A refiner block that also shifts and scales the inputs of attention and MLP (Kandinsky 5)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, gating: bool):
        super().__init__(width, heads, mlp_ratio, gating=False)
        self.gates = zeroed(PreciseLinear(width, 6 * width))

    def forward(
        self, x: Float[Tensor, "b l d"], visible: Bool[Tensor, "b 1 #l l"], condition: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b l d"]:
        vectors = self.gates(nn.functional.silu(condition)).chunk(6, 1)
        gate_a, gate_m, shift_a, scale_a, shift_m, scale_m = vectors
        read = self.attention(modulate(self.attention_norm(x), shift_a, scale_a), mask=visible)
        x = x + gate_a[:, None] * read
        return x + gate_m[:, None] * self.mlp(modulate(self.mlp_norm(x), shift_m, scale_m))


class VariantRefiner(LinguisticTokenRefiner):
    """A linguistic token refiner with other systems' gating and positions.

    Args:
        width: channels of the tokens.
        heads: attention heads.
        depth: blocks; 0 leaves the tokens as they are.
        full_attention: let every token see every other.
        gating: multiply each residual by its gate; full: shift and scale the inputs as well.
        mlp_ratio: hidden width of the MLP over the width.
        positions: rotate queries and keys by their positions; if not, only the LLM's features tell positions.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        depth: int,
        full_attention: bool,
        gating: bool | Literal["full"],
        mlp_ratio: float,
        positions: bool,
    ):
        super().__init__(width, heads, 0, full_attention)
        kind = ModulatedBlock if gating == "full" else RefinerBlock
        self.blocks = nn.ModuleList(kind(width, heads, mlp_ratio, bool(gating)) for _ in range(depth))
        if positions:
            for block in self.blocks:
                block.attention = RotaryAttention(width, heads)
