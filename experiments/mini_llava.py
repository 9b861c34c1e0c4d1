"""Tune a miniature base LLM to see: a vision tower's tokens through a projector, trained to describe scenes.

In the manner of LLaVA-1.5: pictures with the paper's instruction and their description as the answer, among dialogues
of text alone. DEVIATION: there is no pre-trained vision tower in miniature, so all parts are trained together. The
result is a LLaVA checkpoint of transformers, whose language tower `FrozenLLM` reads as it reads llava-hf's.

    python -m experiments.mini_llava train --config experiments/configs/mini_llava_llama.yaml
    python -m experiments.mini_llava card --out lidit/assets/llava_llama
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from experiments.cards import versions, write_card
from experiments.mini_llm import IGNORE, IMAGE, Document, collate, dialogue_documents, perplexity
from lidit.models.llm import INSTRUCTION
from lidit.scenes.corpus import answer, examples

SIZE, PATCH = 64, 16
TOKENS = (SIZE // PATCH) ** 2  # of a picture


class Seen(NamedTuple):
    """A picture, uint8 (h w 3), and the dialogue about it."""

    image: np.ndarray
    document: Document


def make_model(base: str, tokenizer: PreTrainedTokenizerFast, width: int, depth: int) -> LlavaForConditionalGeneration:
    """A LLaVA around a base LLM, with a new CLIP vision tower and projector."""
    llm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        text_config=llm.config,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=TOKENS,
        vision_feature_layer=-1,  # the tower is small: none of it is left out
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.lm_head.load_state_dict(llm.lm_head.state_dict())
    return model


def seen(tokenizer: PreTrainedTokenizerFast, seed: int, count: int, held: bool = False) -> list[Seen]:
    """Drawn scenes: picture and instruction in the user's turn, what a dense caption states in the assistant's."""
    found = []
    for example in examples(seed, count, SIZE, SIZE, held):
        turns = [{"role": "user", "content": f"{IMAGE * TOKENS} {INSTRUCTION}"}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        given = tokenizer.encode(prompt, add_special_tokens=False)
        said = tokenizer.encode(answer(example.dense.facts), add_special_tokens=False)
        found.append(Seen(example.image, (given + said + [tokenizer.eos_token_id], len(given))))
    return found


def pixels(images: list[np.ndarray]) -> Tensor:
    """Images (b 3 h w) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def seen_loss(model: LlavaForConditionalGeneration, batch: list[Seen], pad: int) -> Tensor:
    """Mean cross entropy in nats per predicted token of descriptions of pictures."""
    ids, labels = collate([one.document for one in batch], pad)
    logits = model(input_ids=ids, pixel_values=pixels([one.image for one in batch])).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)


def text_loss(model: LlavaForConditionalGeneration, batch: list[Document], pad: int) -> Tensor:
    """The same of dialogues without a picture."""
    ids, labels = collate(batch, pad)
    logits = model(input_ids=ids).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)


def alike(items: list, size: int, length: Callable[[Any], int], rng: random.Random) -> Iterator[list]:
    """Endless batches of items of similar length."""
    while True:
        order = sorted(range(len(items)), key=lambda i: (length(items[i]) // 8, rng.random()))
        groups = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        for group in rng.sample(groups, len(groups)):
            yield [items[i] for i in group]


def train(
    base: str,
    out: str,
    steps: int = 1500,
    batch_size: int = 24,
    learning_rate: float = 2e-3,
    pictures: int = 12000,
    dialogues: int = 6000,
    width: int = 96,
    depth: int = 3,
    seed: int = 0,
    threads: int = 2,
) -> None:
    """Tune a base LLM to describe what it sees and what it reads, and save it as a LLaVA checkpoint in bfloat16.

    Args:
        base: folder of a model made by `mini_llm` with image_token.
        out: folder to write.
        steps: two of three with pictures, the third with text alone.
        batch_size: dialogues a step.
        learning_rate: peak.
        pictures: drawn scenes.
        dialogues: of text alone.
        width: of the vision tower.
        depth: of the vision tower.
        seed: decides new weights, data and order.
        threads: CPU threads.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = make_model(base, tokenizer, width, depth)
    pad = tokenizer.pad_token_id
    shown = alike(seen(tokenizer, seed, pictures), batch_size, lambda one: len(one.document[0]), rng)
    read = alike(dialogue_documents(tokenizer, seed, dialogues), batch_size, lambda one: len(one[0]), rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    start = time.time()
    for step in range(steps):
        kind = "text" if step % 3 == 2 else "pictures"
        loss = text_loss(model, next(read), pad) if kind == "text" else seen_loss(model, next(shown), pad)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 < 3 or step == steps - 1:
            print(f"{kind} step {step} loss {loss.item():.4f} {time.time() - start:.0f}s", flush=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


@torch.no_grad()
def card(out: str, count: int = 200, seed: int = 10_000) -> None:
    """Measure held-out perplexities and write card.json beside the weights.

    Args:
        out: the trained model's folder.
        count: held-out pictures, and dialogues.
        seed: of them.
    """
    model = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    pad = tokenizer.pad_token_id
    pictures = seen(tokenizer, seed, count, held=True)
    shifted = pictures[1:] + pictures[:1]
    wrong = [Seen(other.image, one.document) for one, other in zip(pictures, shifted, strict=True)]
    write_card(
        Path(out),
        made_by=f"python -m experiments.mini_llava train --config experiments/configs/mini_{Path(out).name}.yaml",
        seed=0,
        data=f"drawn scenes, scene language; measured on {count} held-out pictures and dialogues, seed {seed}",
        measured={
            "picture_perplexity": round(math.exp(seen_loss(model, pictures, pad).item()), 4),
            "wrong_picture_perplexity": round(math.exp(seen_loss(model, wrong, pad).item()), 4),
            "answer_perplexity": perplexity(model, dialogue_documents(tokenizer, seed, count, held=True), pad),
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        versions=versions("torch", "transformers", "tokenizers"),
    )


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli({"train": train, "card": card}, as_positional=False)
