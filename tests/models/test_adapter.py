"""The adapter leaves a U-Net what it was until it is trained, trains nothing else, and is saved by itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lidit.models.adapter import AdaptedUNet, cross_attentions
from lidit.models.prompt_encoder import Text

CHANNELS, CROSS, E = 4, 24, 40
SIZES = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "sample_size": 16,
}
BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 20,
}


def written(folder: Path, **settings: object) -> Path:
    torch.manual_seed(0)
    UNet2DConditionModel(**SIZES, **BLOCKS, cross_attention_dim=CROSS, **settings).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("xl"), **XL)


def adapted(folder: Path, **settings: object) -> AdaptedUNet:
    torch.manual_seed(1)
    return AdaptedUNet(CHANNELS, str(folder), E, **settings)


def inputs() -> tuple[Tensor, Tensor, Text]:
    generator = torch.Generator().manual_seed(2)
    mask = torch.arange(7) < torch.tensor([7, 4])[:, None]
    tokens, pooled = torch.randn(2, 7, E, generator=generator), torch.randn(2, E, generator=generator)
    return torch.randn(2, CHANNELS, 8, 8, generator=generator), torch.tensor([0.5, 0.001]), Text(tokens, mask, pooled)


def test_gains_of_one_and_zero_reproduce_the_base_bit_for_bit(base: Path) -> None:
    model, (x, t, text) = adapted(base), inputs()
    original = torch.randn(2, 7, CROSS)
    model.phi = nn.Linear(E, CROSS, bias=False)
    with torch.no_grad():
        model.phi.weight.copy_(torch.eye(CROSS, E))  # phi gives the original features
    told = Text(torch.cat([original, torch.zeros(2, 7, E - CROSS)], -1), text.mask, text.pooled)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet").eval()
    with torch.no_grad():
        expected = unet(x, torch.tensor([499.0, 0.0]), original, encoder_attention_mask=text.mask.float()).sample
        assert torch.equal(model(x, t, told), expected)


def test_a_trained_second_attention_changes_the_prediction_by_what_c_says(base: Path) -> None:
    model, (x, t, text) = adapted(base), inputs()
    with torch.no_grad():
        before = model(x, t, text)
        for adapter in model.adapters.values():
            adapter.a2.fill_(1)
        after = model(x, t, text)
        assert (after - before).abs().max() > 1e-4
        hidden = text.tokens.clone()
        hidden[1, 4:] = 7.0  # padding
        torch.testing.assert_close(model(x, t, text._replace(tokens=hidden)), after)


def test_gradient_reaches_the_adapter_and_nothing_frozen(base: Path) -> None:
    model, (x, t, text) = adapted(base), inputs()
    with torch.no_grad():
        for adapter in model.adapters.values():
            adapter.a2.fill_(0.5)
    model(x, t, text).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None and not p.requires_grad for p in model._unet.parameters())
    assert not any("unet" in name for name in model.state_dict())
    trained, frozen = (sum(p.numel() for p in m.parameters()) for m in (model, model._unet))
    assert 0 < trained < frozen


def test_a_saved_adapter_on_a_fresh_base_draws_the_same(base: Path, tmp_path: Path) -> None:
    model, (x, t, text) = adapted(base), inputs()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    save_file(model.state_dict(), tmp_path / "adapter.safetensors")
    torch.manual_seed(9)
    fresh = AdaptedUNet(CHANNELS, str(base), E)
    fresh.load_state_dict(load_file(tmp_path / "adapter.safetensors"))
    with torch.no_grad():
        assert torch.equal(fresh(x, t, text), model(x, t, text))


def test_without_the_second_attention_phi_and_a_gain_are_left(base: Path) -> None:
    names = {name.rpartition(".")[2] for name in adapted(base, second=False).state_dict()}
    assert names == {"weight", "bias", "a1", "b1"}


def test_sdxl_reads_a_vector_of_the_whole_text(xl: Path) -> None:
    model, (x, t, text) = adapted(xl), inputs()
    assert model.pool.out_features == 20
    with torch.no_grad():
        a = model(x, t, text)
        assert (a - model(x, t, text._replace(pooled=-text.pooled))).abs().max() > 1e-6


def test_every_cross_attention_of_the_unet_is_adapted(base: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    names = [name for name, _ in unet.named_modules() if name.endswith("attn2")]
    assert sorted(cross_attentions(unet)) == sorted(name.replace(".", "-") for name in names)
    assert sorted(adapted(base).adapters) == sorted(cross_attentions(unet))


def test_mistakes_are_one_clear_message(base: Path, tmp_path: Path) -> None:
    x, t, text = inputs()
    with pytest.raises(ValueError, match="the text has 40 channels, and the adapter is for 16; set back"):
        AdaptedUNet(CHANNELS, str(base), 16)(x, t, text)
    with pytest.raises(ValueError, match="denoises latents of 4 channels, and the VAE has 16"):
        AdaptedUNet(16, str(base), E)
    UNet2DModel(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    ).save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="holds 'UNet2DModel', not a diffusers UNet2DConditionModel"):
        AdaptedUNet(3, str(tmp_path), E)
    plain = tmp_path / "plain"
    UNet2DConditionModel(
        **SIZES,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        mid_block_type=None,
        cross_attention_dim=CROSS,
    ).save_pretrained(plain / "unet")
    with pytest.raises(ValueError, match="has no cross-attention, which the adapter works through"):
        AdaptedUNet(CHANNELS, str(plain), E)
    shutil.rmtree(plain)
