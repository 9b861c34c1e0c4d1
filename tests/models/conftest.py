"""Models of more families than the tiny Llama and Qwen, with the tokenizer of one of these."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)


@pytest.fixture(scope="session")
def sliding_qwen(tmp_path_factory: pytest.TempPathFactory, tiny_qwen: Path) -> Path:
    """A Qwen2 whose last two of four blocks see eight tokens back only."""
    config = json.loads((tiny_qwen / "config.json").read_text())
    changed = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "layer_types": None}
    torch.manual_seed(3)
    model = Qwen2ForCausalLM(Qwen2Config(**config | changed))
    return beside_tokenizer(model, tiny_qwen, tmp_path_factory.mktemp("sliding"))


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """Learned positions, and other names for everything."""
    torch.manual_seed(4)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=4, n_head=4, n_positions=512))
    return beside_tokenizer(model, tiny_llama, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    torch.manual_seed(5)
    model = LlavaForConditionalGeneration(LlavaConfig(**towers(tiny_llama)))
    return beside_tokenizer(model, tiny_llama, tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def llava_next(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    torch.manual_seed(6)
    config = LlavaNextConfig(**towers(tiny_llama), image_grid_pinpoints=[[28, 28]])
    return beside_tokenizer(
        LlavaNextForConditionalGeneration(config), tiny_llama, tmp_path_factory.mktemp("llava_next")
    )


@pytest.fixture(scope="session")
def llava_new_names(tmp_path_factory: pytest.TempPathFactory, llava: Path) -> Path:
    """The same weights, named as later versions of transformers name them."""
    folder = tmp_path_factory.mktemp("new_names") / "llava"
    shutil.copytree(llava, folder)
    weights = load_file(llava / "model.safetensors")
    assert any(key.startswith("language_model.model.layers") for key in weights)
    renamed = {key.replace("language_model.model.", "model.language_model."): value for key, value in weights.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    return folder


def towers(tiny_llama: Path) -> dict:
    text = LlamaConfig(**json.loads((tiny_llama / "config.json").read_text()))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=28, patch_size=14, projection_dim=16)
    return {"text_config": text, "vision_config": vision, "image_token_index": 5}


def beside_tokenizer(model: PreTrainedModel, tokenizer: Path, folder: Path) -> Path:
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    model.save_pretrained(folder)
    return folder
