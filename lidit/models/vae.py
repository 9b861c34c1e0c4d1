"""The frozen autoencoder: images to the latents that the transformer denoises, and back (LI-DiT: 8x down, 16 channels).

Any `AutoencoderKL` of diffusers will do: channels, factor, scale and shift are read from the VAE's own config, never
from a table of known models.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from lidit.models.source import describe, find_file, load_name


class FrozenVAE:
    """A frozen `AutoencoderKL` outside the module tree: no checkpoint, EMA copy or shard holds its weights.

    Args:
        name: the VAE's Hugging Face id, folder, or `bundled:NAME`.
        dtype: precision of the weights and of the computation.
        revision: branch, tag or commit on the Hugging Face hub.
        subfolder: the VAE's folder inside `name`; `vae` in whole pipelines such as Stable Diffusion 3.
    """

    def __init__(
        self,
        name: str,
        dtype: Literal["float32", "bfloat16"] = "float32",
        revision: str | None = None,
        subfolder: str | None = None,
    ) -> None:
        self.name, self.dtype, self.revision, self.subfolder = name, dtype, revision, subfolder
        self._model: AutoencoderKL | None = None

    @cached_property
    def _config_file(self) -> Path:
        wanted = f"{self.subfolder}/config.json" if self.subfolder else "config.json"
        return find_file(self.name, wanted, self.revision)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of the VAE's config.json."""
        config = json.loads(self._config_file.read_text())
        if config.get("_class_name") != "AutoencoderKL":
            fix = (
                'give its subfolder, such as subfolder="vae"' if self.subfolder is None else "choose another subfolder"
            )
            raise ValueError(f"{self.name} holds {config.get('_class_name')!r}, not a diffusers AutoencoderKL; {fix}")
        return config

    @property
    def channels(self) -> int:
        """Channels c of a latent; only the config is read."""
        return self.config["latent_channels"]

    @property
    def factor(self) -> int:
        """Image pixels per latent position along each side; only the config is read."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that the latents depend on; a cache made with another identity is stale."""
        return {
            **describe(self.name, self._config_file),
            "subfolder": self.subfolder,
            "dtype": self.dtype,
        }

    def load(self, device: str | torch.device = "cpu") -> FrozenVAE:
        """Put the VAE on a device; the first call reads its weights, later ones only move them."""
        self._ready().to(device)
        return self

    def _read(self) -> AutoencoderKL:
        _ = self.config  # a wrong name or kind is an error here, not in diffusers
        try:
            model, report = AutoencoderKL.from_pretrained(
                load_name(self.name),
                revision=self.revision,
                subfolder=self.subfolder,
                torch_dtype=getattr(torch, self.dtype),
                output_loading_info=True,
                low_cpu_mem_usage=False,
            )
        except OSError:
            raise FileNotFoundError(
                f"{self.name} has the config.json of a VAE but no weights beside it that load; download all of it again"
            ) from None
        if wrong := {kind: keys for kind, keys in report.items() if keys}:
            raise ValueError(
                f"the weights of {self.name} do not fit its config.json: {wrong}; download all of it again"
            )
        return model

    @torch.no_grad()
    def encode(self, image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Latents of images in [-1, 1], scaled and shifted, in the VAE's dtype: the posterior's mode (deterministic).

        Raises:
            ValueError: height or width is not divisible by the factor.
        """
        height, width = image.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"an image of {width}x{height} pixels does not divide into latents of {self.name}: "
                f"choose a width and a height divisible by {self.factor}"
            )
        model = self._ready()
        # UNSTATED: whether latents are samples of the VAE's posterior or its mode; the mode, which can be cached.
        with torch.autocast(image.device.type, enabled=False):
            latent = model.encode(image.to(model.device, model.dtype)).latent_dist.mode()
        return (latent - self._shift) * self.config["scaling_factor"]

    @torch.no_grad()
    def decode(self, latent: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """Images of latents that are scaled and shifted as `encode` does, in [-1, 1], in the VAE's dtype."""
        model = self._ready()
        latent = latent.to(model.device, model.dtype) / self.config["scaling_factor"] + self._shift
        with torch.autocast(latent.device.type, enabled=False):
            return model.decode(latent).sample.clamp(-1, 1)

    @property
    def _shift(self) -> float:
        return self.config.get("shift_factor") or 0.0  # absent or null in VAEs before Stable Diffusion 3

    def _ready(self) -> Any:  # the AutoencoderKL; type checkers misread its decorated methods
        if self._model is None:
            self._model = self._read().eval().requires_grad_(False)
        return self._model
