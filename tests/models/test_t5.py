"""T5 as a frozen prompt encoder: the encoder's output, nothing of the decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForTextEncoding, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from lidit.models.llm import FrozenLLM
from lidit.models.t5 import FrozenT5

SENTENCES = ["a red circle to the left of a blue square", "two green stars, and a small black heart"]
PROMPTS = ["a red circle", "", "a red circle to the left of a blue square, and two green stars"]


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a T5 v1.1 of 3 blocks, with a unigram tokenizer in T5's manner."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=specials, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(5)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
    folder = tmp_path_factory.mktemp("t5")
    T5ForConditionalGeneration(T5Config(vocab_size=len(fast), **sizes)).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def rows(tokens: Tensor, mask: Tensor) -> list[Tensor]:
    return [row[valid] for row, valid in zip(tokens, mask, strict=True)]


@torch.no_grad()
def test_features_are_the_encoders_output_to_the_end_of_text(tiny_t5: Path) -> None:
    t5 = FrozenT5(str(tiny_t5), dtype="float32")
    tokens, mask, start = t5(PROMPTS[:1])
    ids = torch.tensor([t5.prompts.split(PROMPTS[0]).ids])
    assert ids[0, -1] == t5.prompts.tokenizer.eos_token_id
    reference = AutoModelForTextEncoding.from_pretrained(tiny_t5, dtype=torch.float32).eval()
    torch.testing.assert_close(tokens, reference(input_ids=ids).last_hidden_state)
    assert mask.all()
    assert start.tolist() == [0]
    assert t5.width == 32
    assert not hasattr(t5._model, "decoder")


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_prompt_alone_and_among_longer_ones_gives_the_same_features(side: str, tiny_t5: Path) -> None:
    t5 = FrozenT5(str(tiny_t5), dtype="float32", padding_side=side)
    for prompt, together in zip(PROMPTS, rows(*t5(PROMPTS)[:2]), strict=True):
        torch.testing.assert_close(together, t5([prompt])[0][0], atol=1e-5, rtol=1e-5)


def test_the_first_token_sees_the_last(tiny_t5: Path) -> None:
    t5 = FrozenT5(str(tiny_t5), dtype="float32")
    a, b = (t5([f"a red circle to the left of a {word} square"])[0][0, 0] for word in ("blue", "green"))
    assert (a - b).abs().max() > 1e-4


def test_the_caption_is_kept_without_the_instruction(tiny_t5: Path) -> None:
    t5 = FrozenT5(str(tiny_t5), instruction="two green stars:", dtype="float32")
    kept = "".join(text for text, keep in t5.show("a red circle") if keep)
    assert "circle" in kept.replace("\u2581", " ")
    assert "star" not in kept
    assert t5([""])[1].sum() > 0


def test_bytes_are_known_from_the_config(tiny_t5: Path) -> None:
    t5 = FrozenT5(str(tiny_t5), dtype="float32")
    assert t5.nbytes == sum(p.nbytes for p in t5.load()._model.parameters())


def test_each_kind_is_refused_by_the_others_class_with_the_fix(tiny_t5: Path, tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match=r"encoder-decoder \(t5\); .*class_path lidit\.models\.t5\.FrozenT5"):
        _ = FrozenLLM(str(tiny_t5)).width
    with pytest.raises(ValueError, match=r"is no T5 \(llama\); read a decoder-only LLM by FrozenLLM"):
        _ = FrozenT5(str(tiny_llama)).width
