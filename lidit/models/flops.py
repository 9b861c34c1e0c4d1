"""How many floating point operations a forward pass takes, from sizes alone.

A multiplication and an addition are two operations; only matrix products, convolutions and attention count (norms,
activations and residuals are far below one per cent). Padding counts like tokens, since it is computed like them. A
training step takes three times as many: the backward pass is two.
"""

from __future__ import annotations

from torch import nn

from lidit.models.layers import FREQUENCIES, Mlp
from lidit.models.lidit import LIDiT
from lidit.models.prompt_encoder import PromptEncoder
from lidit.models.refiners import CollaborativeRefiner


def backbone_flops(model: LIDiT, n: int, text: int) -> int:
    """Operations of one sample's forward pass.

    Args:
        model: the transformer.
        n: image tokens.
        text: text tokens that they read.
    """
    d = model.width
    pixels = model.final.out_features  # of a patch, over all channels
    mlp = sum(_mlp(block.mlp, n) for block in model.blocks)
    attentions = len(model.blocks) * (_attention(n, n, d) + _attention(n, text, d))
    modulations = 2 * d * (9 * d * len(model.blocks) + 2 * d)
    convolutions = 2 * (2 * n * 9 * d * d)
    return 2 * (2 * n * pixels * d) + convolutions + _time(d) + attentions + mlp + modulations


def prompt_encoder_flops(model: PromptEncoder, tokens: list[int], kept: list[int]) -> int:
    """Operations of one sample's forward pass.

    Args:
        model: the prompt encoder.
        tokens: of each LLM's features, instruction and padding included.
        kept: how many of them remain once the instruction is cut, padding included.
    """
    d = model.width
    refined = kept if model.truncate == "before" else tokens
    total = _time(d) if model.time is not None else 0
    for i, (refiner, length, rest) in enumerate(zip(model.refiners, tokens, refined, strict=True)):
        total += _read(model, i, length)
        for block in refiner.blocks:
            gates = 2 * d * block.gates.out_features if block.gates else 0
            total += _attention(rest, rest, d) + _mlp(block.mlp, rest) + gates
    if isinstance(model.fusion, CollaborativeRefiner):
        for layer in model.fusion.layers:
            for block, length in zip(layer, refined, strict=True):
                others = sum(refined) - length
                total += _attention(length, others, d) + _mlp(block.mlp, length) + 2 * 6 * d * d
    return total


def _read(model: PromptEncoder, i: int, length: int) -> int:
    """Whitening, projection and pooled vector of an LLM's features."""
    d, k, pool = model.width, model.levels, model.pool[i]
    features = (pool if isinstance(pool, nn.Linear) else pool[0]).in_features  # of all levels
    pooled = 2 * features * d + (0 if isinstance(pool, nn.Linear) else 2 * d * d)
    norm = model.norms[i] if k == 1 else model.norms[i][0]
    whitened = 2 * length * features * (features // k) * norm.whiten
    project = 2 * length * features * d // (k if model.mix == "weights" else 1)
    among = 0
    if model.mix == "attention":
        among = sum(_attention(k, k, d) + _mlp(block.mlp, k) for block in model.project[i].blocks.blocks) + 2 * k * d
    return pooled + whitened + project + length * among


def _attention(queries: int, keys: int, d: int) -> int:
    """Projections of queries, keys, values and output; scores and their sum over the values."""
    return 2 * (2 * queries + 2 * keys) * d * d + 2 * 2 * queries * keys * d


def _mlp(mlp: Mlp, n: int) -> int:
    return 2 * 2 * n * mlp[0].in_features * mlp[0].out_features


def _time(d: int) -> int:
    return 2 * (FREQUENCIES * d + d * d)
