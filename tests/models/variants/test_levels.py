"""Several hidden states of an LLM: which they are, and how they become one text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel

from lidit.models.contracts import Text
from lidit.models.variants.backbone import VariantLIDiT
from lidit.models.variants.encoder import VariantEncoder
from lidit.models.variants.llm import MultiLevelLLM

PROMPTS = ["a red circle", "two blue squares to the left of a green star"]


@torch.no_grad()
def hidden_states(folder: Path, llm: MultiLevelLLM, prompt: str) -> tuple[torch.Tensor, ...]:
    ids = torch.tensor([llm.prompts.split(prompt).ids])
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model(input_ids=ids, output_hidden_states=True).hidden_states


@pytest.mark.parametrize(("layer", "levels", "taps"), [(-1, 4, [1, 2, 3, 4]), (-1, 2, [2, 4]), (-3, 2, [1, 2])])
@pytest.mark.parametrize("side", ["right", "left"])
def test_levels_are_hidden_states_beside_one_another(
    layer: int, levels: int, taps: list[int], side: str, tiny_llama: Path
) -> None:
    llm = MultiLevelLLM(str(tiny_llama), layer=layer, levels=levels, dtype="float32", padding_side=side)
    assert llm.taps == taps
    tokens, mask, _ = llm(PROMPTS)  # with the shared instruction run once, where the padding is on the right
    assert tokens.shape[2] == llm.width == levels * 32
    for row, prompt in enumerate(PROMPTS):
        states = hidden_states(tiny_llama, llm, prompt)
        expected = torch.cat([states[tap] for tap in taps], -1)[0]
        torch.testing.assert_close(tokens[row, mask[row]], expected, atol=1e-5, rtol=1e-5)


def test_the_mean_is_of_all_hidden_states_each_normalised(tiny_qwen: Path) -> None:
    llm = MultiLevelLLM(str(tiny_qwen), layer=-1, levels="mean", dtype="float32")
    tokens, _, _ = llm(PROMPTS[:1])
    states = hidden_states(tiny_qwen, llm, PROMPTS[0])[1:]
    assert tokens.shape[2] == llm.width == 48
    expected = torch.stack([F.layer_norm(state, (48,)) for state in states]).mean(0)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


def test_a_cache_of_one_level_is_stale_for_several_and_valid_as_before(tiny_llama: Path) -> None:
    one, two = (MultiLevelLLM(str(tiny_llama), levels=levels).identity for levels in (1, 2))
    assert "levels" not in one
    assert one != two


@pytest.mark.parametrize(("levels", "message"), [(5, "has 4 blocks up to layer -1"), (0, "at least 1, or mean")])
def test_levels_that_are_not_there_are_refused(levels: int, message: str, tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match=message):
        _ = MultiLevelLLM(str(tiny_llama), layer=-1, levels=levels).taps


def test_levels_of_llm_and_prompt_encoder_must_agree() -> None:
    with pytest.raises(ValueError, match="32 feature channels do not divide into 3 levels; use the same `levels`"):
        VariantEncoder([32], 64, heads=4, levels=3)
    with pytest.raises(ValueError, match="set refiner_depth=0, fusion=concat"):
        VariantEncoder([32, 32], 64, heads=4, levels=2, mix="per_block")


def test_learnt_weights_begin_as_a_mean_and_choose(tiny_llama: Path) -> None:
    model = VariantEncoder([64], 32, heads=4, refiner_depth=0, levels=2, mix="weights")
    low, high = torch.randn(2, 1, 5, 32)
    mix = model.project[0]
    torch.testing.assert_close(mix(torch.cat([low, high], -1)), mix.project((low + high) / 2))
    with torch.no_grad():
        mix.weights[1] = 100
    torch.testing.assert_close(mix(torch.cat([low, high], -1)), mix.project(high))


def test_a_text_of_several_levels_gives_each_block_its_own() -> None:
    model = VariantLIDiT(4, levels=2, depth=2, width=32, heads=4)
    low, high = torch.randn(2, 2, 5, 32)
    mask, pooled = torch.ones(2, 5, dtype=torch.bool), torch.randn(2, 32)
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    model(torch.randn(2, 4, 8, 8), torch.rand(2), Text(torch.cat([low, high], -1), mask, pooled))
    assert len(seen) == 2
    for read, given in zip(seen, (low, high), strict=True):
        torch.testing.assert_close(read, model.text_norm(given))


def test_a_text_of_other_levels_than_the_backbones_is_refused() -> None:
    model = VariantLIDiT(4, levels=2, depth=2, width=32, heads=4)
    text = Text(torch.randn(1, 5, 32), torch.ones(1, 5, dtype=torch.bool), torch.randn(1, 32))
    with pytest.raises(ValueError, match="32 channels, not 2 levels of 32"):
        model(torch.randn(1, 4, 8, 8), torch.rand(1), text)
