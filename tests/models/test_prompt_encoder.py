"""The text of a prompt is its caption's tokens, whatever it is batched with and however it is padded."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lidit.models.contracts import Features, Text, is_caption, longest_caption
from lidit.models.llm import FrozenLLM
from lidit.models.prompt_encoder import FeatureNorm, PromptEncoder, truncate
from lidit.models.refiners import CollaborativeRefiner, ConcatFusion
from lidit.models.variants.encoder import VariantEncoder

WIDTH = 32
SHORT, LONG = "a red circle", "a red circle to the left of a blue square, above two green stars"
SETTINGS = [
    {},
    {"truncate": "before"},
    {"fusion": "concat"},
    {"full_attention": False},
    {"gating": False},
    {"refiner_depth": 0},
    {"fusion_depth": 2},
    {"whiten": True},
    {"gating": "full"},
    {"positions": True},
    {"pool": "mlp"},
    {"levels": 2, "whiten": True},
    {"levels": 2, "mix": "weights"},
    {"levels": 4, "mix": "attention"},
    {"levels": 2, "mix": "per_block", "refiner_depth": 0, "fusion": "concat"},
]
OURS = set(inspect.signature(PromptEncoder).parameters)


def encoder(widths: tuple[int, ...] = (32, 48), trained: bool = True, **settings: object) -> PromptEncoder:
    """A prompt encoder in float64, by default as after some training: nothing in it is zero."""
    torch.manual_seed(0)
    kind = PromptEncoder if settings.keys() <= OURS and settings.get("gating") != "full" else VariantEncoder
    model = kind(list(widths), WIDTH, heads=4, mlp_ratio=2.0, **settings).double()
    return perturbed(model) if trained else model


def perturbed(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


def features(lengths: list[int], starts: list[int], width: int, side: str = "right", seed: int = 0) -> Features:
    """Random features of prompts; the same whichever side is padded, but for what stands in the padding."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(length, width, generator=generator) for length in lengths]
    tokens = torch.full((len(rows), max(lengths), width), 5.0 if side == "right" else -5.0)
    mask, start = torch.zeros(tokens.shape[:2], dtype=torch.bool), torch.tensor(starts)
    for i, row in enumerate(rows):
        shift = tokens.shape[1] - len(row) if side == "left" else 0
        tokens[i, shift : shift + len(row)], mask[i, shift : shift + len(row)] = row, True
        start[i] += shift
    return tokens, mask, start


def rows(text: Text) -> list[Tensor]:
    """The valid tokens of each sample."""
    return [tokens[mask] for tokens, mask in zip(text.tokens, text.mask, strict=True)]


def row(features: list[Features], i: int) -> list[Features]:
    """One sample of a batch, without the padding that the others need."""
    picked = []
    for tokens, mask, start in features:
        first = int(mask[i].to(torch.uint8).argmax())
        picked.append((tokens[i, mask[i]][None], mask[i, mask[i]][None], start[i : i + 1] - first))
    return picked


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_prompt_alone_and_batched_with_longer_ones_gives_the_same_text(settings: dict, side: str) -> None:
    model, t = encoder(**settings), torch.tensor([0.1, 0.5, 0.9])
    batch = [features([5, 9, 12], [3, 4, 11], 32, side), features([4, 7, 6], [1, 2, 5], 48, side, seed=1)]
    model(batch, t)  # whitening is measured in training
    together = model.eval()(batch, t)
    for i in range(3):
        alone = model(row(batch, i), t[i : i + 1])
        assert alone.mask.all()
        torch.testing.assert_close(rows(together)[i], alone.tokens[0])
        torch.testing.assert_close(together.pooled[i : i + 1], alone.pooled)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_padding_on_the_left_and_on_the_right_gives_the_same_text(settings: dict) -> None:
    model, t = encoder(**settings), torch.tensor([0.1, 0.5])
    left, right = (
        model([features([5, 9], [3, 4], 32, side), features([4, 7], [1, 2], 48, side, seed=1)], t)
        for side in ("left", "right")
    )
    assert torch.equal(left.mask, right.mask)
    torch.testing.assert_close(left.tokens[left.mask], right.tokens[right.mask])
    torch.testing.assert_close(left.pooled, right.pooled)


@pytest.mark.parametrize("where", ["after", "before"])
def test_exactly_the_kept_span_is_left_in_its_order(where: str) -> None:
    model = encoder(trained=False, truncate=where)  # at initialisation the refiners change nothing
    batch = [features([5, 9], [3, 4], 32, "left"), features([4, 7], [1, 2], 48, seed=1)]
    text = model(batch, torch.tensor([0.1, 0.5]))
    for i in range(2):
        spans = [(x[i, m[i]], int(start[i]) - int(m[i].to(torch.uint8).argmax())) for x, m, start in batch]
        kept = [
            project(norm.norm(x[start:].double()))
            for norm, project, (x, start) in zip(model.norms, model.project, spans, strict=True)
        ]
        torch.testing.assert_close(rows(text)[i], torch.cat(kept))


@pytest.mark.parametrize(("where", "reads"), [("after", True), ("before", False)])
@pytest.mark.parametrize("fusion", ["collaborative", "concat"])
def test_kept_tokens_read_the_instruction_only_when_it_is_cut_after_the_refiners(
    where: str, reads: bool, fusion: str
) -> None:
    model, t = encoder(truncate=where, fusion=fusion), torch.tensor([0.3])
    tokens, mask, start = features([8], [5], 32)
    other = tokens.clone()
    other[:, :5] = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(3))
    second = features([6], [2], 48, seed=1)
    before, after = (model([(x, mask, start), second], t) for x in (tokens, other))
    assert torch.equal(before.tokens, after.tokens) is not reads
    assert torch.equal(before.pooled, after.pooled)  # the pooled vector is the caption's
    assert before.tokens.shape[1] == 3 + 4


def test_the_text_changes_with_time_once_the_gates_are_trained() -> None:
    batch = [features([5], [3], 32), features([4], [1], 48)]
    early, late = (encoder()(batch, torch.tensor([t])).tokens for t in (0.1, 0.9))
    assert not torch.allclose(early, late, atol=1e-3)


@pytest.mark.parametrize(
    ("widths", "fusion", "made"),
    [
        ((32,), None, ConcatFusion),
        ((32,), "concat", ConcatFusion),
        ((32, 48), None, CollaborativeRefiner),
        ((32, 48, 24), None, CollaborativeRefiner),
        ((32, 48, 24), "concat", ConcatFusion),
    ],
)
def test_one_two_and_three_llms_of_different_widths_work(widths: tuple, fusion: str | None, made: type) -> None:
    model = encoder(widths, fusion=fusion)
    batch = [features([5 + i, 9 - i], [3, 2 + i], width, seed=i) for i, width in enumerate(widths)]
    text = model(batch, torch.tensor([0.1, 0.5]))
    assert isinstance(model.fusion, made)
    assert text.mask.sum(1).tolist() == [
        sum(2 + i for i in range(len(widths))),
        sum(7 - 2 * i for i in range(len(widths))),
    ]
    assert text.tokens.shape[2] == text.pooled.shape[1] == WIDTH
    assert text.tokens.isfinite().all()


def test_a_collaborative_refiner_for_one_llm_is_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match="at least 2 LLMs, not 1.*concat"):
        encoder((32,), fusion="collaborative")


def test_no_llm_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one LLM; name one under llms"):
        encoder(())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_at_initialisation_gates_and_modulations_are_zero_whatever_the_settings(settings: dict) -> None:
    zero = [p for n, p in encoder(trained=False, **settings).named_parameters() if "gates" in n or "modulation" in n]
    assert all(not p.any() for p in zero)
    assert zero or settings.get("fusion") == "concat" or settings.get("gating") is False


def test_truncating_moves_the_kept_tokens_to_the_front() -> None:
    x = torch.arange(10.0).reshape(2, 5, 1)
    kept = torch.tensor([[False, True, False, True, False], [True, True, False, False, True]])
    tokens, mask = truncate(x, kept)
    assert tokens[mask].flatten().tolist() == [1, 3, 5, 6, 9]
    assert mask.tolist() == [[True, True, False], [True, True, True]]


@pytest.fixture(scope="module", params=["right", "left"])
def llms(request: pytest.FixtureRequest, tiny_llama: Path, tiny_qwen: Path) -> list[FrozenLLM]:
    side = {"dtype": "float32", "padding_side": request.param}
    return [FrozenLLM(str(tiny_llama), **side).load(), FrozenLLM(str(tiny_qwen), **side).load()]


@pytest.mark.parametrize("where", ["after", "before"])
def test_real_prompts_alone_and_batched_give_the_same_text(llms: list[FrozenLLM], where: str) -> None:
    model, t = encoder(truncate=where), torch.full((3,), 0.3)
    prompts = [SHORT, LONG, ""]
    together = rows(model([llm(prompts) for llm in llms], t))
    for prompt, expected in zip(prompts, together, strict=True):
        alone = model([llm([prompt]) for llm in llms], t[:1])
        torch.testing.assert_close(alone.tokens[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("where", ["after", "before"])
def test_an_empty_caption_leaves_one_token_of_each_llm(llms: list[FrozenLLM], where: str) -> None:
    model = encoder(truncate=where)
    text = model([llm(["", LONG]) for llm in llms], torch.tensor([0.1, 0.5]))
    assert text.mask[0].sum() == len(llms)
    assert text.tokens.isfinite().all()
    assert text.pooled.isfinite().all()


@pytest.mark.parametrize("where", ["after", "before", "never"])
def test_a_length_known_beforehand_changes_nothing(llms: list[FrozenLLM], where: str) -> None:
    model, t = encoder(truncate=where), torch.tensor([0.1, 0.5])
    known = [llm([SHORT, LONG]) for llm in llms]
    assert [longest_caption(each) for each in known] == [int(is_caption(*each[1:]).sum(1).max()) for each in known]
    asked = [tuple(each) for each in known]
    assert [longest_caption(each) for each in asked] == [None, None]
    assert all(torch.equal(a, b) for a, b in zip(model(known, t), model(asked, t), strict=True))


def test_as_many_tokens_are_left_as_the_llms_say_they_keep(llms: list[FrozenLLM]) -> None:
    text = encoder()([llm([SHORT, LONG]) for llm in llms], torch.tensor([0.1, 0.5]))
    kept = [sum(sum(keep for _, keep in llm.show(prompt)) for llm in llms) for prompt in (SHORT, LONG)]
    assert text.mask.sum(1).tolist() == kept


def test_whitening_gives_every_direction_unit_variance_over_the_first_batches_and_then_stays() -> None:
    norm, mix = FeatureNorm(8, whiten=True), torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    kept = torch.ones(4, 50, dtype=torch.bool)

    def batch() -> torch.Tensor:
        """Like captions of one length: every batch has a mean of its own."""
        return torch.randn(4, 50, 8) @ mix + 3 + torch.randn(8)

    x = batch()
    torch.testing.assert_close(norm.eval()(x, kept), norm.norm(x))  # nothing measured yet
    norm.train()
    seen = []
    for _ in range(FeatureNorm.BATCHES):
        seen.append(batch())
        norm(seen[-1], kept)
    white = norm(torch.cat(seen), kept.repeat(len(seen), 1)).flatten(0, 1)
    assert white.mean(0).abs().max() < 1e-3
    torch.testing.assert_close(white.T.cov(), torch.eye(8), atol=0.25, rtol=0)  # less where the floor counts
    before = norm.rotate.clone()
    norm(batch() + 5, kept)
    assert torch.equal(norm.rotate, before)
    norm.load_state_dict(FeatureNorm(8, whiten=True).state_dict())  # that has measured nothing
    norm(batch(), kept)
    assert norm.batches == 1
