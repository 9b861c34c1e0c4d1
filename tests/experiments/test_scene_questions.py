"""Questions about scene language have one right answer, and a model that knows it is found to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from experiments.scene_questions import WRONG, Question, answer, questions, read, score

ASKED = questions(40, seed=0)


def test_questions_are_the_same_however_many_are_asked_for() -> None:
    assert questions(3, seed=0) == ASKED[:3]
    assert questions(3, seed=1) != ASKED[:3]


def test_a_wrong_description_differs_by_what_its_name_says_alone() -> None:
    for question in ASKED:
        right = question.right.replace(" an ", " a ").replace("An ", "A ").split()
        for kind, text in zip(WRONG, question.wrong, strict=True):
            wrong = text.replace(" an ", " a ").replace("An ", "A ").split()
            assert len(wrong) == len(right)
            assert 1 <= sum(a != b for a, b in zip(wrong, right, strict=True)) <= 4
            if kind != "color replaced":
                assert sorted(word.strip(".,") for word in wrong) == sorted(word.strip(".,") for word in right)


def test_the_caption_decides_it() -> None:
    for question in ASKED:
        colors = [word for word in question.caption.replace(",", "").split() if word in question.right]
        assert colors
        assert len({question.right, *question.wrong}) == 4


class Knows(torch.nn.Module):
    """A model of letters that finds one text likely."""

    def __init__(self, tokenizer: object, folder: Path, text: str):
        super().__init__()
        self.config = AutoConfig.from_pretrained(folder)
        self.known = tokenizer.encode(f" {text}", add_special_tokens=False)

    def forward(self, input_ids: torch.Tensor) -> object:
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            at = next((i for i in range(len(ids)) if ids[i : i + len(self.known)] == self.known), None)
            if at is not None:
                for i, token in enumerate(self.known):
                    logits[row, at - 1 + i, token] = 9.0
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_the_most_likely_description_is_the_answer(tiny_llama: Path, which: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    question = Question("a b", "it is a and b", ("it is c and b", "it is a and d", "it is e and f"))
    texts = (question.right, *question.wrong)
    assert answer(Knows(tokenizer, tiny_llama, texts[which]), tokenizer, [question]) == [which]


def test_every_kind_of_model_is_asked_and_scores_are_shares(tiny_llama: Path, tiny_t5: Path, tmp_path: Path) -> None:
    llms = [{"name": str(tiny_llama)}, {"class_path": "lidit.models.t5.FrozenT5", "init_args": {"name": str(tiny_t5)}}]
    score(llms, str(tmp_path), count=4)
    found = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert found["accuracy"] == pytest.approx((found[str(tiny_llama)] + found[str(tiny_t5)]) / 2)
    for folder in (tiny_llama, tiny_t5):
        assert sum(found[f"{folder}, {wrong}"] for wrong in WRONG) + found[str(folder)] == pytest.approx(1)


def test_a_filled_sentinel_counts_the_description_alone(tiny_t5: Path) -> None:
    """An untrained T5 must not prefer a description for its sentinel or its end."""
    model, tokenizer = read(str(tiny_t5))
    same = Question("a b", "it is a", ("it is a", "it is a", "it is a"))
    assert answer(model, tokenizer, [same]) == [1]  # of equal ones a wrong one
