"""Shards with two image shapes, and a VAE and two LLMs of a few thousand random parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from data_prep.shard import shard

TEMPLATE = "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}<|end|>{% endfor %}"


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "shards"
    shard(str(folder), count=24, sizes=("32x32", "32x32", "48x32"), shard_size=10, workers=1)
    return folder


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("parts") / "vae"
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 4, "layers_per_block": 1}
    AutoencoderKL(**blocks, **sizes, scaling_factor=0.7, shift_factor=0.1).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def llm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llm(tmp_path_factory.mktemp("parts") / "llm", width=16)


@pytest.fixture(scope="session")
def other_llm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llm(tmp_path_factory.mktemp("parts") / "other", width=24)


def save_llm(folder: Path, width: int) -> str:
    """A random Llama of four blocks whose tokens are bytes."""
    special = ["<|user|>", "<|system|>", "<|end|>"]
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    torch.manual_seed(width)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 4}
    size = {"hidden_size": width, "intermediate_size": 32, "max_position_embeddings": 1024}
    LlamaModel(LlamaConfig(vocab_size=len(vocabulary) + len(special), **size, **heads)).save_pretrained(folder)
    return str(folder)
