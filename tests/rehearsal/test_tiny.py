"""Tiny frozen models keep what a recipe refers to: class, blocks, latent channels and factor, the template's form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration, Qwen2Config, Qwen2Model

from lidit.models.adapter import AdaptedUNet
from lidit.models.llm import FrozenLLM
from lidit.models.vae import FrozenVAE
from lidit.rehearsal.tiny import small_width, tiny, tokenizer_of_bytes

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("llava-hf/llama3-llava-next-8b-hf", 30),
        ("llava-hf/llava-interleave-qwen-7b-hf", 30),
        ("Qwen/Qwen2.5-1.5B-Instruct", 26),
    ],
)
def test_an_llm_of_the_hub_becomes_a_small_one_with_all_its_blocks(name: str, depth: int, tmp_path: Path) -> None:
    llm = FrozenLLM(str(tiny(name, None, None, tmp_path)), layer=-3)
    assert llm.depth == depth
    assert llm.width <= 64
    features, mask, start = llm(["a red circle", "a dog"])
    assert features.isfinite().all()
    assert features.shape[:2] == mask.shape
    shown = llm.show("a dog")
    assert "".join(text for text, read in shown if read) == "a dog" + shown[-1][0]
    assert shown[-1][0] in ("<|eot_id|>", "<|im_end|>")  # what closes the user's turn in the large model, too


def test_a_llava_model_stays_one_with_a_vision_tower(tmp_path: Path) -> None:
    folder = tiny("llava-hf/llava-interleave-qwen-7b-hf", None, None, tmp_path)
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    assert type(model.config.vision_config).__name__ == "SiglipVisionConfig"
    assert model.config.text_config.num_hidden_layers == 32


def test_a_vae_keeps_channels_factor_and_scale(tmp_path: Path) -> None:
    folder = tiny("stabilityai/stable-diffusion-3-medium-diffusers", "vae", None, tmp_path)
    vae = FrozenVAE(str(folder), subfolder="vae")
    assert (vae.channels, vae.factor, vae.config["scaling_factor"]) == (16, 8, 1.5305)
    assert vae.decode(vae.encode(torch.zeros(1, 3, 64, 64))).shape == (1, 3, 64, 64)


def test_a_unet_keeps_its_levels(tmp_path: Path) -> None:
    unet = AdaptedUNet(4, str(tiny(SD15, "unet", None, tmp_path)), text_width=32)
    assert unet.config["down_block_types"] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert unet.width == 32
    assert len(unet.adapters) == 16


def test_a_folder_s_own_tokenizer_and_template_are_used(tmp_path: Path) -> None:
    large = tmp_path / "large"
    Qwen2Config(hidden_size=4096, num_hidden_layers=3, architectures=["Qwen2Model"]).save_pretrained(large)
    tokenizer_of_bytes("{% for m in messages %}<|own|>{{ m.content }}<|shut|>{% endfor %}").save_pretrained(large)
    made = tiny(str(large), None, None, tmp_path / "tiny")
    assert isinstance(Qwen2Model.from_pretrained(made), Qwen2Model)
    shown = FrozenLLM(str(made), layer=-1, instruction="").show("hi")
    assert [text for text, _ in shown] == ["<|own|>", "h", "i", "<|shut|>"]


def test_a_model_without_a_tokenizer_says_how_to_fetch_it(tmp_path: Path) -> None:
    Qwen2Config(architectures=["Qwen2Model"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the tokenizer of .* is in no folder .* `hf download"):
        tiny(str(tmp_path), None, None, tmp_path / "tiny")


def test_a_class_that_nobody_knows_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "architectures": ["Nobody"]}))
    with pytest.raises(ValueError, match="is a Nobody, which transformers does not know"):
        tiny(str(tmp_path), None, None, tmp_path / "tiny")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "NobodyVAE"}))
    with pytest.raises(ValueError, match="is a NobodyVAE, which a rehearsal cannot shrink"):
        tiny(str(tmp_path), None, None, tmp_path / "tiny")


def test_wider_stays_wider() -> None:
    assert [small_width(width) for width in (768, 1536, 4096, 5120, 8192)] == [32, 32, 64, 80, 128]
