"""What the VAE and the noise take is what they take when they run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lidit.draws import SampleDraws
from lidit.models.contracts import Objective
from lidit.models.source import sizes_alone
from lidit.models.vae import FrozenVAE
from lidit.objectives import DDPM, RectifiedFlow
from lidit.plan.encoding import encoding, noise
from lidit.plan.live import Live


def test_the_vaes_operations_and_peak_are_those_of_what_is_computed() -> None:
    vae, image = FrozenVAE("bundled:vae"), torch.zeros(1, 3, 64, 64)
    found = encoding(vae, 64)
    model = vae.load()._model
    assert found.weights == sum(p.nbytes for p in model.parameters())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        vae.encode(image)
    assert found.operations == counter.get_total_flops() > 0
    with Live() as live:
        vae.encode(torch.zeros(1, 3, 64, 64))
    assert found.peak == pytest.approx(live.peak, rel=0.02)


@pytest.mark.parametrize(("pixels", "teraflop"), [(256, 0.273), (512, 1.118), (1024, 4.883)])
def test_the_vae_of_stable_diffusion_3_is_counted_without_its_weights(pixels: int, teraflop: float) -> None:
    with sizes_alone():
        vae = FrozenVAE("stabilityai/stable-diffusion-3-medium-diffusers", "bfloat16", subfolder="vae")
        found = encoding(vae, pixels)
    attention = 4 * (pixels // 8) ** 4 * 512  # two products of each position with each; the rest is linear in pixels
    assert found.operations / 1e12 == pytest.approx(teraflop, abs=5e-4)
    assert (found.operations - attention) / 1e12 == pytest.approx(0.2708 * (pixels / 256) ** 2, rel=2e-3)
    assert found.peak > 4 * 128 * pixels**2 * 2  # of the first level's 128 channels


@pytest.mark.parametrize("objective", [RectifiedFlow(), DDPM()])
@pytest.mark.parametrize("images", [1, 3])
def test_what_an_objective_holds_is_what_lies_in_memory(objective: Objective, images: int) -> None:
    found, held = noise(objective, (4, 16, 16)), []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        held.append(live.now)
        return torch.zeros_like(x)

    with Live() as live:
        objective.loss(predict, torch.zeros(images, 4, 16, 16), SampleDraws([0]))
    assert found * images == pytest.approx(held[0], rel=0.02)


def test_what_is_freed_is_no_longer_there() -> None:
    with Live() as live:
        a = torch.zeros(1000)
        a.view(10, 100)
        assert live.now == 4000
        b = a + 1
        del a
        assert (live.now, live.peak) == (4000, 8000)
        del b
    assert live.now == 0
