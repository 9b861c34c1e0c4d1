"""The prompt encoder with parts of other systems in place of LI-DiT's; presets.py has their settings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lidit.models.contracts import Features, longest_caption
from lidit.models.prompt_encoder import FeatureNorm, PromptEncoder, initialise, truncate
from lidit.models.variants.levels import EachLevel, LayerMix, LevelAttention, PerBlock, Unrefined
from lidit.models.variants.refiners import VariantRefiner

Mix = Literal["together", "weights", "attention", "per_block"]


class VariantEncoder(PromptEncoder):
    """A `PromptEncoder` that can have other systems' parts in place of its own.

    Args:
        llm_widths: width of each LLM's features, one per LLM.
        width: the transformer's width.
        heads: attention heads of the refiners.
        refiner_depth: blocks of each token refiner; 0 for none.
        gating: put adaptive gates into the refiners; full: shift and scale as well, as Kandinsky 5 does.
        fusion: how the tokens of several LLMs are fused; by default collaborative for two LLMs or more, except with
            mix=per_block.
        mlp_ratio: hidden width of the refiners' MLPs over the width.
        whiten: whiten the LLMs' features; see `FeatureNorm`.
        truncate: cut the instruction after the refiners, as the paper does, before them, or never.
        positions: give the refiners rotary positions.
        pool: the pooled vector's projection: linear, or an MLP of two SiLU layers, as in HunyuanVideo.
        levels: number of hidden states in each LLM's features; must be the LLMs' own `levels`.
        mix: how several levels become one text (`levels.py`): projected together, by learnt weights, by attention, or
            not mixed: one text for each part of the backbone, which `VariantLIDiT` reads.
        settings: other arguments of `PromptEncoder`.

    Raises:
        ValueError: as for `PromptEncoder`; levels do not divide the features; mix=per_block has refiners or fusion.
    """

    def __init__(
        self,
        llm_widths: list[int],
        width: int,
        heads: int = 16,
        refiner_depth: int = 2,
        gating: bool | Literal["full"] = True,
        fusion: Literal["collaborative", "concat"] | None = None,
        mlp_ratio: float = 4.0,
        whiten: bool = False,
        truncate: Literal["after", "before", "never"] = "after",
        positions: bool = False,
        pool: Literal["linear", "mlp"] = "linear",
        levels: int = 1,
        mix: Mix = "together",
        **settings: Any,
    ):
        if wrong := [e for e in llm_widths if e % levels]:
            raise ValueError(
                f"{wrong[0]} feature channels do not divide into {levels} levels; use the same `levels` for llms and "
                "prompt_encoder"
            )
        if mix == "per_block" and (refiner_depth or fusion == "collaborative"):
            raise ValueError(
                "mix=per_block gives each block its own text, unrefined: set refiner_depth=0, fusion=concat"
            )
        fusion = "concat" if mix == "per_block" else fusion
        super().__init__(
            llm_widths,
            width,
            heads,
            refiner_depth,
            gating=bool(gating),
            fusion=fusion,
            mlp_ratio=mlp_ratio,
            whiten=whiten,
            **settings,
        )
        self.truncate = truncate
        if levels > 1:
            self.norms = nn.ModuleList(_each_level(e // levels, levels, whiten) for e in llm_widths)
        if mix != "together":
            sizes = (levels, width, heads, mlp_ratio)
            self.project = initialised(_projection(mix, e // levels, *sizes) for e in llm_widths)
        if pool == "mlp":
            self.pool = initialised(_mlp(e, width) for e in llm_widths)
        if mix == "per_block":
            self.refiners = nn.ModuleList(Unrefined() for _ in llm_widths)
        elif gating == "full" or positions:
            refiner = (width, heads, refiner_depth, self.refiners[0].full_attention, gating, mlp_ratio, positions)
            self.refiners = initialised(VariantRefiner(*refiner) for _ in llm_widths)

    def longest(self, features: Features) -> int | None:
        """As in `PromptEncoder`, but not known where the instruction is part of the caption."""
        return None if self.truncate == "never" else super().longest(features)

    def read(self, i: int, features: Features) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As in `PromptEncoder`; here `truncate` may cut the instruction, or count it as part of the caption."""
        tokens, mask, prompt_start = features
        if self.truncate == "never":
            prompt_start = torch.zeros_like(prompt_start)
        x, mask, caption, pooled = super().read(i, (tokens, mask, prompt_start))
        if self.truncate == "before":
            x, mask = truncate(x, caption, longest_caption(features))
            caption = mask
        return x, mask, caption, pooled


def initialised(modules: Iterable[nn.Module]) -> nn.ModuleList:
    """The modules, with the initial weights that `PromptEncoder` gives to its own."""
    parts = nn.ModuleList(modules)
    initialise(parts)
    return parts


def _each_level(features: int, levels: int, whiten: bool) -> EachLevel:
    return EachLevel(FeatureNorm(features, whiten) for _ in range(levels))


def _projection(mix: Mix, features: int, levels: int, width: int, heads: int, mlp_ratio: float) -> nn.Module:
    """From normalised features (b l k*e) to the width, or k times the width for mix=per_block."""
    if mix == "weights":
        return LayerMix(levels, features, width)
    if mix == "attention":
        return LevelAttention(levels, features, width, heads, 2, mlp_ratio)
    return PerBlock(levels, features, width)


def _mlp(features: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))
