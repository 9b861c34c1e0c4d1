"""Training the miniature VAE: new latents are scaled, and training its decoder on leaves them as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from experiments.mini_vae import images, train
from lidit.pixels import signed

SMALL = {"widths": (8, 8), "latent_channels": 4, "batch_size": 4, "scenes": 8, "threads": 1}


@pytest.mark.slow
@torch.no_grad()
def test_a_new_vae_is_scaled_to_unit_variance_and_training_its_decoder_keeps_its_latents(tmp_path: Path) -> None:
    with torch.enable_grad():
        train(str(tmp_path / "new"), steps=4, **SMALL)
        train(str(tmp_path / "decoder"), steps=4, start=str(tmp_path / "new"), **SMALL)
    first, second = (
        AutoencoderKL.from_pretrained(tmp_path / name, torch_dtype=torch.float32) for name in ("new", "decoder")
    )
    pixels = signed(images(0, 8, 64, 64))
    latent = first.encode(pixels).latent_dist.mode()
    scaled = (latent - first.config.shift_factor) * first.config.scaling_factor
    assert scaled.mean().abs() < 0.1
    assert scaled.std() == pytest.approx(1, abs=0.1)
    assert (second.config.shift_factor, second.config.scaling_factor) == (
        first.config.shift_factor,
        first.config.scaling_factor,
    )
    assert torch.equal(second.encode(pixels).latent_dist.mode(), latent)
