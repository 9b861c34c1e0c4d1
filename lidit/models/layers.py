"""The parts that refiners and backbone share: attention with QK-norm, MLP, timestep embedding, modulation."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

FREQUENCIES = 256  # channels of the sinusoidal timestep embedding (DiT)


def modulate(
    x: Float[Tensor, "b l d"], shift: Float[Tensor, "b d"], scale: Float[Tensor, "b d"]
) -> Float[Tensor, "b l d"]:
    """Shift and scale after a norm: `x (1 + scale) + shift`, one vector per sample."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def masked_mean(x: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"]) -> Float[Tensor, "b d"]:
    """Mean over the valid tokens; each row has at least one."""
    weight = mask.to(x.dtype)[..., None]
    return (x * weight).sum(1) / weight.sum(1)


def layer_norm(width: int) -> nn.LayerNorm:
    """LayerNorm without affine parameters: modulation or the next linear layer has them."""
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


class TimestepEmbedding(nn.Module):
    """Sinusoids of t in [0, 1], scaled to DiT's 0 to 1000, through a two-layer SiLU MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        half = FREQUENCIES // 2
        frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / half))
        angles = 1000 * t.float()[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1).to(self.mlp[0].weight.dtype))


class Mlp(nn.Sequential):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, width: int, ratio: float):
        hidden = int(width * ratio)
        super().__init__(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width))


def rotary(x: Float[Tensor, "b heads l d"]) -> Float[Tensor, "b heads l d"]:
    """Queries or keys turned by their place in the sequence (RoFormer, Su et al. 2021, base 10,000)."""
    half, wide = x.shape[-1] // 2, torch.promote_types(x.dtype, torch.float32)
    frequencies = torch.exp(torch.arange(half, device=x.device, dtype=wide) * (-math.log(10_000) / half))
    angles = torch.arange(x.shape[2], device=x.device)[:, None] * frequencies
    a, b = x.to(wide).chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention, from x to itself or to a context, with RMSNorm on queries and keys.

    QK-norm: LI-DiT, section 3.3.

    Args:
        width: of x and of the context.
        heads: attention heads; must divide the width.
        qk_norm: normalise queries and keys per head.
        positions: turn queries and keys by their places; for self-attention.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = True, positions: bool = False):
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide width {width}; choose a divisor")
        self.heads, self.positions = heads, positions
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.query_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "b q d"],
        context: Float[Tensor, "b k d"] | None = None,
        mask: Bool[Tensor, "b 1 #q k"] | None = None,
        kept: list[Tensor] | None = None,
    ) -> Float[Tensor, "b q d"]:
        """Attend from x to the context (to x itself without one).

        Args:
            x: what asks.
            context: what is read.
            mask: True where a key may be seen.
            kept: keys and values of the same context from an earlier call; empty: it is filled.
        """
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # b heads q d/heads
        key, value = kept or self._keys_values(x if context is None else context)
        if kept is not None and not kept:
            kept.extend((key, value))
        query = self.query_norm(query).to(value.dtype)
        query = rotary(query) if self.positions else query
        return self.out(_attend(query, key, value, mask).transpose(1, 2).flatten(2))

    def _keys_values(self, context: Float[Tensor, "b k d"]) -> tuple[Tensor, Tensor]:
        """Each (b heads k d/heads)."""
        key, value = self.key_value(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        key = self.key_norm(key).to(value.dtype)
        return (rotary(key) if self.positions else key), value


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention (b heads q d); never below float32 on the CPU, where that is ten times slower."""
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast("cpu", enabled=False):
        attended = F.scaled_dot_product_attention(query.to(wide), key.to(wide), value.to(wide), attn_mask=mask)
    return attended.to(value.dtype)
