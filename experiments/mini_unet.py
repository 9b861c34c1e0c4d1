r"""The miniature latent diffusion model that the LLMDiff-Adapter adapts: the bundled CLIP's text tower and a U-Net.

It has the folders of Stable Diffusion, `text_encoder/`, `unet/` and `scheduler/`, so that diffusers reads it too. The
tower was trained with pictures, like Stable Diffusion's, and is frozen; the U-Net is trained with the tower's text, as
the base of the adapter's table (which prints the run's folder):

    python -m experiments.mini_unet text_encoder
    lidit table experiments/llmdiff_ablation.py run --rows "[\"the U-Net's own text encoder\"]"
    python -m experiments.mini_unet bundle --checkpoint runs/tables/mini/RUN/seed0/checkpoints/latest --count 60
"""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import DDPMScheduler
from diffusers.models import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from experiments.cards import versions, write_card
from experiments.mini_lidit import score
from lidit.assets import resolve
from lidit.checkpoint import read
from lidit.objectives import DDPM

OUT = "lidit/assets/unet"
TRAINED_BY = r'''lidit table experiments/llmdiff_ablation.py run --rows "[\"the U-Net's own text encoder\"]"'''
PLACES = {  # names of a tower's weights in open_clip, and in transformers
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final": "final_layer_norm",
    "transformer.resblocks": "encoder.layers",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
UNREAD = ("visual.", "text_projection", "logit_scale", "attn_mask")


def as_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip model's text tower under transformers' names, with queries, keys and values separated."""
    tower = {}
    for name, weight in weights.items():
        if name.startswith(UNREAD):
            continue
        for theirs, ours in PLACES.items():
            name = name.replace(theirs, ours)
        if "attn.in_proj_" in name:
            for part, rows in zip("qkv", weight.chunk(3), strict=True):
                tower[name.replace("attn.in_proj_", f"self_attn.{part}_proj.")] = rows
        else:
            tower[name] = weight
    return tower


def text_encoder(clip: str = "bundled:clip", out: str = f"{OUT}/text_encoder") -> None:
    """Write the text tower of an open_clip folder as a transformers CLIPTextModel in float16, with its tokenizer.

    Args:
        clip: folder of an open_clip model with a causal text tower.
        out: folder to write.
    """
    folder = Path(resolve(clip))
    text = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = CLIPTextConfig(
        vocab_size=text["vocab_size"],
        hidden_size=text["width"],
        intermediate_size=4 * text["width"],
        num_hidden_layers=text["layers"],
        num_attention_heads=text["heads"],
        max_position_embeddings=text["context_length"],
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModel(config)
    model.load_state_dict(as_transformers(load_file(folder / "open_clip_model.safetensors")))
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{out}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")


def bundle(checkpoint: str, out: str = OUT, count: int = 100) -> None:
    """Write a checkpoint's averaged U-Net in float16 and the scheduler, score it, and write the card.

    Args:
        checkpoint: a checkpoint of `lidit fit` with a `UNet` backbone.
        out: the folder that `text_encoder` has been written into.
        count: prompts per task.
    """
    config, weights, *_ = read(Path(checkpoint), ema=True)
    settings = config["backbone"]["init_args"]["settings"]
    ours = {name.removeprefix("backbone.unet."): weight for name, weight in weights.items()}
    channels = ours["conv_in.weight"].shape[1]
    unet = UNet2DConditionModel(in_channels=channels, out_channels=channels, **settings)
    unet.load_state_dict(ours)
    unet.half().save_pretrained(f"{out}/unet")
    schedule = config["objective"]["init_args"]["schedule"]
    first, last, _ = DDPM.betas[schedule]
    DDPMScheduler(1000, first, last, schedule).save_pretrained(f"{out}/scheduler")
    measured = {name: score(checkpoint, name, count) for name in ("heldout", "attributes")}
    write_card(
        Path(out),
        made_by=f"python -m experiments.mini_unet text_encoder; {TRAINED_BY}; python -m experiments.mini_unet bundle",
        seed=0,
        data=f"drawn 64x64 scenes; {count} prompts a task: share of prompts that hold; of attributes, share of facts",
        measured=measured | {"parameters": sum(p.numel() for p in unet.parameters())},
        versions=versions("torch", "diffusers", "transformers"),
    )


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli({"text_encoder": text_encoder, "bundle": bundle}, as_positional=False)
