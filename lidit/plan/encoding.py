"""What goes before the forward pass: the VAE encodes a pass's pictures, and the objective adds noise to the latents.

Both are found by running the recipe's own objects on tensors without memory (`operations.py`).
"""

from __future__ import annotations

from copy import copy
from typing import NamedTuple

import torch
from diffusers.models import AutoencoderKL
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lidit.draws import SampleDraws
from lidit.models.contracts import Objective
from lidit.models.vae import FrozenVAE
from lidit.plan.live import Live
from lidit.plan.operations import counted, without_values


class Encoding(NamedTuple):
    """What a VAE takes to encode: bytes of its weights; of a picture, operations and the most bytes at one time."""

    weights: int
    operations: int
    peak: int


def encoding(vae: FrozenVAE, pixels: int) -> Encoding:
    """Of a square picture.

    The peak is of all tensors that are there at once, the picture in float32 among them. Attention is counted as
    kernels compute it that do not hold its matrix; what cuDNN takes for itself is not in it.

    Raises:
        ValueError: the VAE cannot do without values.
    """
    with torch.device("meta"):
        model = nn.Module.to(AutoencoderKL.from_config(vae.config), getattr(torch, vae.dtype))
    unread = copy(vae)
    with without_values(vae.name, "run"), FakeTensorMode(allow_non_fake_inputs=True), Live() as live:
        unread._model = model.eval().requires_grad_(False).to_empty(device="cpu")
        weights = live.now
        live.peak = 0
        unread.encode(torch.zeros(1, 3, pixels, pixels))
        peak = live.peak - weights
        _, operations = counted(lambda: unread.encode(torch.zeros(1, 3, pixels, pixels)))
    return Encoding(sum(p.nbytes for p in model.parameters()), operations, peak)


def noise(objective: Objective, latent: tuple[int, ...]) -> int:
    """Bytes of latent, noise and noisy latent of an image, as they lie in memory while the model predicts.

    Args:
        objective: the recipe's.
        latent: c h w.

    Raises:
        ValueError: the objective cannot do without values.
    """
    held: list[int] = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        held.append(live.now)
        return torch.zeros_like(x)

    with without_values(type(objective).__name__, "run"), FakeTensorMode(allow_non_fake_inputs=True), Live() as live:
        objective.loss(predict, torch.zeros((1, *latent)), SampleDraws([0]))
    return max(held)
