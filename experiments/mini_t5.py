"""Train the miniature T5 of the tables by span corruption (Raffel et al. 2020) on the text that the base LLMs read.

python -m experiments.mini_t5 train --config experiments/configs/mini_t5.yaml
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from experiments.cards import versions, write_card
from experiments.mini_llm import IGNORE, Batch, optimize
from lidit.models.llm import INSTRUCTION
from lidit.scenes.corpus import texts

SENTINELS = [f"<extra_id_{i}>" for i in range(32)]
NOISE, SPAN = 0.15, 3.0  # share of tokens that are left out; mean length of a span in tokens


def make_tokenizer(vocabulary: int, corpus: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with T5's special tokens; the caller adds the end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "</s>", *SENTINELS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", additional_special_tokens=SENTINELS
    )


def corrupt(ids: list[int], sentinels: list[int], eos: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """A text with sentinels for spans, and the spans, each after its sentinel; both end in the end-of-text token.

    Of n tokens, round(0.15 n) are left out, in spans of 3 tokens on average, which are neither first nor adjacent.

    Raises:
        ValueError: the text is too short to leave a token out.
    """
    noise = max(1, round(NOISE * len(ids)))
    spans = min(max(1, round(noise / SPAN)), len(ids) - noise, len(sentinels))
    if spans < 1:
        raise ValueError(f"a text of {len(ids)} tokens is too short to leave one out")
    between = _lengths(len(ids) - noise, spans, rng)
    cut = _lengths(noise, spans, rng)
    given, left_out, at = [], [], 0
    for sentinel, b, c in zip(sentinels, between, cut, strict=False):
        given += [*ids[at : at + b], sentinel]
        left_out += [sentinel, *ids[at + b : at + b + c]]
        at += b + c
    return [*given, eos], [*left_out, eos]


def _lengths(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    """Split a total at random into parts of at least one."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1 if parts > 1 else []
    return np.diff([0, *cuts, total]).tolist()


def pairs(tokenizer: PreTrainedTokenizerFast, documents: list[str], rng: np.random.Generator) -> list[tuple]:
    """Corrupt each text once, as `corrupt` does; texts of one token are left out."""
    sentinels = tokenizer.convert_tokens_to_ids(SENTINELS)
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in documents]
    return [corrupt(ids, sentinels, tokenizer.eos_token_id, rng) for ids in encoded if len(ids) > 1]


def batches(tokenizer: PreTrainedTokenizerFast, documents: list[str], size: int, rng: random.Random) -> Iterator[Batch]:
    """Endless batches of texts of similar length, corrupted anew each time."""
    lengths = [len(text) // 16 for text in documents]
    draws = np.random.default_rng(rng.getrandbits(32))
    while True:
        order = sorted(range(len(documents)), key=lambda i: (lengths[i], rng.random()))
        groups = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        for group in rng.sample(groups, len(groups)):
            yield padded(pairs(tokenizer, [documents[i] for i in group], draws), tokenizer.pad_token_id)


def padded(corrupted: list[tuple], pad: int) -> Batch:
    """Right-padded token ids of the corrupted texts (b l) and labels (b k)."""
    columns = []
    for part, fill in ((0, pad), (1, IGNORE)):
        longest = max(len(pair[part]) for pair in corrupted)
        columns.append(torch.tensor([pair[part] + [fill] * (longest - len(pair[part])) for pair in corrupted]))
    return tuple(columns)


def span_loss(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy in nats per token of the spans that were left out."""
    logits = model(input_ids=ids, attention_mask=(ids != model.config.pad_token_id).long(), labels=labels).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)


def train(
    out: str,
    width: int,
    depth: int,
    vocabulary: int,
    decoder_depth: int = 1,
    steps: int = 1500,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    documents: int = 30000,
    seed: int = 0,
    threads: int = 2,
    recipe: str | None = None,
) -> None:
    """Train a T5 v1.1 with four heads and save it as a transformers checkpoint in bfloat16 with its card.

    Token embeddings begin with unit variance, like those of T5 and of the miniature LLMs (`mini_llm.make_model`). The
    head is tied to them, as in the first T5, because transformers always does so.

    Args:
        out: folder to write.
        width: hidden size.
        depth: number of blocks of the encoder.
        vocabulary: size of the byte-level BPE vocabulary.
        decoder_depth: number of blocks of the decoder, which only training needs.
        steps: steps of span corruption.
        batch_size: texts in a step.
        learning_rate: peak learning rate.
        documents: number of texts, the first of those that the base LLMs read.
        seed: decides weights, order and spans.
        threads: CPU threads.
        recipe: the YAML file of these arguments, which the card names; none: no card is written.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    corpus = list(texts(seed, documents))
    tokenizer = make_tokenizer(vocabulary, [*corpus[:2000], *[INSTRUCTION] * 50])
    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": width // 4,
        "d_ff": width * 8 // 3 // 32 * 32,
        "num_heads": 4,
        "num_layers": depth,
        "num_decoder_layers": decoder_depth,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    model = T5ForConditionalGeneration(T5Config.from_dict(shape))
    print(f"{out}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters", flush=True)
    optimize(
        model, batches(tokenizer, corpus, batch_size, random.Random(seed)), steps, learning_rate, "spans", span_loss
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    if recipe is not None:
        card(out, recipe, seed)


@torch.no_grad()
def card(out: str, recipe: str, seed: int = 0, count: int = 500, held_seed: int = 10_000) -> None:
    """Measure the spans' perplexity on held-out scenes and write card.json beside the weights.

    Args:
        out: the trained model's folder.
        recipe: the YAML file it was trained with, which the card names.
        seed: the seed it was trained with.
        count: number of held-out texts.
        held_seed: seed of the held-out texts and their spans.
    """
    model = T5ForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    held = pairs(tokenizer, list(texts(held_seed, count, held=True)), np.random.default_rng(held_seed))
    total, tokens = 0.0, 0
    for i in range(0, len(held), 50):
        ids, labels = padded(held[i : i + 50], tokenizer.pad_token_id)
        total += float(span_loss(model, ids, labels)) * int((labels != IGNORE).sum())
        tokens += int((labels != IGNORE).sum())
    encoder = sum(p.numel() for p in model.encoder.parameters())
    write_card(
        Path(out),
        made_by=f"python -m experiments.mini_t5 train --config {recipe}",
        seed=seed,
        data=f"scene language; measured on {count} texts of held-out scenes of seed {held_seed}",
        measured={
            "span_perplexity": round(math.exp(total / tokens), 4),
            "parameters": sum(p.numel() for p in model.parameters()),
            "encoder_parameters": encoder,
        },
        versions=versions("torch", "transformers", "tokenizers"),
    )


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli({"train": train, "card": card}, as_positional=False)
