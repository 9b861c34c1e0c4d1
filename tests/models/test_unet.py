"""A trained U-Net is diffusers' own, at the times of the objective."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from lidit.models.prompt_encoder import Text
from lidit.models.unet import UNet, step_of
from lidit.objectives import DDPM

SETTINGS = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def text(width: int) -> Text:
    mask = torch.arange(5) < torch.tensor([5, 3])[:, None]
    return Text(torch.randn(2, 5, width), mask, torch.randn(2, width))


def test_it_predicts_what_diffusers_predicts_at_the_step_of_the_time() -> None:
    torch.manual_seed(0)
    model, x, said = UNet(4, SETTINGS), torch.randn(2, 4, 8, 8), text(24)
    assert (model.width, model.patch) == (24, 2)
    ours = model(x, torch.tensor([0.001, 1.0]), said)
    theirs = model.unet(x, torch.tensor([0, 999]), said.tokens, encoder_attention_mask=said.mask.float()).sample
    assert torch.equal(ours, theirs)


def test_padding_is_not_read() -> None:
    torch.manual_seed(0)
    model, x, said = UNet(4, SETTINGS), torch.randn(2, 4, 8, 8), text(24)
    other = Text(said.tokens + 9 * ~said.mask[..., None], said.mask, said.pooled)
    t = torch.tensor([0.5, 0.5])
    assert torch.allclose(model(x, t, said), model(x, t, other), atol=1e-6)


def test_the_steps_are_those_of_diffusers_schedule() -> None:
    objective, scheduler = DDPM("scaled_linear"), DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    t = torch.tensor([0.001, 0.5, 1.0])
    alpha, _ = objective.alpha_sigma(t)
    assert torch.allclose(alpha**2, scheduler.alphas_cumprod[step_of(t).long()], atol=1e-6)


def test_text_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="the text has 16 channels and the U-Net reads 24"):
        UNet(4, SETTINGS)(torch.randn(2, 4, 8, 8), torch.tensor([0.5, 0.5]), text(16))
