"""Tiny models of the same classes as a recipe's frozen ones, with random weights.

What the recipe refers to stays: an LLM's blocks, a VAE's latent channels and factor, a U-Net's levels, the form of a
chat template. A tokenizer is the model's own where a folder or the hub's cache has it, else one of bytes with its
template.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from lidit.models.chat import read_tokenizer
from lidit.models.source import SHIPPED, find_file, sizes_alone

LARGE = 20e6  # bytes of a config's widest weight that make a model worth shrinking
DIVISOR, SMALLEST = 64, 32  # a width becomes this part of itself, and at least so many channels
HEADS = 4
WIDTHS = ("hidden_size", "d_model", "projection_dim", "text_embed_dim", "embed_dim")
HEAD_COUNTS = ("num_attention_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "image_token_index", "image_token_id", "video_token_id")
SPECIAL = re.compile(r"<\|[^|<>]+\|>")


def tiny(name: str, subfolder: str | None, revision: str | None, folder: Path) -> Path:
    """Write a tiny model of the class that a frozen model is of, and return the folder to name instead of it.

    Args:
        name: Hugging Face id, folder, or `bundled:NAME` of the large one.
        subfolder: its folder inside `name`.
        revision: branch, tag or commit on the Hugging Face hub.
        folder: the folder to write.

    Raises:
        FileNotFoundError: neither a folder, nor the hub's cache, nor this package knows the model's sizes.
        ValueError: its class is not known, or it cannot be made small.
    """
    wanted = f"{subfolder}/config.json" if subfolder else "config.json"
    with sizes_alone():
        config = json.loads(find_file(name, wanted, revision).read_text())
    out = folder / (subfolder or "")
    torch.manual_seed(0)
    if "_class_name" in config:
        _tiny_of_diffusers(name, config).save_pretrained(out)
    else:
        _tiny_of_transformers(name, revision, config, out)
    return folder


def small_width(width: int) -> int:
    """The channels that a width becomes; wider ones stay wider."""
    return max(SMALLEST, width // DIVISOR // 8 * 8)


def _tiny_of_diffusers(name: str, config: dict[str, Any]) -> Any:
    """An AutoencoderKL, a U-Net or another model of diffusers with few channels on each level."""
    kind = getattr(diffusers, config["_class_name"], None)
    if kind is None or "block_out_channels" not in config:
        raise ValueError(f"{name} is a {config['_class_name']}, which a rehearsal cannot shrink; name a smaller model")
    sizes = config | {"block_out_channels": [SMALLEST] * len(config["block_out_channels"])}
    sizes["norm_num_groups"] = 8
    if config["_class_name"] == "AutoencoderKL":
        sizes["layers_per_block"] = 1
    if "cross_attention_dim" in config:
        sizes["cross_attention_dim"] = small_width(config["cross_attention_dim"])
    if config.get("addition_embed_type") == "text_time":  # SDXL: a vector of the text and six numbers of the image
        sizes |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": SMALLEST + 6 * 8}
    return kind.from_config(sizes)


def _tiny_of_transformers(name: str, revision: str | None, config: dict[str, Any], out: Path) -> None:
    """A model of transformers with its tokenizer."""
    (architecture,) = config.get("architectures") or [None]
    kind = getattr(transformers, str(architecture), None)
    if kind is None:
        raise ValueError(f"{name} is a {architecture}, which transformers does not know; a rehearsal cannot shrink it")
    tokenizer = tokenizer_of(name, revision)
    last = len(tokenizer) - 1
    sizes = _small(config, last)
    model_type = config["model_type"]
    model = kind(AutoConfig.for_model(**sizes)).to(torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    if count > LARGE:
        raise ValueError(
            f"{name} ({model_type}) still has {count / 1e6:.0f}M parameters with small sizes; name another"
        )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _small(config: dict[str, Any], last: int) -> dict[str, Any]:
    """A config of transformers with small widths; every number of blocks that features are read from stays.

    Args:
        config: of a model, or of a tower of it.
        last: the last token's number.
    """
    small = dict(config) | {"head_dim": 8, "d_kv": 8, "intermediate_size": 2 * SMALLEST, "d_ff": 2 * SMALLEST}
    small |= {"ffn_dim": 2 * SMALLEST, "moe_intermediate_size": 2 * SMALLEST, "vocab_size": last + 1}
    small |= {"image_size": 2 * config.get("patch_size", 1)} | dict.fromkeys(HEAD_COUNTS, HEADS)
    small |= {key: small_width(config[key]) for key in WIDTHS if isinstance(config.get(key), int)}
    small |= {key: min(config.get(key) or last, last) for key in TOKENS if isinstance(config.get(key), int)}
    small |= {key: min(config[key], HEADS) for key in ("num_experts", "num_local_experts") if key in config}
    if "num_key_value_heads" in config:
        heads = next(config[key] for key in HEAD_COUNTS if key in config)
        small["num_key_value_heads"] = max(1, HEADS * config["num_key_value_heads"] // heads)
    towers = {key: _small(each, last) for key, each in config.items() if key.endswith("_config")}
    if "vision_config" in towers:  # its features are never read
        towers["vision_config"]["num_hidden_layers"] = 2
    return {key: value for key, value in small.items() if key in config} | towers


def tokenizer_of(name: str, revision: str | None) -> PreTrainedTokenizerFast:
    """A model's own tokenizer, or where neither a folder nor a cache has it, one of bytes with its template's form.

    Raises:
        ValueError: neither is there.
    """
    shipped = SHIPPED / name.replace("/", "--") / "chat_template.jinja"
    try:
        tokenizer = read_tokenizer(name, revision, local_files_only=True)
    except FileNotFoundError:
        if not shipped.is_file():
            raise ValueError(
                f"the tokenizer of {name} is in no folder and not in the hub's cache, and a rehearsal needs it: "
                f"`hf download {name} --include '*.json' '*.jinja'` fetches it without the weights"
            ) from None
        return tokenizer_of_bytes(shipped.read_text().removesuffix("\n"))
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _template_beside(name, revision)
    return tokenizer


def _template_beside(name: str, revision: str | None) -> str | None:
    """The template in a file of its own, where LLaVA-type models from before 2025 have it."""
    try:
        return json.loads(find_file(name, "chat_template.json", revision).read_text())["chat_template"]
    except FileNotFoundError:
        return None  # a recipe with template=plain needs none


def tokenizer_of_bytes(template: str) -> PreTrainedTokenizerFast:
    """A fast tokenizer of bytes that knows a chat template and the special tokens in it."""
    begin = "<|begin_of_text|>"
    special = list(dict.fromkeys([begin, "<|endoftext|>", *SPECIAL.findall(template)]))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(special + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=special[1],
        pad_token=special[1],
        additional_special_tokens=special[2:],
    )
    fast.chat_template = template
    return fast
