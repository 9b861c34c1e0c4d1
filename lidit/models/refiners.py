"""The linguistic token refiner and the collaborative refiner (LI-DiT, sections 3.1 and 3.2, Figure 5).

An LLM's features serve to predict the next token, and each token has seen only those before it. The first refiner reads
each LLM's tokens again without the causal mask; the second lets the tokens of several LLMs read each other.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lidit.models.layers import Attention, Mlp, PreciseLinear, layer_norm, modulate


def zeroed(layer: nn.Linear) -> nn.Linear:
    """The same layer with weights of zero, so that it returns zero until it is trained."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class RefinerBlock(nn.Module):
    """Self-attention, then MLP; each residual is multiplied by a gate made from text and time, zero at initialisation.

    UNSTATED: we take pre-LayerNorm with affine parameters and a GELU MLP; the figure shows neither.

    UNSTATED: the paper names QK-norm for the diffusion transformer; the refiners have it, too.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, gating: bool):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, mlp_ratio)
        self.gates = zeroed(PreciseLinear(width, 2 * width)) if gating else None

    def forward(
        self, x: Float[Tensor, "b l d"], visible: Bool[Tensor, "b 1 #l l"], condition: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b l d"]:
        if self.gates is None:
            x = x + self.attention(self.attention_norm(x), mask=visible)
            return x + self.mlp(self.mlp_norm(x))
        gate_a, gate_m = self.gates(nn.functional.silu(condition)).chunk(2, 1)
        x = x + gate_a[:, None] * self.attention(self.attention_norm(x), mask=visible)
        return x + gate_m[:, None] * self.mlp(self.mlp_norm(x))


class LinguisticTokenRefiner(nn.Module):
    """Blocks of self-attention over one LLM's tokens, gated by text and time (section 3.1; Tables 3 and 5).

    Args:
        width: channels of the tokens.
        heads: attention heads.
        depth: blocks; 0 leaves the tokens as they are.
        full_attention: let every token see every other; False keeps the LLM's causal mask (Table 3).
        gating: multiply each residual by its adaptive gate (Table 5); gates are zero at initialisation.
        mlp_ratio: hidden width of the MLP over the width.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        depth: int = 2,
        full_attention: bool = True,
        gating: bool = True,
        mlp_ratio: float = 4.0,
    ):
        super().__init__()
        self.full_attention = full_attention
        self.blocks = nn.ModuleList(RefinerBlock(width, heads, mlp_ratio, gating) for _ in range(depth))

    def forward(
        self, x: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"], condition: Float[Tensor, "b _"]
    ) -> Float[Tensor, "b l d"]:
        """Refine tokens (b l d); padding (mask False) is never read. `condition` is pooled text plus time."""
        visible = mask[:, None, None]
        if not self.full_attention:
            causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)  # a padded token must see one at least
            visible = (causal & visible) | itself
        for block in self.blocks:
            x = block(x, visible, condition)
        return x


class CollaborativeBlock(nn.Module):
    """One branch's step: cross-attention to the other branches, then MLP, each with shift, scale and gate.

    UNSTATED: shifts, scales and gates come from one zero-initialised layer, so the block starts as the identity.

    UNSTATED: the paper names no norm on the other branches' tokens; they pass a LayerNorm before they are read.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.norm, self.context_norm, self.mlp_norm = layer_norm(width), layer_norm(width), layer_norm(width)
        self.attention = Attention(width, heads)
        self.mlp = Mlp(width, mlp_ratio)
        self.modulation = zeroed(PreciseLinear(width, 6 * width))

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        others: Float[Tensor, "b k d"],
        visible: Bool[Tensor, "b 1 1 k"],
        condition: Float[Tensor, "b d"],
    ) -> Float[Tensor, "b l d"]:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(nn.functional.silu(condition)).chunk(6, 1)
        read = self.attention(modulate(self.norm(x), shift_a, scale_a), self.context_norm(others), visible)
        x = x + gate_a[:, None] * read
        return x + gate_m[:, None] * self.mlp(modulate(self.mlp_norm(x), shift_m, scale_m))


class CollaborativeRefiner(nn.Module):
    """Parallel branches, one per LLM, that read each other's tokens (section 3.2; Table 6).

    Args:
        branches: number of LLMs, at least 2; with more than 2, a branch reads all the others concatenated.
        width: channels of the tokens.
        heads: attention heads.
        depth: blocks per branch.
        mlp_ratio: hidden width of the MLP over the width.

    Raises:
        ValueError: fewer than two branches.
    """

    def __init__(self, branches: int, width: int, heads: int, depth: int = 1, mlp_ratio: float = 4.0):
        super().__init__()
        if branches < 2:
            raise ValueError(f"a collaborative refiner needs at least 2 LLMs, not {branches}; set fusion=concat")
        self.layers = nn.ModuleList(
            nn.ModuleList(CollaborativeBlock(width, heads, mlp_ratio) for _ in range(branches)) for _ in range(depth)
        )

    def forward(
        self,
        branches: list[Float[Tensor, "b _ d"]],
        masks: list[Bool[Tensor, "b _"]],
        conditions: list[Float[Tensor, "b d"]],
    ) -> list[Float[Tensor, "b _ d"]]:
        """All branches (b l_i d), each after reading the others; padding (masks False) is never read."""
        everyone = range(len(branches))
        for layer in self.layers:
            branches = [
                layer[i](
                    branches[i],
                    torch.cat([branches[j] for j in everyone if j != i], 1),
                    torch.cat([masks[j] for j in everyone if j != i], 1)[:, None, None],
                    conditions[i],
                )
                for i in everyone
            ]
        return branches


class ConcatFusion(nn.Module):
    """Branches without exchange, which meet only in the concatenated text (Table 6, third row)."""

    def forward(
        self,
        branches: list[Float[Tensor, "b _ d"]],
        masks: list[Bool[Tensor, "b _"]],
        conditions: list[Float[Tensor, "b _"]],
    ) -> list[Float[Tensor, "b _ d"]]:
        return branches
