"""The encoder of a T5 keeps the contract of a frozen LLM, without a causal mask and without a chat."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForSeq2SeqLM,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from lidit.models.llm import INSTRUCTION, FrozenLLM
from lidit.models.t5 import FrozenT5
from lidit.module import TextToImage

PROMPTS = ["a red circle", "", "a red circle to the left of a blue square, and nothing else at all in the picture"]
KINDS = {
    "t5": (T5Config, T5ForConditionalGeneration),
    "mt5": (MT5Config, MT5ForConditionalGeneration),
    "umt5": (UMT5Config, UMT5ForConditionalGeneration),
}


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A Unigram tokenizer that marks beginnings of words, as T5's does."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([*PROMPTS, INSTRUCTION, "abcdefghijklmnopqrstuvwxyz"] * 5, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token=None
    )


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole encoder-decoder of 4 blocks each, with its tokenizer."""
    config, model = KINDS[request.param]
    tokenizer = sentencepiece_like()
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_decoder_layers": 2, "num_heads": 4}
    made = model(config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **sizes))
    path = tmp_path_factory.mktemp(request.param)
    made.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def exact(folder: Path, **settings: object) -> FrozenT5:
    return FrozenT5(str(folder), **{"dtype": "float32"} | settings)


def rows(features: tuple) -> list[torch.Tensor]:
    return [row[valid] for row, valid in zip(*features[:2], strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 2, -3, -2, -1])
def test_features_are_the_hidden_state_of_the_whole_models_encoder(folder: Path, layer: int) -> None:
    llm = exact(folder, layer=layer)
    tokens, mask, _ = llm([PROMPTS[2]])
    assert mask.all()
    whole = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([llm.prompts.split(PROMPTS[2]).ids])
    expected = whole.get_encoder()(input_ids=ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(tokens, expected[layer], atol=1e-5, rtol=1e-5)


def test_the_decoder_and_later_blocks_are_not_read(folder: Path) -> None:
    names = [name for name, _ in exact(folder, layer=-3).load()._model.named_parameters()]
    assert not any("decoder" in name or "lm_head" in name or "final_layer_norm" in name for name in names)
    assert any("block.1." in name for name in names)
    assert not any("block.2." in name for name in names)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_prompt_alone_and_among_longer_ones_gives_the_same_features(folder: Path, side: str) -> None:
    llm = exact(folder, padding_side=side, instruction=INSTRUCTION)
    features = llm(PROMPTS)
    assert not features[0][~features[1]].any()
    for prompt, row in zip(PROMPTS, rows(features), strict=True):
        torch.testing.assert_close(llm([prompt])[0][0], row, atol=1e-5, rtol=1e-5)


def test_an_early_token_sees_a_late_one(folder: Path) -> None:
    llm = exact(folder)
    first, other = llm(["a red circle and a square"]), llm(["a red circle and a circle"])
    assert (first[0][0, 0] - other[0][0, 0]).abs().max() > 1e-4


def test_the_caption_starts_at_0_and_after_an_instruction_if_there_is_one(folder: Path) -> None:
    _, mask, start = exact(folder)(PROMPTS)
    assert start.tolist() == [0, 0, 0]
    assert mask.sum(1)[1] == 1  # the end-of-text token of the empty caption
    llm = exact(folder, instruction=INSTRUCTION)
    _, instructed, after = llm(PROMPTS)
    assert all(after > 1)
    assert (instructed.sum(1) - after).tolist() == mask.sum(1).tolist()


def test_width_and_skeleton_need_no_weights_and_identity_tells_settings_apart(folder: Path) -> None:
    llm = exact(folder)
    assert llm.width == 32
    assert not llm.loaded
    shapes = {name: tuple(p.shape) for name, p in llm.skeleton().named_parameters()}
    assert shapes == {name: tuple(p.shape) for name, p in llm.load()._model.named_parameters()}
    assert len({str(each.identity) for each in (llm, exact(folder, layer=-2), exact(folder, instruction="Draw:"))}) == 3


def test_each_class_refuses_the_others_models_and_names_the_right_one(folder: Path, tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match=r"is an encoder-decoder .*lidit\.models\.t5\.FrozenT5"):
        FrozenLLM(str(folder)).load()
    with pytest.raises(ValueError, match=r"is of type llama, not t5.*lidit\.models\.llm\.FrozenLLM"):
        FrozenT5(str(tiny_llama)).load()


def test_a_recipe_names_both_kinds_in_one_list(folder: Path, tiny_llama: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TextToImage, "model", skip={"vae", "prompt_encoder", "backbone", "objective"})
    t5 = {"class_path": "lidit.models.t5.FrozenT5", "init_args": {"name": str(folder)}}
    made = parser.parse_object({"model": {"llms": [{"name": str(tiny_llama)}, t5]}})
    assert [entry["class_path"].rpartition(".")[2] for entry in made.model.llms] == ["FrozenLLM", "FrozenT5"]
