"""From the features of frozen LLMs to the text that the diffusion transformer reads (LI-DiT, section 3, Figure 5).

Each LLM's tokens are projected to the transformer's width, refined without the causal mask, and fused with those of the
other LLMs. Then the instruction is cut, and the captions that remain are concatenated. Features come in as tensors, so
cached and online prompts run the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lidit.models.contracts import Features, Text, is_caption, longest_caption
from lidit.models.layers import TimestepEmbedding, masked_mean
from lidit.models.refiners import CollaborativeRefiner, ConcatFusion, LinguisticTokenRefiner, zeroed


def truncate(
    x: Float[Tensor, "b l d"], caption: Bool[Tensor, "b l"], longest: int | None = None
) -> tuple[Float[Tensor, "b k d"], Bool[Tensor, "b k"]]:
    """The caption's tokens alone, moved to the front in their order and padded to the longest row; and their mask.

    Where the length of the longest row is not given, this waits for the device.
    """
    lengths = caption.sum(1)
    longest = int(lengths.max()) if longest is None else longest
    order = caption.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    mask = torch.arange(longest, device=x.device) < lengths[:, None]
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[2])), mask


class FeatureNorm(nn.Module):
    """RMSNorm without weights of one LLM's features, then whitening with statistics of the first batches if asked for.

    UNSTATED: the paper names no norm. Residual streams are large, so one is needed. In the miniature LLMs tokens
    differ by their class far more than by their content; whitening makes the content learnable in minutes.

    Args:
        width: channels of the features.
        whiten: decorrelate the features and give every direction unit variance (ZCA), by statistics of the first
            training batches; before any training the features are only normalised.
    """

    BATCHES = 100  # training batches to measure; a single one would hold captions of one length
    FLOOR = 1e-3  # added to variances, so that tiny ones are not blown up

    def __init__(self, width: int, whiten: bool):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.whiten = whiten
        self.sum_over_ranks: Callable[[Tensor], Tensor] | None = None  # a sum over ranks, which `parallel.py` sets
        if whiten:
            self.register_buffer("batches", torch.tensor(0))
            self.register_buffer("center", torch.zeros(width))
            self.register_buffer("second_moment", torch.zeros(width, width))
            self.register_buffer("rotate", torch.eye(width))
        self._complete = False  # whether all batches are known to be measured, so that the device is not asked again

    def forward(self, x: Float[Tensor, "b l e"], caption: Bool[Tensor, "b l"]) -> Float[Tensor, "b l e"]:
        """Normalised features; training measures the statistics, on the caption's tokens alone."""
        x = self.norm(x)
        if not self.whiten:
            return x
        with torch.autocast(x.device.type, enabled=False):  # differences of large numbers need float32
            if self.training and not self.complete():
                self.measure(x[caption])
            return (x - self.center) @ self.rotate

    def complete(self) -> bool:
        """Whether the statistics are measured."""
        self._complete = self._complete or bool(self.batches >= self.BATCHES)
        return self._complete

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._complete = False  # the loaded statistics may be of fewer batches
        super()._load_from_state_dict(*args, **kwargs)

    @torch.no_grad()
    def measure(self, x: Float[Tensor, "n e"]) -> None:
        """Add a batch, of which this rank has n tokens, to the statistics."""
        sums = torch.cat([x.T @ x, x.sum(0)[None], torch.full_like(x[:1], len(x))])  # one tensor: one sum over ranks
        second, first, count = (self.sum_over_ranks(sums) if self.sum_over_ranks else sums).split([x.shape[1], 1, 1])
        self.batches += 1
        self.center.lerp_(first[0] / count[0], 1 / self.batches)
        self.second_moment.lerp_(second / count, 1 / self.batches)
        variances, directions = torch.linalg.eigh(self.second_moment - self.center.outer(self.center))
        scales = (variances.clamp(min=0) + self.FLOOR).rsqrt()
        self.rotate.copy_(directions * scales @ directions.T)


class PromptEncoder(nn.Module):
    """The prompt encoder: project, refine, fuse, cut the instruction, concatenate (sections 3.1 and 3.2).

    Args:
        llm_widths: width of each LLM's features, one per LLM.
        width: the transformer's width.
        heads: attention heads of the refiners.
        refiner_depth: blocks of each linguistic token refiner; 0 for none (Table 2).
        full_attention: refine without the causal mask (Table 3).
        gating: put adaptive gates into the refiners (Table 5).
        fusion: how the tokens of several LLMs are fused (Table 6); by default collaborative for two LLMs or more.
        fusion_depth: blocks of the collaborative refiner.
        mlp_ratio: hidden width of the refiners' MLPs over the width.
        whiten: whiten the LLMs' features with statistics of the first training batches; see `FeatureNorm`.

    Raises:
        ValueError: there is no LLM, or only one for a collaborative refiner.
    """

    def __init__(
        self,
        llm_widths: list[int],
        width: int,
        heads: int = 16,
        refiner_depth: int = 2,
        full_attention: bool = True,
        gating: bool = True,
        fusion: Literal["collaborative", "concat"] | None = None,
        fusion_depth: int = 1,
        mlp_ratio: float = 4.0,
        whiten: bool = False,
    ):
        super().__init__()
        if not llm_widths:
            raise ValueError("a prompt encoder needs the features of at least one LLM; name one under llms")
        # UNSTATED: where the width changes; we project first, after a norm, since LLM residual streams are large.
        self.norms = nn.ModuleList(FeatureNorm(e, whiten) for e in llm_widths)
        self.project = nn.ModuleList(nn.Linear(e, width) for e in llm_widths)
        # UNSTATED: what the pooled vector averages; the caption's normalised features, which are then projected.
        self.pool = nn.ModuleList(nn.Linear(e, width) for e in llm_widths)
        collaborative = len(llm_widths) > 1 if fusion is None else fusion == "collaborative"
        timed = (gating and refiner_depth > 0) or (collaborative and fusion_depth > 0)
        # UNSTATED: whether refiners and backbone share the time embedding; the prompt encoder has one of its own.
        self.time = TimestepEmbedding(width) if timed else None  # an unused embedding would get no gradient
        self.refiners = nn.ModuleList(
            LinguisticTokenRefiner(width, heads, refiner_depth, full_attention, gating, mlp_ratio) for _ in llm_widths
        )
        self.fusion = (
            CollaborativeRefiner(len(llm_widths), width, heads, fusion_depth, mlp_ratio)
            if collaborative
            else ConcatFusion()
        )
        initialise(self)

    @property
    def timeless(self) -> bool:
        """Whether the text is the same at every time, so that sampling computes it once per prompt."""
        return self.time is None

    @property
    def units(self) -> list[nn.Module]:
        """The refiners that have weights; FSDP2 gathers the weights of each one together."""
        return [part for part in (*self.refiners, self.fusion) if any(True for _ in part.parameters())]

    def forward(self, features: list[Features], t: Float[Tensor, " b"]) -> Text:
        """The text that the backbone reads at times t in [0, 1].

        Args:
            features: for each LLM, in the order of `llm_widths`: tokens (b l e), mask (b l), caption starts (b).
            t: times (b).
        """
        read = [self.read(i, each) for i, each in enumerate(features)]
        branches, masks, captions, pooled = (list(each) for each in zip(*read, strict=True))
        time = pooled[0].new_zeros(len(t), 1) if self.time is None else self.time(t)
        conditions = [time + vector for vector in pooled]
        inputs = zip(self.refiners, branches, masks, conditions, strict=True)
        branches = [refiner(x, mask, condition) for refiner, x, mask, condition in inputs]
        branches = self.fusion(branches, masks, conditions)
        cut = [truncate(*each) for each in zip(branches, captions, map(self.longest, features), strict=True)]
        # UNSTATED: how the pooled vectors of several LLMs become one; we sum them.
        return Text(torch.cat([x for x, _ in cut], 1), torch.cat([m for _, m in cut], 1), torch.stack(pooled).sum(0))

    def longest(self, features: Features) -> int | None:
        """Number of tokens that `read` says are the caption's, in the row that has most; None if it is not known."""
        return longest_caption(features)

    def read(self, i: int, features: Features) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One LLM's tokens, normalised and projected to the transformer's width.

        Args:
            i: index of the LLM.
            features: the LLM's features.

        Returns:
            Tokens (b l d), which of them are valid (b l), which the caption's (b l), and the pooled vector (b d).
        """
        tokens, mask, prompt_start = features
        caption = is_caption(mask, prompt_start)
        wide = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        tokens = self.norms[i](tokens.to(wide), caption)
        projected = self.project[i](tokens).to(wide)  # the refiners' residual stream is float32, as the backbone's
        return projected, mask, caption, self.pool[i](masked_mean(tokens, caption))


def initialise(encoder: nn.Module) -> None:
    """Give layers Xavier weights, but gates and modulations zero, so that refiners begin as the identity.

    UNSTATED: the paper starts the gates at zero and names no other weights; those are Xavier's, as in the backbone.
    """
    encoder.apply(_xavier)
    for name, module in encoder.named_modules():
        if name.endswith(("gates", "modulation")) and isinstance(module, nn.Linear):
            zeroed(module)


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
