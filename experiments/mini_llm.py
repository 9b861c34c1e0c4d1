"""Train the bundled miniature LLMs: next-token prediction on scene language, then the paper's instruction.

They stand in for LLaMA3-8B and Qwen1.5-7B: the same architectures from transformers with one to two million parameters,
each with its own tokenizer and chat template, so that everything in `lidit` that reads an LLM reads them unchanged.

    python -m experiments.mini_llm train --config experiments/configs/mini_llm_llama.yaml
    python -m experiments.mini_llm card --out lidit/assets/llm_llama --recipe experiments/configs/mini_llm_llama.yaml

Base models are not tuned (`instruct_steps: 0`); `mini_llava.py` begins with them. Their recipes set `recipe`, so that
the card is written too:

    python -m experiments.mini_llm train --config experiments/configs/mini_llm_llama_base.yaml   # and _qwen_base
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from experiments.cards import versions, write_card
from lidit.models.llm import INSTRUCTION
from lidit.scenes.corpus import dialogues, texts

IGNORE = -100
LLAMA_TEMPLATE = """\
{{ bos_token }}{% if messages[0]['role'] != 'system' %}\
<|start|>system<|/start|>You describe pictures.<|end|>{% endif %}\
{% for message in messages %}<|start|>{{ message['role'] }}<|/start|>{{ message['content'] }}<|end|>{% endfor %}\
{% if add_generation_prompt %}<|start|>assistant<|/start|>{% endif %}"""
QWEN_TEMPLATE = """\
{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a careful observer.<|im_end|>\n{% endif %}\
{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"""
SPECIALS = {
    "llama": ["<|bos|>", "<|end|>", "<|pad|>", "<|start|>", "<|/start|>"],
    "qwen": ["<|endoftext|>", "<|im_end|>", "<|pad|>", "<|im_start|>"],
}


def make_tokenizer(family: str, vocabulary: int, corpus: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on scene language, with the family's special tokens and chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIALS[family],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    bos, eos, pad = SPECIALS[family][:3]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=SPECIALS[family][3:],
    )
    fast.chat_template = LLAMA_TEMPLATE if family == "llama" else QWEN_TEMPLATE
    return fast


def make_model(
    family: str, width: int, depth: int, vocabulary: int, tokenizer: PreTrainedTokenizerFast
) -> PreTrainedModel:
    """A LlamaForCausalLM or Qwen2ForCausalLM with four heads for queries and two for keys and values.

    Token embeddings begin with unit variance, not with transformers' 0.02, which the first block would drown out: words
    would then differ only by their class, and what a word says (its colour or shape) would be a thousandth of a
    feature's variance.
    """
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": width * 8 // 3 // 32 * 32,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape)) if family == "llama" else Qwen2ForCausalLM(Qwen2Config(**shape))
    nn.init.normal_(model.get_input_embeddings().weight)
    return model


Document = tuple[list[int], int]  # token ids, and how many of the first ones are not predicted
Batch = tuple[Tensor, ...]


def caption_documents(tokenizer: PreTrainedTokenizerFast, seed: int, count: int, held: bool = False) -> list[Document]:
    """Captions that end in the end-of-text token."""
    return [(tokenizer.encode(text) + [tokenizer.eos_token_id], 1) for text in texts(seed, count, held)]


def dialogue_documents(tokenizer: PreTrainedTokenizerFast, seed: int, count: int, held: bool = False) -> list[Document]:
    """The instruction and a caption in the user's turn; the description, which is predicted, in the assistant's."""
    documents = []
    for caption, answer in dialogues(seed, count, held):
        turns = [{"role": "user", "content": f"{INSTRUCTION} {caption}"}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        given = tokenizer.encode(prompt, add_special_tokens=False)
        reply = tokenizer.encode(answer, add_special_tokens=False)
        documents.append((given + reply + [tokenizer.eos_token_id], len(given)))
    return documents


def batches(
    documents: list, size: int, pad: int, rng: random.Random, collate: Callable[[list, int], Batch] | None = None
) -> Iterator[Batch]:
    """Endless batches of documents of similar length; by default (ids, labels)."""
    collate = collate or padded
    while True:
        order = sorted(range(len(documents)), key=lambda i: (len(documents[i][0]) // 8, rng.random()))
        groups = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        for group in rng.sample(groups, len(groups)):
            yield collate([documents[i] for i in group], pad)


def padded(documents: list[Document], pad: int) -> Batch:
    """Right-padded token ids and labels (b l)."""
    length = max(len(ids) for ids, _ in documents)
    ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in documents])
    labels = torch.tensor([[IGNORE] * skip + ids[skip:] + [IGNORE] * (length - len(ids)) for ids, skip in documents])
    return ids, labels


def next_token_loss(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy in nats per predicted token; with a causal mask, padding on the right needs no other."""
    logits = model(input_ids=ids).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)


def optimize(
    model: PreTrainedModel,
    stream: Iterator[Batch],
    steps: int,
    learning_rate: float,
    what: str,
    loss_of: Callable[..., Tensor] = next_token_loss,
) -> None:
    """Train with AdamW, a warm-up and a cosine; with 0 steps, do nothing."""
    if not steps:
        return
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    start = time.time()
    for step in range(steps):
        loss = loss_of(model, *next(stream))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"{what} step {step} loss {loss.item():.4f} {time.time() - start:.0f}s", flush=True)


def train(
    out: str,
    family: Literal["llama", "qwen"],
    width: int,
    depth: int,
    vocabulary: int,
    steps: int = 700,
    instruct_steps: int = 350,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    documents: int = 30000,
    seed: int = 0,
    threads: int = 2,
    recipe: str | None = None,
) -> None:
    """Train one miniature LLM and save it as a transformers checkpoint in bfloat16.

    Args:
        out: folder to write.
        family: architecture, chat template and special tokens.
        width: hidden size.
        depth: number of blocks.
        vocabulary: size of the byte-level BPE vocabulary.
        steps: steps of next-token prediction on captions.
        instruct_steps: steps of instruction tuning; 0 leaves a base model.
        batch_size: documents in a step.
        learning_rate: peak learning rate of the first phase; that of the second is a third of it.
        documents: number of documents for each phase.
        seed: decides weights, data and order.
        threads: CPU threads.
        recipe: the YAML file of these arguments, which the card names; none: no card is written.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    rng = random.Random(seed)
    answers = [f"{INSTRUCTION} {caption} {answer}" for caption, answer in dialogues(seed, 1000)]
    corpus = [
        *texts(seed, 2000),
        *answers,
        *["You are a careful observer. You describe pictures. system user assistant"] * 50,
    ]
    tokenizer = make_tokenizer(family, vocabulary, corpus)
    model = make_model(family, width, depth, vocabulary, tokenizer)
    print(f"{family}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters", flush=True)
    pad = tokenizer.pad_token_id
    stream = batches(caption_documents(tokenizer, seed, documents), batch_size, pad, rng)
    optimize(model, stream, steps, learning_rate, "captions")
    if instruct_steps:  # a quarter of these are captions, so that captions are not forgotten
        tuning = dialogue_documents(tokenizer, seed, documents) + caption_documents(tokenizer, seed + 1, documents // 3)
        stream = batches(tuning, batch_size, pad, rng)
        optimize(model, stream, instruct_steps, learning_rate / 3, "instruction")
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    if recipe is not None:
        card(out, recipe, seed=10_000)


@torch.no_grad()
def perplexity(model: PreTrainedModel, documents: list[Document], pad: int) -> float:
    """Perplexity: exp of the mean cross entropy per predicted token."""
    total, tokens = 0.0, 0
    for i in range(0, len(documents), 50):
        ids, labels = padded(documents[i : i + 50], pad)
        predicted = int((labels[:, 1:] != IGNORE).sum())
        total += float(next_token_loss(model, ids, labels)) * predicted
        tokens += predicted
    return round(math.exp(total / tokens), 4)


def card(out: str, recipe: str, count: int = 500, seed: int = 10_000) -> None:
    """Measure held-out perplexity and write card.json beside the weights.

    Args:
        out: the trained model's folder.
        recipe: the YAML file it was trained with, which the card names.
        count: number of held-out documents of each kind.
        seed: seed of the held-out documents.
    """
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    pad = tokenizer.pad_token_id
    write_card(
        Path(out),
        made_by=f"python -m experiments.mini_llm train --config {recipe}",
        seed=0,
        data=f"scene language; measured on {count} captions and {count} dialogues of held-out scenes of seed {seed}",
        measured={
            "answer_perplexity": perplexity(model, dialogue_documents(tokenizer, seed, count, held=True), pad),
            "caption_perplexity": perplexity(model, caption_documents(tokenizer, seed, count, held=True), pad),
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        versions=versions("torch", "transformers", "tokenizers"),
    )


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli({"train": train, "card": card}, as_positional=False)
