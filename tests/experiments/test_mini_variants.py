"""Base, LLaVA-style and T5-style miniature LLMs are real checkpoints that the frozen LLMs read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlavaForConditionalGeneration, T5ForConditionalGeneration

from experiments import mini_llava, mini_llm, mini_t5
from lidit.models.llm import INSTRUCTION, FrozenLLM
from lidit.models.t5 import FrozenT5

CONFIGS = Path(__file__).parents[2] / "experiments/configs"
ASSETS = Path(__file__).parents[2] / "lidit/assets"
EOS, SENTINELS = 1, list(range(2, 34))


@pytest.mark.parametrize("length", [2, 3, 7, 20, 100, 200])
def test_a_corrupted_text_and_its_spans_give_the_text_back(length: int) -> None:
    ids = list(range(100, 100 + length))
    for seed in range(20):
        given, said = mini_t5.corrupt(ids, SENTINELS, EOS, np.random.default_rng(seed))
        assert given[-1] == said[-1] == EOS
        used = [token for token in given if token in SENTINELS]
        assert used == [token for token in said if token in SENTINELS] == SENTINELS[: len(used)]
        places = [*(said.index(sentinel) for sentinel in used), len(said) - 1]
        spans = {s: said[a + 1 : b] for s, a, b in zip(used, places[:-1], places[1:], strict=True)}
        assert all(spans.values())
        assert [x for token in given[:-1] for x in spans.get(token, [token])] == ids
        assert sum(map(len, spans.values())) == max(1, round(mini_t5.NOISE * length))


def test_a_text_of_one_token_cannot_be_corrupted() -> None:
    with pytest.raises(ValueError, match="too short"):
        mini_t5.corrupt([100], SENTINELS, EOS, np.random.default_rng(0))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model of two steps."""
    folder = tmp_path_factory.mktemp("base")
    mini_llm.train(str(folder), "llama", 32, 4, 400, steps=2, instruct_steps=0, batch_size=4, documents=40)
    return folder


@pytest.fixture(scope="module")
def llava(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model, tuned for two steps."""
    folder = tmp_path_factory.mktemp("llava")
    mini_llava.train(str(base), str(folder), steps=2, batch_size=4, pictures=24, dialogues=12)
    return folder


@pytest.mark.slow
def test_a_tuned_model_is_a_llava_whose_language_tower_is_read(base: Path, llava: Path) -> None:
    assert json.loads((llava / "config.json").read_text())["model_type"] == "llava"
    read = FrozenLLM(str(llava), dtype="float32")
    tokens, mask, start = read(["a red circle", ""])
    assert tokens.shape[2] == FrozenLLM(str(base)).width == 32
    assert mask[1].sum() - start[1] == 1
    whole = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32).eval()
    ids = torch.tensor([read.prompts.split("a red circle").ids])
    expected = whole(input_ids=ids, output_hidden_states=True).hidden_states[-3]
    torch.testing.assert_close(tokens[:1, : ids.shape[1]], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_the_picture_changes_what_is_said_about_it(llava: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llava)
    first, second = mini_llava.picture_documents(tokenizer, 0, 2)
    ids, given, _ = first
    assert ids[:given].count(tokenizer.convert_tokens_to_ids(mini_llava.IMAGE)) == mini_llava.IMAGE_TOKENS
    assert INSTRUCTION in tokenizer.decode(ids[:given])
    model = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32).eval()
    batch = [mini_llava.with_pictures([(ids, given, picture)], 0) for picture in (first[2], second[2])]
    assert mini_llava.answer_loss(model, *batch[0]) != mini_llava.answer_loss(model, *batch[1])


@pytest.mark.slow
def test_a_batch_may_hold_texts_without_pictures(llava: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llava)
    mixed = mini_llava.picture_documents(tokenizer, 0, 2) + mini_llava.text_documents(tokenizer, 0, 3)
    ids, labels, pixels = mini_llava.with_pictures(mixed, 0)
    assert pixels.shape == (2, 3, 64, 64)
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    assert (labels[0][: mixed[0][1]] == mini_llm.IGNORE).all()
    assert mini_llava.with_pictures(mixed[2:], 0)[2].shape == (0, 3, 64, 64)


@pytest.mark.slow
def test_a_t5_is_trained_and_its_encoder_is_read_and_the_card_says_what_was_measured(tmp_path: Path) -> None:
    arguments = {"width": 32, "depth": 2, "vocabulary": 400, "steps": 2, "batch_size": 4, "documents": 40}
    mini_t5.train(str(tmp_path), **arguments)
    mini_t5.card(str(tmp_path), "recipe.yaml", count=8)
    assert json.loads((tmp_path / "card.json").read_text())["measured"]["span_perplexity"] > 1
    assert isinstance(T5ForConditionalGeneration.from_pretrained(tmp_path), T5ForConditionalGeneration)
    tokens, _, start = FrozenT5(str(tmp_path), dtype="float32")(["a red circle", ""])
    assert tokens.shape[2] == 32
    assert start.tolist() == [0, 0]


RECIPES = {
    "mini_llm_llama_base": "llm_llama_base",
    "mini_llm_qwen_base": "llm_qwen_base",
    "mini_llava_llama": "llava_llama",
    "mini_llava_qwen": "llava_qwen",
    "mini_t5": "t5",
}


@pytest.mark.parametrize(("recipe", "part"), RECIPES.items())
def test_each_variant_has_a_recipe_that_names_itself_and_where_it_goes(recipe: str, part: str) -> None:
    said = yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text())
    assert said["recipe"] == f"experiments/configs/{recipe}.yaml"
    assert said["out"] == f"lidit/assets/{part}"


def test_all_bundled_parts_together_stay_below_40_mb() -> None:
    """Those of LI-DiT; the base of the second system, a U-Net, comes on top."""
    sizes = {path: path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()}
    base = sum(size for path, size in sizes.items() if (ASSETS / "unet") in path.parents)
    assert sum(sizes.values()) - base < 40e6
    assert base < 3e6
