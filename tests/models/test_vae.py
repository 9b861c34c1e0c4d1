"""A frozen VAE scales latents by its own config and gives back what diffusers gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from lidit.models.vae import FrozenVAE


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def pipeline(tmp_path: Path, tiny_vae: Path) -> Path:
    """A folder as of a whole text-to-image pipeline."""
    (tmp_path / "model_index.json").write_text("{}")
    shutil.copytree(tiny_vae, tmp_path / "vae")
    return tmp_path


def edited(folder: Path, **config: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_latents_are_the_posterior_mode_shifted_and_scaled(tiny_vae: Path, image: Tensor) -> None:
    vae = FrozenVAE(str(tiny_vae))
    mode = AutoencoderKL.from_pretrained(tiny_vae).encode(image).latent_dist.mode()
    latent = vae.encode(image)
    assert latent.shape == (2, vae.channels, 64 // vae.factor, 96 // vae.factor) == (2, 4, 8, 12)
    torch.testing.assert_close(latent, (mode - 0.1) * 1.5)
    assert torch.equal(latent, vae.encode(image))


def test_decoding_undoes_scale_and_shift(tiny_vae: Path, image: Tensor) -> None:
    vae = FrozenVAE(str(tiny_vae))
    reference = AutoencoderKL.from_pretrained(tiny_vae)
    mode = reference.encode(image).latent_dist.mode()
    decoded = vae.decode(vae.encode(image))
    assert decoded.shape == image.shape
    torch.testing.assert_close(decoded, reference.decode(mode).sample.clamp(-1, 1), atol=1e-4, rtol=1e-5)


def test_a_config_without_a_shift_shifts_by_nothing(tmp_path: Path, tiny_vae: Path, image: Tensor) -> None:
    folder = edited(shutil.copytree(tiny_vae, tmp_path / "vae"), shift_factor=None)
    shifted = FrozenVAE(str(tiny_vae)).encode(image)
    torch.testing.assert_close(FrozenVAE(str(folder)).encode(image), shifted + 0.1 * 1.5)


def test_images_are_decoded_into_their_range(tiny_vae: Path) -> None:
    decoded = FrozenVAE(str(tiny_vae)).decode(torch.randn(1, 4, 8, 8) * 1e3)
    assert decoded.abs().max() <= 1


def test_channels_and_factor_need_the_config_alone(tmp_path: Path, tiny_vae: Path) -> None:
    shutil.copy(tiny_vae / "config.json", tmp_path)
    vae = FrozenVAE(str(tmp_path))
    assert (vae.channels, vae.factor) == (4, 8)


def test_a_size_that_does_not_divide_is_refused_with_the_fix(tiny_vae: Path) -> None:
    with pytest.raises(ValueError, match="100x64 pixels .* choose a width and a height divisible by 8"):
        FrozenVAE(str(tiny_vae)).encode(torch.zeros(1, 3, 64, 100))


def test_bfloat16_weights_give_bfloat16_latents_of_the_same_image(tiny_vae: Path, image: Tensor) -> None:
    latent = FrozenVAE(str(tiny_vae), dtype="bfloat16").encode(image)
    assert latent.dtype == torch.bfloat16
    torch.testing.assert_close(latent.float(), FrozenVAE(str(tiny_vae)).encode(image), atol=0.1, rtol=0.1)


def test_latents_do_not_change_under_autocast(tiny_vae: Path, image: Tensor) -> None:
    vae = FrozenVAE(str(tiny_vae))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latent = vae.encode(image)
        decoded = vae.decode(latent)
    assert torch.equal(latent, vae.encode(image))
    assert torch.equal(decoded, vae.decode(latent))


def test_nothing_of_it_is_trained(tiny_vae: Path, image: Tensor) -> None:
    vae = FrozenVAE(str(tiny_vae)).load()
    assert not vae.encode(image.requires_grad_()).requires_grad
    assert not any(p.requires_grad for p in vae._model.parameters())
    assert not vae._model.training


def test_loading_twice_reads_once(tiny_vae: Path) -> None:
    vae = FrozenVAE(str(tiny_vae))
    assert vae.load() is vae
    model = vae._model
    assert vae.load("cpu")._model is model


def test_a_pipeline_is_read_by_its_subfolder(pipeline: Path, tiny_vae: Path, image: Tensor) -> None:
    vae = FrozenVAE(str(pipeline), subfolder="vae")
    assert torch.equal(vae.encode(image), FrozenVAE(str(tiny_vae)).encode(image))
    with pytest.raises(FileNotFoundError, match="is a folder without config.json"):
        FrozenVAE(str(pipeline)).load()


def test_the_identity_changes_with_the_weights_and_not_with_the_place(tmp_path: Path, tiny_vae: Path) -> None:
    moved = shutil.copytree(tiny_vae, tmp_path / tiny_vae.name)
    first = FrozenVAE(str(tiny_vae)).identity
    assert first == FrozenVAE(str(moved)).identity == json.loads(json.dumps(first))
    weights = load_file(moved / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.bias"] += 1
    save_file(weights, moved / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    others = [FrozenVAE(str(moved)).identity, FrozenVAE(str(tiny_vae), dtype="bfloat16").identity]
    assert first not in others


def test_what_is_no_autoencoder_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match='not a diffusers AutoencoderKL; give its subfolder, such as subfolder="vae"'):
        _ = FrozenVAE(str(tiny_llama)).channels


@pytest.mark.parametrize("name", ["/no/such/folder", "someone/no-such-vae"])
def test_a_missing_vae_is_one_line_with_the_name_and_the_fix(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"^{name}: there is no such folder.*correct the name") as caught:
        FrozenVAE(name).load()
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_missing_and_misfitting_weights_are_refused(tmp_path: Path, tiny_vae: Path) -> None:
    shutil.copy(tiny_vae / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights beside it that load"):
        FrozenVAE(str(tmp_path)).load()
    weights = load_file(tiny_vae / "diffusion_pytorch_model.safetensors")
    weights.pop("decoder.conv_out.bias")
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit its config\.json: .*decoder\.conv_out\.bias"):
        FrozenVAE(str(tmp_path)).load()
