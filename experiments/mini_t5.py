"""Train a miniature T5 by span corruption on the same scene language: the text encoder LLMs are compared with.

python -m experiments.mini_t5 train --config experiments/configs/mini_t5.yaml
python -m experiments.mini_t5 card --out lidit/assets/t5
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import processors
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from experiments.cards import versions, write_card
from experiments.mini_llm import IGNORE, make_tokenizer
from lidit.scenes.corpus import texts

MASKS = [f"<extra_id_{i}>" for i in range(24)]
CORRUPTED, SPAN = 0.15, 3  # share of tokens, mean length of a span (Raffel et al. 2020)

Pair = tuple[list[int], list[int]]  # the text with spans masked; what was masked


def corrupt(ids: list[int], masks: list[int], eos: int, rng: random.Random) -> Pair:
    """Replace spans by masks; the target names each mask and what it hides (Raffel et al. 2020, section 3.1.4)."""
    count = max(1, round(len(ids) * CORRUPTED / SPAN))
    count = min(count, len(masks), max(1, len(ids) // (SPAN + 1)))
    starts = sorted(rng.sample(range(max(1, len(ids) - SPAN * count)), min(count, max(1, len(ids) - SPAN * count))))
    source, target, at = [], [], 0
    for i, start in enumerate(starts):
        first = start + i * SPAN  # spans do not overlap: each moves those after it
        length = min(SPAN, len(ids) - first)
        source += [*ids[at:first], masks[i]]
        target += [masks[i], *ids[first : first + length]]
        at = first + length
    return [*source, *ids[at:], eos], [*target, eos]


def batches(
    documents: list[list[int]], size: int, masks: list[int], tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless batches (ids, mask, labels) of texts of similar length, corrupted anew each time."""
    while True:
        order = sorted(range(len(documents)), key=lambda i: (len(documents[i]) // 8, rng.random()))
        groups = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        for group in rng.sample(groups, len(groups)):
            yield collate([corrupt(documents[i], masks, tokenizer.eos_token_id, rng) for i in group], tokenizer)


def collate(pairs: list[Pair], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids, their mask, and labels."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(s) for s, _ in pairs], True, tokenizer.pad_token_id)
    labels = nn.utils.rnn.pad_sequence([torch.tensor(t) for _, t in pairs], True, IGNORE)
    return ids, ids != tokenizer.pad_token_id, labels


def make_model(
    width: int, depth: int, decoder_depth: int, tokenizer: PreTrainedTokenizerFast
) -> T5ForConditionalGeneration:
    """A T5 v1.1, whose decoder serves training alone."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // 4,
        d_ff=width * 8 // 3 // 32 * 32,
        num_layers=depth,
        num_decoder_layers=decoder_depth,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config)


def train(
    out: str,
    width: int = 112,
    depth: int = 6,
    decoder_depth: int = 2,
    vocabulary: int = 512,
    steps: int = 2000,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    documents: int = 30000,
    seed: int = 0,
    threads: int = 2,
) -> None:
    """Train and save as a transformers checkpoint in bfloat16.

    Args:
        out: folder to write.
        width: hidden size.
        depth: blocks of the encoder.
        decoder_depth: blocks of the decoder.
        vocabulary: size of the byte-level BPE vocabulary.
        steps: of training.
        batch_size: texts a step.
        learning_rate: peak.
        documents: texts drawn.
        seed: decides weights, data and order.
        threads: CPU threads.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    rng = random.Random(seed)
    tokenizer = make_tokenizer("llama", vocabulary, list(texts(seed, 2000)), tuple(MASKS))
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {tokenizer.eos_token}", special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)]
    )
    model = make_model(width, depth, decoder_depth, tokenizer)
    print(f"T5: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters", flush=True)
    masks = tokenizer.convert_tokens_to_ids(MASKS)
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts(seed, documents)]
    stream = batches(encoded, batch_size, masks, tokenizer, rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    start = time.time()
    for step in range(steps):
        ids, mask, labels = next(stream)
        loss = model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.4f} {time.time() - start:.0f}s", flush=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


@torch.no_grad()
def card(out: str, recipe: str = "experiments/configs/mini_t5.yaml", count: int = 500, seed: int = 10_000) -> None:
    """Measure the held-out perplexity of masked tokens and write card.json beside the weights.

    Args:
        out: the trained model's folder.
        recipe: the YAML it was trained by, for the record.
        count: held-out texts.
        seed: of them.
    """
    model = T5ForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    masks, rng = tokenizer.convert_tokens_to_ids(MASKS), random.Random(seed)
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts(seed, count, held=True)]
    pairs = [corrupt(ids, masks, tokenizer.eos_token_id, rng) for ids in encoded]
    total, tokens = 0.0, 0
    for i in range(0, count, 50):
        ids, mask, labels = collate(pairs[i : i + 50], tokenizer)
        predicted = int((labels != IGNORE).sum())
        total += model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss.item() * predicted
        tokens += predicted
    write_card(
        Path(out),
        made_by=f"python -m experiments.mini_t5 train --config {recipe}",
        seed=0,
        data=f"scene language; measured on the masked tokens of {count} texts of held-out scenes, seed {seed}",
        measured={
            "masked_perplexity": round(math.exp(total / tokens), 4),
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        versions=versions("torch", "transformers", "tokenizers"),
    )


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli({"train": train, "card": card}, as_positional=False)
