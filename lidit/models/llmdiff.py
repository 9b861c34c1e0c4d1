"""The LLMDiff-Adapter's text encoding: an LLM's blocks as the steps of a diffusion (Dong et al., ACM MM 2024).

A token's embedding is its noisiest state x^T, and each block is a denoising step. By Bayes' rule the text's score at
block t is what the block adds to a token with its context, minus what it adds to the token alone:
R_t(x_d; x_<d) - R_t(x_d; 0). The encoding c is the end of a Langevin chain over the blocks. `BlockwiseLLM` is the
frozen half, whose features a cache may hold, and `LLMDiffEncoder` is the trained half.
What the paper (arXiv 2502.04412) leaves open is marked UNSTATED.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lidit.draws import Draws, draw
from lidit.models.contracts import Features, Text, is_caption, longest_caption
from lidit.models.layers import masked_mean
from lidit.models.llm import FrozenLLM
from lidit.models.prompt_encoder import truncate

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # model types whose blocks are norm, attention, norm, MLP
Empty = Literal["same", "isolated", "none"]


class BlockwiseLLM(FrozenLLM):
    """A frozen LLM whose features are its embedding and each block's part of the score, (b l (1 + blocks) e), float32.

    Args:
        name: the LLM's Hugging Face id, folder, or `bundled:NAME`.
        empty: how a token without its context is read. same: block t runs on its usual input, each token seeing itself
            alone; isolated: the token runs alone through all blocks; none: it is not read, and the score is what the
            block adds. UNSTATED: whether the paper takes same or isolated.
        sums: give only the embedding and the sum of the parts, (b l 2 e), which is enough where g is constant.
        settings: other arguments of `FrozenLLM`, except `layer`.

    Raises:
        ValueError: the LLM is of a family with other blocks.
    """

    def __init__(self, name: str, empty: Empty = "same", sums: bool = False, **settings: Any):
        super().__init__(name, layer=-1, **settings)
        self.empty, self.sums = empty, sums

    @property
    def parts(self) -> int:
        """Number of levels of a feature: the embedding, and the parts of the score."""
        kind = self._config.get_text_config().model_type
        if kind not in FAMILIES:
            raise ValueError(f"{self.name} is a {kind}; block-wise encoding knows the blocks of {', '.join(FAMILIES)}")
        return 2 if self.sums else 1 + self.depth

    @property
    def width(self) -> int:
        """Channels of a feature, over all levels."""
        return super().width * self.parts

    @cached_property
    def identity(self) -> dict[str, Any]:
        """`FrozenLLM`'s identity, and how a token without its context is read."""
        return {**super().identity, "blockwise": self.empty, "sums": self.sums}

    def _states(
        self, model: Any, ids: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"], shared: int
    ) -> Float[Tensor, "b l k"]:
        """The embedding and each block's part of the score; without context a block costs its MLP, but no attention."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with recorded(model.layers) as (inputs, added):
            model(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False)
        parts, trajectory = [], inputs[0]
        for layer, x, part in zip(model.layers, inputs, added, strict=True):
            if self.empty == "none":
                parts.append(part)
                continue
            without, trajectory = alone(layer, trajectory if self.empty == "isolated" else x)
            parts.append(part - without)
        parts = [torch.stack(parts).sum(0)] if self.sums else parts
        return torch.cat([inputs[0].float(), *parts], -1)


@contextmanager
def recorded(layers: nn.ModuleList) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Record each block's input, and what the block adds to it, during a forward pass.

    What a block adds is the output of its attention and its MLP: as a difference of two large states it would be lost.
    """
    inputs: list[Tensor] = []
    added: list[Tensor] = []

    def record_input(_: nn.Module, arguments: tuple) -> None:
        inputs.append(arguments[0])

    def record_attention(_: nn.Module, arguments: tuple, output: tuple) -> None:
        added.append(output[0].float())

    def add_mlp(_: nn.Module, arguments: tuple, output: Tensor) -> None:
        added[-1] = added[-1] + output.float()

    hooks = []
    for layer in layers:
        hooks.append(layer.register_forward_pre_hook(record_input))
        hooks.append(layer.self_attn.register_forward_hook(record_attention))
        hooks.append(layer.mlp.register_forward_hook(add_mlp))
    try:
        yield inputs, added
    finally:
        for hook in hooks:
            hook.remove()


def alone(layer: Any, x: Float[Tensor, "b l e"]) -> tuple[Float[Tensor, "b l e"], Float[Tensor, "b l e"]]:
    """What a block adds to tokens that see themselves alone, in float32; and the tokens after it, as precise as before.

    A softmax over one key is 1, so attention is its value. All is rounded as in the block itself, and the sum is taken
    as in `recorded`: then nothing of a first token, which has no context, is left of the difference.
    """
    attention = layer.self_attn
    value = attention.v_proj(layer.input_layernorm(x)).unflatten(-1, (-1, attention.head_dim))
    read = attention.o_proj(value.repeat_interleave(attention.num_key_value_groups, -2).flatten(-2))
    between = x + read
    thought = layer.mlp(layer.post_attention_layernorm(between))
    return read.float() + thought.float(), between + thought


class LLMDiffEncoder(nn.Module):
    """The Langevin chain, c = c^T + sum over t of g(t) score_t + sqrt(2 h(t)) noise, normalised; g and h are learnt.

    Args:
        llm_widths: a list of the one LLM's feature width, k e.
        width: width of the denoiser's text.
        levels: k, which is 1 + the LLM's blocks; 2 for sums; 1 for a plain `FrozenLLM`, of which c is the hidden state.
        start: the start c^T of the chain is the embedding, or zero. UNSTATED: the paper does not say which.
        noise: add the chain's noise in training.
        project: map c to the denoiser's width, as LIDiT needs it; otherwise the text is c itself (b l e), for adapters.
        normalise: normalise c; if not, with levels=1 and project=False the text is the frozen model's features.

    Raises:
        ValueError: there is not exactly one LLM, or its features do not divide into the levels.
    """

    def __init__(
        self,
        llm_widths: list[int],
        width: int,
        levels: int,
        start: Literal["embedding", "zero"] = "embedding",
        noise: bool = True,
        project: bool = True,
        normalise: bool = True,
    ):
        super().__init__()
        if len(llm_widths) != 1:
            raise ValueError(f"the block-wise encoding reads one LLM, not {len(llm_widths)}; name one under llms")
        if llm_widths[0] % levels:
            raise ValueError(
                f"{llm_widths[0]} feature channels do not divide into {levels} levels; "
                "set levels to 1 + the LLM's blocks"
            )
        features = llm_widths[0] // levels
        self.levels, self.start, self.noise = levels, start, noise
        self.draws: Draws = None  # source of the chain's noise, which the training step sets
        # UNSTATED: the form of g and h; here one number per block each, g starting at 1 and softplus(h) near 0.
        self.g = nn.Parameter(torch.ones(levels - 1)) if levels > 1 else None
        self.h = nn.Parameter(torch.full((levels - 1,), -8.0)) if levels > 1 and noise else None
        # UNSTATED: the paper names no norm; residual streams grow with depth, a thousandfold in some LLMs.
        self.norm = nn.RMSNorm(features, eps=1e-6) if normalise else nn.Identity()
        self.project = nn.Linear(features, width) if project else None
        self.pool = nn.Linear(features, width) if project else None

    timeless = True  # the text is the same at every time
    units = ()  # too small to be gathered in parts

    def encode(self, x: Float[Tensor, "b l _"]) -> Float[Tensor, "b l e"]:
        """The encoding c of features, in float32: the end of the chain, normalised."""
        with torch.autocast(x.device.type, enabled=False):
            first, *parts = x.float().chunk(self.levels, -1)
            if not parts:
                return self.norm(first)
            scores = torch.stack(parts, -1)
            chain = scores @ self.g
            if self.h is not None and self.training:
                deviation = (2 * F.softplus(self.h)).sqrt()
                chain = chain + draw(torch.randn, scores.shape, self.draws, x.device) @ deviation
            return self.norm(chain + first if self.start == "embedding" else chain)

    def forward(self, features: list[Features], t: Float[Tensor, " b"]) -> Text:
        """The caption's tokens as text, the same at every time.

        Args:
            features: the LLM's features: tokens (b l k*e), mask (b l), caption starts (b).
            t: times (b).
        """
        ((tokens, mask, start),) = features
        c, mask = truncate(self.encode(tokens), is_caption(mask, start), longest_caption(features[0]))
        if self.project is None:
            return Text(c, mask, masked_mean(c, mask))
        return Text(self.project(c), mask, self.pool(masked_mean(c, mask)))
