"""A CLIP's text tower is read as Stable Diffusion reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig

from experiments.mini_clip import make_tokenizer
from lidit.models.clip import FrozenCLIPText
from lidit.models.contracts import is_caption, longest_caption

POSITIONS = 12


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = make_tokenizer(300, ["a red circle and a blue square"] * 4)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = CLIPTextConfig(vocab_size=300, max_position_embeddings=POSITIONS, **sizes, **special)
    CLIPTextModel(config).save_pretrained(folder)
    return folder


def test_features_are_what_stable_diffusion_conditions_on(tower: Path) -> None:
    prompts = ["a red circle", "", "a blue square and a blue square and a red circle"]
    clip = FrozenCLIPText(str(tower), max_tokens=POSITIONS - 2)
    with pytest.warns(UserWarning, match="is cut there"):
        tokens, mask, start = clip(prompts)
    asked = clip.prompts.tokenizer(
        prompts, padding="max_length", max_length=POSITIONS, truncation=True, return_tensors="pt"
    )
    expected = CLIPTextModel.from_pretrained(tower)(asked.input_ids).last_hidden_state
    assert torch.allclose(tokens, expected, atol=1e-6)
    assert mask.all()
    assert not start.any()
    assert tokens.shape == (3, POSITIONS, clip.width)


def test_prompts_are_not_mixed(tower: Path) -> None:
    clip = FrozenCLIPText(str(tower), max_tokens=POSITIONS - 2)
    assert torch.allclose(clip(["a red circle", "a blue square"])[0][1:], clip(["a blue square"])[0], atol=1e-6)


def test_what_is_no_clip_or_of_another_length_is_refused(tower: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reads 10 tokens between start and end; set max_tokens to 10"):
        FrozenCLIPText(str(tower)).load()
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of type llama, not a CLIP"):
        FrozenCLIPText(str(tmp_path)).load()


def test_its_bytes_are_known_without_its_weights(tower: Path) -> None:
    clip = FrozenCLIPText(str(tower), max_tokens=POSITIONS - 2)
    assert clip.nbytes == sum(p.nbytes for p in CLIPTextModel.from_pretrained(tower).parameters())
    assert not clip.loaded


def test_the_longest_caption_counts_what_the_mask_counts(tower: Path) -> None:
    features = FrozenCLIPText(str(tower), max_tokens=POSITIONS - 2)(["a red circle", "a square"])
    _, mask, start = features
    assert longest_caption(features) == is_caption(mask, start).sum(1).max() > 4  # padding is read, too
