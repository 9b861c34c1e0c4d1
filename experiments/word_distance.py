"""How well an LLM's features tell words apart: the further experiment of Table 3.

Measured is the squared Mahalanobis distance between the mean features of two words, averaged over all pairs of nine
words. Features are whitened by all caption tokens, as the prompt encoder whitens them. The first miniature T5, whose
embeddings began too small, is in commit f5eb2a8.

    python -m experiments.word_distance
"""

from __future__ import annotations

from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lidit.models.llm import FrozenLLM
from lidit.models.t5 import FrozenT5
from lidit.scenes.corpus import examples

WORDS = ("red", "green", "blue", "yellow", "purple", "circle", "square", "star", "heart")
FLOOR = 1e-4  # added to each variance


def word_distance(llm: FrozenLLM, captions: list[str]) -> float:
    """The mean distance between those words that are one token of the LLM and occur in the captions."""
    tokens, mask, start = llm(captions)
    ids, features = [], []
    for caption, row, is_token, first in zip(captions, tokens, mask, start.tolist(), strict=True):
        split = llm.prompts.split(caption)
        ids += split.ids[split.start :]
        features.append(row[is_token][first:])
    seen, x = torch.tensor(ids), torch.cat(features)
    x = F.rms_norm(x, x.shape[1:])
    inverse = torch.linalg.inv(torch.cov(x.T) + FLOOR * torch.eye(x.shape[1]))
    gaps = [a - b for a, b in combinations(word_means(llm, seen, x), 2)]
    return sum(float(gap @ inverse @ gap) for gap in gaps) / len(gaps)


def word_means(llm: FrozenLLM, ids: Tensor, x: Float[Tensor, "n e"]) -> list[Float[Tensor, " e"]]:
    """The mean feature of each of these words."""
    encoded = [llm.prompts.tokenizer.encode(f" {word}", add_special_tokens=False) for word in WORDS]
    return [x[ids == own[0]].mean(0) for own in encoded if len(own) == 1 and (ids == own[0]).any()]


if __name__ == "__main__":
    captions = [scene.short.text for scene in examples(3, 400)]
    base = {"template": "plain", "instruction": "", "dtype": "float32"}
    for llm in (FrozenLLM("bundled:llm_llama_base", **base), FrozenT5("bundled:t5", dtype="float32")):
        print(f"{llm.name}: {word_distance(llm, captions):.1f}")
