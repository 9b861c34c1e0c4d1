"""The count of operations of what runs without memory, against PyTorch's count of what is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lidit.models.adapter import AdaptedUNet
from lidit.models.clip import FrozenCLIPText
from lidit.models.contracts import Features, Text
from lidit.models.layers import Attention
from lidit.models.lidit import LIDiT
from lidit.models.llm import FrozenLLM
from lidit.models.llmdiff import BlockwiseLLM, LLMDiffEncoder
from lidit.models.prompt_encoder import PromptEncoder
from lidit.models.t5 import FrozenT5
from lidit.models.unet import UNet
from lidit.models.variants.backbone import VariantLIDiT
from lidit.models.variants.encoder import VariantEncoder
from lidit.plan.operations import INSTRUCTION, TEMPLATE, DryRun, FeatureSizes, Reading, Sizes, counted

LENGTHS, CAPTIONS, B, WIDTH = (23, 31), (9, 14), 2, 64
Parts = tuple[nn.Module, nn.Module]


def of(widths: list[int], latent: tuple[int, int, int, int] = (B, 4, 8, 8)) -> Sizes:
    sizes = [FeatureSizes(n, k, e) for n, k, e in zip(LENGTHS, CAPTIONS, widths, strict=False)]
    return Sizes(latent, tuple(sizes))


def features(sizes: Sizes) -> list[Features]:
    """Samples of full length, with an instruction before the caption."""
    b = sizes.latent[0]
    return [
        (
            torch.randn(b, each.tokens, each.width),
            torch.ones(b, each.tokens, dtype=torch.bool),
            torch.full((b,), each.tokens - each.caption),
        )
        for each in sizes.features
    ]


def measured(run: Callable) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def check(build: Callable[[], Parts], sizes: Sizes) -> None:
    """The operations of both parts are those of the real ones."""
    backbone, encoder = build()
    encoder.eval()
    t = torch.rand(sizes.latent[0])
    text = encoder(features(sizes), t)
    found = DryRun(build).operations(sizes)
    assert found.encoder == measured(lambda: encoder(features(sizes), t))
    assert found.backbone == measured(lambda: backbone(torch.randn(sizes.latent), t, text)) > 0


def lidit(**settings: object) -> LIDiT:
    return VariantLIDiT(4, depth=2, width=WIDTH, heads=4, mlp_ratio=2.5, **settings)


@pytest.mark.parametrize("latent", [(1, 4, 8, 8), (2, 4, 8, 12)])
def test_the_backbones_count_is_that_of_what_is_computed(latent: tuple[int, int, int, int]) -> None:
    check(lambda: (LIDiT(4, depth=2, width=WIDTH, heads=4), PromptEncoder([32], WIDTH, heads=4)), of([32], latent))


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("gating", [True, False])
@pytest.mark.parametrize(("widths", "fusion"), [([32], None), ([32, 48], "concat"), ([32, 48], "collaborative")])
def test_the_prompt_encoders_count_is_that_of_what_is_computed(
    widths: list[int], fusion: str, gating: bool, full: bool
) -> None:
    settings = {"fusion": fusion, "gating": gating, "full_attention": full, "mlp_ratio": 2.0}
    check(lambda: (lidit(), PromptEncoder(widths, WIDTH, heads=4, **settings)), of(widths))


@pytest.mark.parametrize(
    "settings",
    [
        {"truncate": "before"},
        {"truncate": "never", "gating": "full", "positions": True, "pool": "mlp"},
        {"levels": 2, "whiten": True},
        {"levels": 2, "mix": "weights"},
        {"levels": 4, "mix": "attention"},
        {"levels": 2, "mix": "per_block", "refiner_depth": 0, "fusion": "concat"},
    ],
    ids=str,
)
def test_the_count_is_that_of_what_is_computed_with_the_settings_of_presets(settings: dict) -> None:
    levels = {"levels": settings["levels"]} if settings.get("mix") == "per_block" else {}
    check(lambda: (lidit(**levels), VariantEncoder([32, 48], WIDTH, heads=4, **settings)), of([32, 48]))


def unet() -> UNet:
    settings = {
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet(4, settings)


def test_a_unet_is_counted() -> None:
    check(lambda: (unet(), LLMDiffEncoder([2 * WIDTH], WIDTH, levels=2)), of([2 * WIDTH]))


def test_a_frozen_unet_with_an_adapter_is_counted() -> None:
    def build() -> Parts:
        return AdaptedUNet(16, "bundled:unet", 32), LLMDiffEncoder([96], 64, levels=3, project=False)

    check(build, of([96], (B, 16, 8, 8)))


class Pooled(nn.Module):
    """A prompt encoder of somebody else's: two vectors of each caption, of whatever length the longest is."""

    timeless, units = True, ()

    def __init__(self, width: int = 32):
        super().__init__()
        self.project = nn.Linear(width, 16)

    def forward(self, given: list[Features], t: Tensor) -> Text:
        ((x, mask, start),) = given
        longest = int((mask.sum(1) - start).max())
        tokens = self.project(x[:, -longest:])
        return Text(tokens, mask[:, -longest:], tokens.mean(1))


class Conv(nn.Module):
    """A backbone of somebody else's, in one piece."""

    width, patch = 16, 1

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.read = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(16, 4)
        self.blocks = nn.ModuleList()

    def forward(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        return self.conv(x) + self.read(text.tokens).mean(1)[..., None, None]


def test_parts_that_lidit_does_not_know_are_counted() -> None:
    check(lambda: (Conv(), Pooled()), of([32]))
    found = DryRun(lambda: (Conv(), Pooled())).operations(of([32]))
    assert found == (B * 2 * (64 * 9 * 4 * 4 + CAPTIONS[0] * 16 * 4), B * 2 * CAPTIONS[0] * 32 * 16)


class Deciding(Pooled):
    """Cuts by what the features are."""

    def forward(self, given: list[Features], t: Tensor) -> Text:
        ((x, mask, start),) = given
        return super().forward([(x[:, : int((x > 0).sum())], mask, start)], t)


class DecidingConv(Conv):
    def forward(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        return x if x.mean() > 0 else super().forward(x, t, text)


@pytest.mark.parametrize(
    ("build", "name"),
    [(lambda: (Conv(), Deciding()), "Deciding"), (lambda: (DecidingConv(), Pooled()), "DecidingConv")],
)
def test_a_part_that_decides_by_values_is_named_in_one_line(build: Callable[[], Parts], name: str) -> None:
    with pytest.raises(ValueError, match=rf"\.{name} cannot be run without values, so .* counted: .+") as error:
        DryRun(build).operations(of([32]))
    assert "\n" not in str(error.value)


def test_a_part_that_reads_values_when_it_is_built_is_refused() -> None:
    def build() -> Parts:
        return Conv(), Pooled(int(torch.linspace(0, 32, 2)[1]))

    with pytest.raises(ValueError, match="the model cannot be built without values"):
        DryRun(build)


def test_attention_is_among_what_is_counted() -> None:
    attention, queries, keys = Attention(WIDTH, 4), 10, 6
    _, found = counted(lambda: attention(torch.randn(1, queries, WIDTH), torch.randn(1, keys, WIDTH)))
    assert found == 2 * (2 * queries + 2 * keys) * WIDTH**2 + 4 * queries * keys * WIDTH


def test_equal_sizes_are_counted_once_and_chance_is_left_alone() -> None:
    before = torch.get_rng_state()
    dry_run = DryRun(lambda: (lidit(), PromptEncoder([32], WIDTH, heads=4)))
    runs = []
    dry_run.backbone.register_forward_pre_hook(lambda *_: runs.append(1))
    assert dry_run.operations(of([32])) == dry_run.operations(of([32]))
    assert len(runs) == 1
    assert dry_run.operations(of([32], (1, 4, 8, 8))).backbone == dry_run.operations(of([32])).backbone / B
    assert len(runs) == 2
    assert torch.equal(before, torch.get_rng_state())


def test_a_training_step_takes_three_times_the_forward_pass_within_two_per_cent() -> None:
    def build() -> Parts:
        return LIDiT(4, depth=4, width=96, heads=4), PromptEncoder([32, 48], 96, heads=4)

    (backbone, encoder), sizes = build(), of([32, 48])
    x, t = torch.randn(sizes.latent), torch.rand(B)
    step = measured(lambda: backbone(x, t, encoder(features(sizes), t)).sum().backward())
    assert step == pytest.approx(3 * sum(DryRun(build).operations(sizes)), rel=0.02)


@pytest.mark.parametrize("n", [20, 100])
@pytest.mark.parametrize(
    ("llm", "before"),
    [
        (FrozenLLM("bundled:llm_llama"), INSTRUCTION),
        (FrozenLLM("bundled:llm_qwen", layer=-1, dtype="float32", instruction=""), TEMPLATE),
        (BlockwiseLLM("bundled:llava_llama"), INSTRUCTION),
        (FrozenT5("bundled:t5"), 0),
    ],
    ids=lambda given: getattr(given, "name", None),
)
def test_an_llms_count_is_that_of_what_is_computed(llm: FrozenLLM, before: int, n: int) -> None:
    reading = Reading(llm, n)
    length = before + n
    assert (reading.features.tokens, reading.features.caption) == (length, n)
    ids, mask = torch.zeros(1, length, dtype=torch.long), torch.ones(1, length, dtype=torch.bool)
    states = []
    assert reading.operations().alone == measured(lambda: states.append(llm._states(llm.read(), ids, mask, 0))) > 0
    assert states[0].shape[2] == reading.features.width


@pytest.mark.parametrize(
    ("llm", "shares"), [(FrozenLLM("bundled:llm_llama"), True), (BlockwiseLLM("bundled:llava_llama"), False)]
)
def test_what_all_captions_begin_with_is_counted_once(llm: FrozenLLM, shares: bool) -> None:
    read, rows, n = Reading(llm, 20).operations(), 5, 20
    ids = torch.cat([torch.zeros(rows, INSTRUCTION, dtype=torch.long), torch.ones(rows, n, dtype=torch.long)], 1)
    mask, model = torch.ones_like(ids, dtype=torch.bool), llm.read()
    assert read.before + rows * read.each == measured(lambda: llm._states(model, ids, mask, INSTRUCTION))
    assert (read.before > 0) is shares
    assert (read.each < 0.5 * read.alone) is shares


def test_a_text_tower_of_one_length_is_read_at_that_length() -> None:
    llm = FrozenCLIPText(str(Path(__file__).parents[2] / "lidit/assets/unet/text_encoder"), max_tokens=62)
    assert Reading(llm, 62).features == FeatureSizes(64, 64, 64)
