"""From the features of frozen LLMs to the text the diffusion transformer reads (LI-DiT, section 3, Figure 5).

Each LLM's tokens are projected to the transformer's width, refined without the causal mask, and fused with those of the
other LLMs; then the instruction is cut and what remains is concatenated. Features come in as tensors, so cached and
online prompts are the same code.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lidit.models.layers import TimestepEmbedding, masked_mean
from lidit.models.levels import EachLevel, LayerMix, LevelAttention, PerBlock
from lidit.models.refiners import CollaborativeRefiner, ConcatFusion, LinguisticTokenRefiner, zeroed

Features = tuple[Float[Tensor, "b _ _"], Bool[Tensor, "b _"], Int[Tensor, " b"]]  # tokens, mask, prompt_start


class Kept:
    """Keys and values that each block has made of a text, by its number; no dict itself, which FSDP2 would copy."""

    def __init__(self) -> None:
        self.of_block: dict[int, list[Tensor]] = defaultdict(list)


class Text(NamedTuple):
    """What a backbone reads: tokens, which of them are valid, and one vector for modulation.

    `kept` is there where the same text is read at many times, without gradients.
    """

    tokens: Float[Tensor, "b l d"]
    mask: Bool[Tensor, "b l"]
    pooled: Float[Tensor, "b d"]
    kept: Kept | None = None


def truncate(
    x: Float[Tensor, "b l d"], kept: Bool[Tensor, "b l"]
) -> tuple[Float[Tensor, "b k d"], Bool[Tensor, "b k"]]:
    """Keep the marked tokens, moved to the front in their order and padded to the longest row."""
    lengths = kept.sum(1)
    longest = int(lengths.max())
    order = kept.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    mask = torch.arange(longest, device=x.device) < lengths[:, None]
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[2])), mask


class FeatureNorm(nn.Module):
    """RMSNorm of one LLM's features without weights, and on request whitening by statistics of the first batches.

    # UNSTATED: the paper names no norm. Residual streams are large, so one is needed. In the miniature LLMs tokens
    # differ by their class far more than by what they say, which whitening makes learnable in minutes.

    Args:
        width: of the features.
        whiten: decorrelate them and give every direction unit variance (ZCA), as measured in the first training
            batches; until then, and before any training, they are only normalised.
    """

    BATCHES = 100  # measured; one alone would hold captions of one length
    FLOOR = 1e-3  # variances below are not blown up

    def __init__(self, width: int, whiten: bool):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.whiten = whiten
        self.total: Callable[[Tensor], Tensor] = _of_one_rank  # where there are several, `parallel` sums over them
        if whiten:
            self.register_buffer("batches", torch.tensor(0))
            self.register_buffer("center", torch.zeros(width))
            self.register_buffer("second_moment", torch.zeros(width, width))
            self.register_buffer("rotate", torch.eye(width))

    def forward(self, x: Float[Tensor, "b l e"], kept: Bool[Tensor, "b l"]) -> Float[Tensor, "b l e"]:
        """Normalised features; training measures from the caption tokens alone."""
        x = self.norm(x)
        if not self.whiten:
            return x
        with torch.autocast(x.device.type, enabled=False):  # small differences of large numbers
            if self.training and self.batches < self.BATCHES:
                self.measure(x[kept])
            return (x - self.center) @ self.rotate

    @torch.no_grad()
    def measure(self, x: Float[Tensor, "n e"]) -> None:
        """Take one more batch, n tokens of it on this rank, into the statistics."""
        sums = self.total(torch.cat([x.T @ x, x.sum(0)[None], torch.full_like(x[:1], len(x))]))
        self.batches += 1
        self.center.lerp_(sums[-2] / sums[-1], 1 / self.batches)
        self.second_moment.lerp_(sums[:-2] / sums[-1], 1 / self.batches)
        variances, directions = torch.linalg.eigh(self.second_moment - self.center.outer(self.center))
        scales = (variances.clamp(min=0) + self.FLOOR).rsqrt()
        self.rotate.copy_(directions * scales @ directions.T)


class PromptEncoder(nn.Module):
    """Project, refine, collaborate, truncate, concatenate.

    Args:
        llm_widths: width of each LLM's features, one per LLM.
        width: the transformer's width.
        heads: attention heads of the refiners.
        refiner_depth: blocks of each linguistic token refiner; 0 for none (Table 2).
        full_attention: refiners without the causal mask (Table 3).
        gating: adaptive gates in the refiners (Table 5).
        fusion: how several LLMs meet (Table 6); by default collaborative where there are at least two.
        fusion_depth: blocks of the collaborative refiner.
        truncate: cut the instruction after the refiners, as the paper does, before them, or never.
        mlp_ratio: hidden width of the refiners' MLPs over the width.
        whiten: whiten the LLMs' features by statistics of the first training batches; see `FeatureNorm`.
        positions: rotary positions in the refiners.
        pool: the pooled vector's projection: linear, or an MLP of two SiLU layers, as in HunyuanVideo.
        levels: hidden states of which each LLM's features are made; as the LLMs' own setting.
        mix: how several levels become one text (`levels.py`): projected together, by learnt weights, by attention, or
            one for each part of the backbone.
        preset: name of one of `presets.py`; it sets how LLMs are read, too, so `lidit fit` puts its settings in place.

    Raises:
        ValueError: no LLM, a collaborative refiner with only one, levels that do not fit, or a preset that was not put
            in place.
    """

    def __init__(
        self,
        llm_widths: list[int],
        width: int,
        heads: int = 16,
        refiner_depth: int = 2,
        full_attention: bool = True,
        gating: bool | Literal["full"] = True,
        fusion: Literal["collaborative", "concat"] | None = None,
        fusion_depth: int = 1,
        truncate: Literal["after", "before", "never"] = "after",
        mlp_ratio: float = 4.0,
        whiten: bool = False,
        positions: bool = False,
        pool: Literal["linear", "mlp"] = "linear",
        levels: int = 1,
        mix: Literal["together", "weights", "attention", "per_block"] = "together",
        preset: str | None = None,
    ):
        super().__init__()
        if preset is not None:
            raise ValueError(f"preset {preset} is put in place by `lidit fit`; here, give its settings: see presets.py")
        if not llm_widths:
            raise ValueError("a prompt encoder needs the features of at least one LLM; name one under llms")
        if wrong := [e for e in llm_widths if e % levels]:
            raise ValueError(f"features of {wrong[0]} channels are not of {levels} levels; set levels of llms alike")
        if mix == "per_block" and (refiner_depth or fusion == "collaborative"):
            raise ValueError(
                "mix=per_block gives each block its own text, unrefined: set refiner_depth=0, fusion=concat"
            )
        self.width, self.truncate, self.levels, self.mix = width, truncate, levels, mix
        # UNSTATED: where the width changes; we project first, after a norm, since LLM residual streams are large.
        self.norms = nn.ModuleList(_each_level(e, levels, whiten) for e in llm_widths)
        self.project = nn.ModuleList(_projection(mix, levels, e, width, heads, mlp_ratio) for e in llm_widths)
        # UNSTATED: which tokens the pooled vector averages, and where; the caption's, after a projection of its own.
        self.pool = nn.ModuleList(nn.Linear(e, width) if pool == "linear" else _mlp(e, width) for e in llm_widths)
        collaborative = fusion == "collaborative" or (fusion is None and len(llm_widths) > 1 and mix != "per_block")
        timed = (gating and refiner_depth > 0) or (collaborative and fusion_depth > 0)
        self.time = TimestepEmbedding(width) if timed else None  # one that nothing reads would get no gradient
        self.refiners = nn.ModuleList(
            LinguisticTokenRefiner(width, heads, refiner_depth, full_attention, gating, mlp_ratio, positions)
            for _ in llm_widths
        )
        self.fusion = (
            CollaborativeRefiner(len(llm_widths), width, heads, fusion_depth, mlp_ratio)
            if collaborative
            else ConcatFusion()
        )
        self.apply(_initialise)
        for name, module in self.named_modules():
            if name.endswith(("gates", "modulation")) and isinstance(module, nn.Linear):
                zeroed(module)

    @property
    def timeless(self) -> bool:
        """Whether the text is the same at every time, so that sampling computes it once per prompt."""
        return self.time is None

    def forward(self, features: list[Features], t: Float[Tensor, " b"]) -> Text:
        """Refined text for time t in [0, 1].

        Args:
            features: per LLM, in the order of `llm_widths`: tokens (b l e), mask (b l), start of the caption (b).
            t: times (b).
        """
        weight = next(self.pool[0].parameters())
        time = weight.new_zeros(len(t), 1) if self.time is None else self.time(t)
        branches, masks, kepts, pooled = [], [], [], []
        for i, (tokens, mask, prompt_start) in enumerate(features):
            kept = mask & (torch.arange(mask.shape[1], device=mask.device) >= prompt_start[:, None])
            kept = mask if self.truncate == "never" else kept
            tokens = self.norms[i](tokens.to(torch.promote_types(weight.dtype, torch.float32)), kept)
            pooled.append(self.pool[i](masked_mean(tokens, kept)))
            x = self.project[i](tokens)
            if self.truncate == "before":
                x, mask = truncate(x, kept)
                kept = mask
            refined = self.refiners[i](x, mask, time + pooled[i]) if self.mix != "per_block" else x
            branches.append(refined)
            masks.append(mask)
            kepts.append(kept)
        branches = self.fusion(branches, masks, [time + p for p in pooled])
        cut = [truncate(x, kept) for x, kept in zip(branches, kepts, strict=True)]
        return Text(torch.cat([x for x, _ in cut], 1), torch.cat([m for _, m in cut], 1), torch.stack(pooled).sum(0))


def _each_level(features: int, levels: int, whiten: bool) -> nn.Module:
    norms = [FeatureNorm(features // levels, whiten) for _ in range(levels)]
    return norms[0] if levels == 1 else EachLevel(norms)


def _projection(mix: str, levels: int, features: int, width: int, heads: int, mlp_ratio: float) -> nn.Module:
    """From normalised features (b l k*e) to the width, or k times the width for mix=per_block."""
    each = features // levels
    if mix == "weights":
        return LayerMix(levels, each, width)
    if mix == "attention":
        return LevelAttention(levels, each, width, heads, 2, mlp_ratio)
    if mix == "per_block":
        return PerBlock(levels, each, width)
    return nn.Linear(features, width)


def _mlp(features: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))


def _of_one_rank(x: Tensor) -> Tensor:
    return x


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
