"""A held-out question set about scene language, the miniature's measure of understanding (Figure 2's x axis).

A question is a short caption of two objects that training never showed together, and four dense descriptions: the right
one, and the same sentences with the colours swapped between the objects, the shapes swapped, or one colour replaced. A
language model answers with the description it finds most likely after the caption; chance is 25 %. Only the
language model is measured, without pictures and without a denoiser.

    python -m experiments.scene_questions score --llms '[{"name": "bundled:llm_llama"}]' --out runs/questions/llama
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from experiments.mini_llm import IGNORE, padded
from lidit.disk.folder import SCORES
from lidit.disk.whole import write_text
from lidit.models.source import load_name
from lidit.scenes.describe import dense_caption, short_caption
from lidit.scenes.draw import COLORS, Scene, held_out, random_scene

WRONG = ("colors swapped", "shapes swapped", "color replaced")


@dataclass(frozen=True)
class Question:
    """A caption, its right description, and wrong descriptions in the order of WRONG."""

    caption: str
    right: str
    wrong: tuple[str, ...]


def questions(count: int, seed: int) -> list[Question]:
    """Questions about held-out scenes; question i does not depend on `count`."""
    return [_question(np.random.default_rng([seed, i])) for i in range(count)]


def _question(rng: np.random.Generator) -> Question:
    scene = _scene(rng)
    a, b = scene.objects
    other = str(rng.choice([color for color in COLORS if color not in (a.color, b.color)]))
    changed = [
        Scene((replace(a, color=b.color), replace(b, color=a.color))),
        Scene((replace(a, shape=b.shape), replace(b, shape=a.shape))),
        Scene((replace(a, color=other), b)),
    ]
    caption_seed, dense_seed = rng.integers(2**31, size=2).tolist()
    # if the caption left out the colours, every description would be right
    caption = next(
        text
        for i in range(1000)
        if a.color in (text := short_caption(scene, np.random.default_rng([caption_seed, i]), form="list").text)
    )
    described = [dense_caption(each, np.random.default_rng(dense_seed)).text for each in [scene, *changed]]
    return Question(caption, described[0], tuple(described[1:]))


def _scene(rng: np.random.Generator) -> Scene:
    """A scene of two objects of different colours and shapes, which is held out of training."""
    while True:
        scene = random_scene(rng, count=2)
        a, b = scene.objects
        if a.color != b.color and a.shape != b.shape and held_out(scene.objects):
            return scene


@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asked: list[Question]) -> list[int]:
    """A model's answer to each question: 0 for the right description, 1 to 3 for a wrong one in the order of WRONG.

    A decoder-only model reads the caption and continues it. An encoder-decoder reads the caption and a sentinel, and
    fills in the description. If several descriptions are equally likely, a wrong one is taken.
    """
    likelihoods = _filled if model.config.is_encoder_decoder else _continued
    found = [likelihoods(model, tokenizer, q.caption, [*q.wrong, q.right]).argmax() for q in asked]
    return [(int(best) + 1) % (len(WRONG) + 1) for best in found]


def _continued(model: Any, tokenizer: PreTrainedTokenizerFast, caption: str, options: list[str]) -> Tensor:
    """Log-likelihoods (o), in nats, of texts that continue a caption."""
    given = tokenizer.encode(f"{caption}.")  # with a begin token if the tokenizer has one
    texts = [tokenizer.encode(f" {text}", add_special_tokens=False) for text in options]
    ids, labels = padded([(given + each, len(given)) for each in texts], 0)
    return _likelihoods(model(input_ids=ids).logits[:, :-1], labels[:, 1:])


def _filled(model: Any, tokenizer: PreTrainedTokenizerFast, caption: str, options: list[str]) -> Tensor:
    """Log-likelihoods (o), in nats, of texts that replace a sentinel after a caption."""
    given = tokenizer.encode(f"{caption}. <extra_id_0>", add_special_tokens=False) + [tokenizer.eos_token_id]
    texts = [tokenizer.encode(f"<extra_id_0> {text}", add_special_tokens=False) for text in options]
    _, labels = padded([(each, 0) for each in texts], 0)
    return _likelihoods(model(input_ids=torch.tensor([given] * len(texts)), labels=labels).logits, labels)


def _likelihoods(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums (o) of the labels' log-probabilities; logits (o l v), labels (o l)."""
    return -F.cross_entropy(logits.float().mT, labels, ignore_index=IGNORE, reduction="none").sum(1)


def read(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a whole language model in float32, and its tokenizer."""
    folder = load_name(name)
    set_verbosity_error()
    disable_progress_bar()
    config = AutoConfig.from_pretrained(folder)
    auto = AutoModelForCausalLM if config.get_text_config() is config else AutoModelForImageTextToText
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else auto
    return auto.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


def score(llms: list[dict[str, Any]], out: str, count: int = 200, seed: int = 0) -> None:
    """Ask each LLM of a recipe the questions, and write the mean of their accuracies to `OUT/scores.json`.

    Args:
        llms: settings of the LLMs, as a recipe gives them.
        out: folder to write.
        count: number of questions.
        seed: seed of the questions.
    """
    asked = questions(count, seed)
    scores: dict[str, float] = {}
    for llm in llms:
        name = llm.get("init_args", llm)["name"]
        found = answer(*read(name), asked)
        scores[name] = found.count(0) / count
        scores |= {f"{name}, {wrong}": found.count(i) / count for i, wrong in enumerate(WRONG, start=1)}
        print(f"{name}: {scores[name]:.3f} of {count} questions", flush=True)
    own = [scores[llm.get("init_args", llm)["name"]] for llm in llms]
    record = {
        "benchmark": "scene-questions",
        "name": "scene-questions",
        "scores": {"accuracy": float(np.mean(own)), **scores},
        "images_demanded": 0,
        "images_scored": 0,
        "questions": count,
        "seed": seed,
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    write_text(Path(out) / SCORES, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli({"score": score, "questions": questions}, as_positional=False)
