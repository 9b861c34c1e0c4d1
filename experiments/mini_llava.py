"""Tune a miniature base LLM on pictures, as LLaVA-1.5 does: the multi-modal LLMs of the tables in miniature.

A small vision tower's tokens go through a projector into the LLM, which learns to describe drawn scenes under the
paper's instruction. As in LLaVA-1.5's mixture, some of the dialogues are only text. The result is a transformers LLaVA
checkpoint, whose language tower `FrozenLLM` reads.

    python -m experiments.mini_llava train --config experiments/configs/mini_llava_llama.yaml   # and _qwen
"""

from __future__ import annotations

import math
import random
from pathlib import Path

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
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from experiments.cards import versions, write_card
from experiments.mini_llm import IGNORE, Batch, batches, caption_documents, dialogue_documents, optimize, padded
from lidit.models.llm import INSTRUCTION
from lidit.pixels import signed
from lidit.scenes.corpus import answer, examples

IMAGE = "<image>"
SIDE, PATCH = 64, 16  # pixels
IMAGE_TOKENS = (SIDE // PATCH) ** 2
# token ids, how many of the first ones are not predicted, the picture
Document = tuple[list[int], int, np.ndarray | None]


def make_llava(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, width: int = 48
) -> LlavaForConditionalGeneration:
    """A LLaVA around a base LLM, with a new vision tower and projector; the tokenizer learns the image token."""
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    base.resize_token_embeddings(len(tokenizer))
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=width,
    )
    config = LlavaConfig(
        text_config=base.config,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",  # all but the class token
        image_seq_length=IMAGE_TOKENS,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(base.model.state_dict())
    model.lm_head.load_state_dict(base.lm_head.state_dict())
    return model


def picture_documents(tokenizer: PreTrainedTokenizerFast, seed: int, count: int, held: bool = False) -> list[Document]:
    """A picture and the instruction in the user's turn; the description, which is predicted, in the assistant's."""
    turns = [{"role": "user", "content": f"{IMAGE * IMAGE_TOKENS}\n{INSTRUCTION}"}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    given = tokenizer.encode(prompt, add_special_tokens=False)
    documents = []
    for example in examples(seed, count, held=held):
        reply = tokenizer.encode(answer(example.dense.facts), add_special_tokens=False)
        documents.append((given + reply + [tokenizer.eos_token_id], len(given), example.image))
    return documents


def text_documents(tokenizer: PreTrainedTokenizerFast, seed: int, count: int) -> list[Document]:
    """Dialogues about captions, and a third as many plain captions, so that neither is forgotten."""
    documents = dialogue_documents(tokenizer, seed, count) + caption_documents(tokenizer, seed + 1, count // 3)
    return [(*document, None) for document in documents]


def with_pictures(documents: list[Document], pad: int) -> Batch:
    """Token ids and labels (b l), and the pictures (m 3 h w) in [-1, 1] of those documents that have one."""
    pictures = [picture for *_, picture in documents if picture is not None]
    pixels = torch.from_numpy(np.stack(pictures)) if pictures else torch.zeros(0, SIDE, SIDE, 3, dtype=torch.uint8)
    ids, labels = padded([(ids, given) for ids, given, _ in documents], pad)
    return ids, labels, signed(pixels.permute(0, 3, 1, 2))


def answer_loss(model: PreTrainedModel, ids: Tensor, labels: Tensor, pixels: Tensor) -> Tensor:
    """Mean cross entropy in nats per predicted token; with a causal mask, padding on the right needs no other."""
    logits = model(input_ids=ids, pixel_values=pixels if len(pixels) else None).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)


def train(
    base: str,
    out: str,
    steps: int = 800,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    pictures: int = 12000,
    dialogues: int = 9000,
    seed: int = 0,
    threads: int = 2,
    recipe: str | None = None,
) -> None:
    """Tune a base LLM, vision tower and projector together, and save a LLaVA checkpoint in bfloat16 with its card.

    Args:
        base: folder of the base model.
        out: folder to write.
        steps: steps of tuning.
        batch_size: dialogues in a step.
        learning_rate: peak learning rate.
        pictures: number of drawn scenes with their descriptions.
        dialogues: number of dialogues about captions, without pictures; a third as many plain captions are added.
        seed: decides weights, data and order.
        threads: CPU threads.
        recipe: the YAML file of these arguments, which the card names; none: no card is written.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = make_llava(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tokenizer)
    print(f"{out}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters", flush=True)
    documents = picture_documents(tokenizer, seed, pictures) + text_documents(tokenizer, seed, dialogues)
    stream = batches(documents, batch_size, tokenizer.pad_token_id, random.Random(seed), with_pictures)
    optimize(model, stream, steps, learning_rate, "pictures", answer_loss)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    if recipe is not None:
        card(out, recipe, seed)


def card(out: str, recipe: str, seed: int = 0, count: int = 500, held_seed: int = 10_000) -> None:
    """Measure perplexity on held-out scenes and write card.json beside the weights.

    Args:
        out: the trained model's folder.
        recipe: the YAML file it was trained with, which the card names.
        seed: the seed it was trained with.
        count: number of held-out documents of each kind.
        held_seed: seed of the held-out documents.
    """
    model = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    texts = dialogue_documents(tokenizer, held_seed, count, held=True)
    captions = caption_documents(tokenizer, held_seed, count, held=True)
    kinds = {
        "picture_perplexity": picture_documents(tokenizer, held_seed, count, held=True),
        "answer_perplexity": [(*document, None) for document in texts],
        "caption_perplexity": [(*document, None) for document in captions],
    }
    measured = {name: perplexity(model, documents, tokenizer.pad_token_id) for name, documents in kinds.items()}
    write_card(
        Path(out),
        made_by=f"python -m experiments.mini_llava train --config {recipe}",
        seed=seed,
        data=f"drawn scenes and scene language; measured on {count} of each kind, held out, of seed {held_seed}; of "
        "descriptions of pictures, answers about captions, and captions",
        measured=measured | {"parameters": sum(p.numel() for p in model.parameters())},
        versions=versions("torch", "transformers", "tokenizers"),
    )


@torch.no_grad()
def perplexity(model: PreTrainedModel, documents: list[Document], pad: int) -> float:
    """Perplexity: exp of the mean cross entropy per predicted token."""
    total, tokens = 0.0, 0
    for i in range(0, len(documents), 50):
        ids, labels, pixels = with_pictures(documents[i : i + 50], pad)
        predicted = int((labels[:, 1:] != IGNORE).sum())
        total += float(answer_loss(model, ids, labels, pixels)) * predicted
        tokens += predicted
    return round(math.exp(total / tokens), 4)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli({"train": train, "card": card}, as_positional=False)
