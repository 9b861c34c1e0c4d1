"""The count of operations from sizes, against PyTorch's count of what is computed."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lidit.models.flops import backbone_flops, prompt_encoder_flops
from lidit.models.lidit import LIDiT
from lidit.models.prompt_encoder import Features, PromptEncoder, Text

LENGTHS, KEPT, B = (23, 31), (9, 14), 2


def features(widths: list[int]) -> list[Features]:
    """Two samples per LLM, of full length, with an instruction before the caption."""
    return [
        (torch.randn(B, n, e), torch.ones(B, n, dtype=torch.bool), torch.full((B,), n - k))
        for n, k, e in zip(LENGTHS, KEPT, widths, strict=False)
    ]


def measured(run: callable) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("latent", [(8, 8), (8, 12)])
def test_the_backbones_count_is_pytorchs(latent: tuple[int, int]) -> None:
    model = LIDiT(4, depth=2, width=64, heads=4, mlp_ratio=2.5)
    x, text = torch.randn(B, 4, *latent), Text(torch.randn(B, 23, 64), torch.ones(B, 23) > 0, torch.randn(B, 64))
    counted = B * backbone_flops(model, latent[0] * latent[1] // 4, 23)
    assert counted == measured(lambda: model(x, torch.rand(B), text))


@pytest.mark.parametrize("truncate", ["after", "before"])
@pytest.mark.parametrize("gating", [True, False])
@pytest.mark.parametrize(("widths", "fusion"), [([32], None), ([32, 48], "concat"), ([32, 48], "collaborative")])
def test_the_prompt_encoders_count_is_pytorchs(widths: list[int], fusion: str, gating: bool, truncate: str) -> None:
    model = PromptEncoder(widths, 64, heads=4, fusion=fusion, gating=gating, truncate=truncate, mlp_ratio=2.0)
    count = len(widths)
    counted = B * prompt_encoder_flops(model, list(LENGTHS[:count]), list(KEPT[:count]))
    assert counted == measured(lambda: model(features(widths), torch.rand(B)))


@pytest.mark.parametrize(
    "settings",
    [
        {"truncate": "never", "gating": "full", "positions": True, "pool": "mlp"},
        {"levels": 2, "whiten": True},
        {"levels": 2, "mix": "weights"},
        {"levels": 4, "mix": "attention"},
        {"levels": 2, "mix": "per_block", "refiner_depth": 0, "fusion": "concat"},
    ],
    ids=str,
)
def test_the_count_is_pytorchs_with_the_settings_of_presets(settings: dict) -> None:
    model = PromptEncoder([32, 48], 64, heads=4, mlp_ratio=2.0, **settings).eval()
    counted = B * prompt_encoder_flops(model, list(LENGTHS), list(KEPT))
    measured_ = measured(lambda: model(features([32, 48]), torch.rand(B)))
    assert counted == pytest.approx(measured_, rel=0.002)  # sums over levels are left out


def test_a_training_step_takes_three_times_the_forward_pass_within_two_per_cent() -> None:
    backbone, encoder = LIDiT(4, depth=4, width=96, heads=4), PromptEncoder([32, 48], 96, heads=4)
    counted = B * (backbone_flops(backbone, 16, sum(KEPT)) + prompt_encoder_flops(encoder, list(LENGTHS), list(KEPT)))
    x, t = torch.randn(B, 4, 8, 8), torch.rand(B)
    step = measured(lambda: backbone(x, t, encoder(features([32, 48]), t)).sum().backward())
    assert step == pytest.approx(3 * counted, rel=0.02)
