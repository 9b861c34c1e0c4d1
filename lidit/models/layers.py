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
    """LayerNorm without affine parameters; the modulation or linear layer that follows takes their place."""
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


class PreciseLinear(nn.Linear):
    """A linear layer in the precision of its weights, float32, also where autocast has the others in bfloat16.

    All that makes time, shifts, scales and gates; sums with a gate, the residual stream, are then float32, too.

    UNSTATED: the paper does not say what is computed in which precision. In bfloat16 a scale below 0.004 is lost in
    `1 + scale`, and the error of the residual stream grows with depth.
    """

    def forward(self, x: Float[Tensor, "*b e"]) -> Float[Tensor, "*b d"]:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class TimestepEmbedding(nn.Module):
    """Embedding of times t in [0, 1]: sinusoids of 1000 t, which is DiT's range, then a two-layer SiLU MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(PreciseLinear(FREQUENCIES, width), nn.SiLU(), PreciseLinear(width, width))

    def forward(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        half = FREQUENCIES // 2
        frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / half))
        angles = 1000 * t.float()[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1))


class Mlp(nn.Sequential):
    """A block's MLP: linear, GELU (tanh approximation), linear."""

    def __init__(self, width: int, ratio: float):
        hidden = int(width * ratio)
        super().__init__(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width))

    def hidden_matrices(self) -> dict[nn.Parameter, int]:
        """Both matrices, for Muon."""
        return {self[0].weight: 1, self[2].weight: 1}


class Attention(nn.Module):
    """Multi-head attention, from x to itself or to a context, with RMSNorm on queries and keys.

    LI-DiT, section 3.3, calls this norm QK-norm.

    Args:
        width: channels of x and of the context.
        heads: attention heads; must divide the width.
        qk_norm: normalise the queries and keys of each head.

    Raises:
        ValueError: the heads do not divide the width.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = True):
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide width {width}; choose a divisor")
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.query_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width)

    def hidden_matrices(self) -> dict[nn.Parameter, int]:
        """All matrices, for Muon; those for keys and for values lie over one another in one parameter."""
        return {self.query.weight: 1, self.key_value.weight: 2, self.out.weight: 1}

    def forward(
        self,
        x: Float[Tensor, "b q d"],
        context: Float[Tensor, "b k d"] | None = None,
        mask: Bool[Tensor, "b 1 #q k"] | None = None,
        keys_values: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "b q d"]:
        """Attend from x to the context, or to x itself if there is none.

        Args:
            x: the tokens that queries are made of.
            context: the tokens that keys and values are made of.
            mask: True where a query may see a key.
            keys_values: the context's keys and values from an earlier call of `keys_values`; the context is then not
                read.
        """
        key, value = keys_values or self.keys_values(x if context is None else context)
        query = self.queries(x).to(value.dtype)
        return self.out(_attend(query, key, value, mask).transpose(1, 2).flatten(2))

    def queries(self, x: Float[Tensor, "b q d"]) -> Float[Tensor, "b heads q d/heads"]:
        """Normalised queries of each head."""
        return self.query_norm(self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2))

    def keys_values(
        self, context: Float[Tensor, "b k d"]
    ) -> tuple[Float[Tensor, "b heads k d/heads"], Float[Tensor, "b heads k d/heads"]]:
        """Normalised keys and plain values of each head."""
        key, value = self.key_value(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.key_norm(key).to(value.dtype), value


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention (b heads q d); at least float32 on the CPU, where bfloat16 is ten times slower."""
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast("cpu", enabled=False):
        attended = F.scaled_dot_product_attention(query.to(wide), key.to(wide), value.to(wide), attn_mask=mask)
    return attended.to(value.dtype)
