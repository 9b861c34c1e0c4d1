"""Refiners start as the identity, see both ways, read each other and never read padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lidit.models.refiners import CollaborativeRefiner, ConcatFusion, LinguisticTokenRefiner

WIDTH, HEADS = 32, 4


def perturbed(module: nn.Module) -> nn.Module:
    """The module as after some training: nothing in it is zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


def tokens(length: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def mask(*rows: str) -> Tensor:
    """From a picture: 'xx.' is two valid tokens, then padding."""
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def condition(batch: int = 2, seed: int = 9) -> Tensor:
    return torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("full_attention", [True, False])
def test_a_gated_refiner_is_the_identity_at_initialisation(full_attention: bool) -> None:
    refiner = LinguisticTokenRefiner(WIDTH, HEADS, full_attention=full_attention)
    x = tokens(6)
    assert torch.equal(refiner(x, mask("xxxxxx", "xxxx.."), condition()), x)


def test_a_refiner_without_gates_is_not_the_identity_and_does_not_read_the_condition() -> None:
    refiner = LinguisticTokenRefiner(WIDTH, HEADS, gating=False)
    x, valid = tokens(6), mask("xxxxxx", "xxxx..")
    refined = refiner(x, valid, condition())
    assert (refined - x).abs().max() > 0.1
    assert torch.equal(refined, refiner(x, valid, condition(seed=10)))


def test_a_trained_gate_reads_the_condition() -> None:
    refiner, x, valid = perturbed(LinguisticTokenRefiner(WIDTH, HEADS)), tokens(6), mask("xxxxxx", "xxxx..")
    assert not torch.allclose(refiner(x, valid, condition()), refiner(x, valid, condition(seed=10)), atol=1e-2)


def test_depth_zero_leaves_the_tokens_as_they_are() -> None:
    x = tokens(6)
    assert torch.equal(
        perturbed(LinguisticTokenRefiner(WIDTH, HEADS, depth=0))(x, mask("xxxxxx", "xxxx.."), condition()), x
    )


@pytest.mark.parametrize("gating", [True, False])
@pytest.mark.parametrize("full_attention", [True, False])
def test_the_first_token_depends_on_the_last_only_with_full_attention(full_attention: bool, gating: bool) -> None:
    refiner = perturbed(LinguisticTokenRefiner(WIDTH, HEADS, full_attention=full_attention, gating=gating))
    x, valid = tokens(6), mask("xxxxxx", "xxxxxx")
    other = x.clone()
    other[:, -1, 0] += 3  # a constant alone would be taken out by the norm
    before, after = refiner(x, valid, condition()), refiner(other, valid, condition())
    assert torch.equal(before[:, :-1], after[:, :-1]) is not full_attention
    assert (before[:, 0] - after[:, 0]).abs().max().gt(1e-3).item() is full_attention
    assert not torch.allclose(before[:, -1], after[:, -1], atol=1e-2)


@pytest.mark.parametrize("full_attention", [True, False])
@pytest.mark.parametrize("picture", [("xxxxx.", "xxx..."), (".xxxxx", "...xxx"), ("xx.xxx", "x.x.x.")])
def test_masked_tokens_change_nothing(picture: tuple[str, str], full_attention: bool) -> None:
    refiner = perturbed(LinguisticTokenRefiner(WIDTH, HEADS, full_attention=full_attention))
    x, valid = tokens(6), mask(*picture)
    other = torch.where(valid[..., None], x, 100 * tokens(6, seed=1))
    before, after = refiner(x, valid, condition()), refiner(other, valid, condition())
    assert before.isfinite().all()
    assert after.isfinite().all()
    assert torch.equal(before[valid], after[valid])


@pytest.mark.parametrize("full_attention", [True, False])
def test_padding_on_either_side_gives_the_tokens_of_no_padding(full_attention: bool) -> None:
    refiner = perturbed(LinguisticTokenRefiner(WIDTH, HEADS, full_attention=full_attention))
    x, padding = tokens(4, batch=1), tokens(3, batch=1, seed=1)
    alone = refiner(x, mask("xxxx"), condition(1))
    right = refiner(torch.cat([x, padding], 1), mask("xxxx..."), condition(1))[:, :4]
    left = refiner(torch.cat([padding, x], 1), mask("...xxxx"), condition(1))[:, 3:]
    torch.testing.assert_close(right, alone)
    torch.testing.assert_close(left, alone)


def branches(count: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Tokens, masks and conditions of LLMs whose prompts have different lengths."""
    pictures = [("xxxx.", "xxxxx"), (".xx", "xxx"), ("xxxxxxx", "...xxxx")][:count]
    xs = [tokens(len(picture[0]), seed=i) for i, picture in enumerate(pictures)]
    return xs, [mask(*picture) for picture in pictures], [condition(seed=20 + i) for i in range(count)]


@pytest.mark.parametrize("count", [2, 3])
def test_a_collaborative_refiner_is_the_identity_at_initialisation(count: int) -> None:
    xs, masks, conditions = branches(count)
    refined = CollaborativeRefiner(count, WIDTH, HEADS, depth=2)(xs, masks, conditions)
    assert all(torch.equal(after, before) for after, before in zip(refined, xs, strict=True))


@pytest.mark.parametrize("count", [2, 3])
def test_every_branch_depends_on_every_other(count: int) -> None:
    xs, masks, conditions = branches(count)
    refiner = perturbed(CollaborativeRefiner(count, WIDTH, HEADS))
    before = refiner(xs, masks, conditions)
    for j in range(count):
        changed = [x + 1 if i == j else x for i, x in enumerate(xs)]
        changed[j][..., 0] += 3  # a constant alone would be taken out by the norm
        after = refiner(changed, masks, conditions)
        for i in range(count):
            assert not torch.allclose(after[i][masks[i]], before[i][masks[i]], atol=1e-3), f"branch {i} misses {j}"


@pytest.mark.parametrize("changed", [0, 1])
def test_a_branch_is_modulated_by_its_own_condition(changed: int) -> None:
    xs, masks, conditions = branches(2)
    refiner = perturbed(CollaborativeRefiner(2, WIDTH, HEADS))
    before = refiner(xs, masks, conditions)
    conditions[changed] = conditions[changed].flip(1)
    after = refiner(xs, masks, conditions)
    assert not torch.allclose(after[changed], before[changed], atol=1e-3)
    assert torch.equal(after[1 - changed], before[1 - changed])


def test_a_branch_does_not_read_itself_in_one_block() -> None:
    xs, masks, conditions = branches(2)
    refiner = perturbed(CollaborativeRefiner(2, WIDTH, HEADS))
    other = [xs[0].clone(), xs[1]]
    other[0][:, -1, 0] += 3  # the last token of branch 0 cannot reach its first, but reaches branch 1
    before, after = refiner(xs, masks, conditions), refiner(other, masks, conditions)
    assert torch.equal(before[0][:, 0], after[0][:, 0])
    assert not torch.allclose(before[1][1], after[1][1], atol=1e-3)


def test_collaboration_never_reads_padding() -> None:
    xs, masks, conditions = branches(3)
    refiner = perturbed(CollaborativeRefiner(3, WIDTH, HEADS, depth=2))
    others = [torch.where(m[..., None], x, x + 100) for x, m in zip(xs, masks, strict=True)]
    before, after = refiner(xs, masks, conditions), refiner(others, masks, conditions)
    assert all(torch.equal(b[m], a[m]) for b, a, m in zip(before, after, masks, strict=True))


@pytest.mark.parametrize("count", [0, 1])
def test_collaboration_of_fewer_than_two_llms_is_refused_with_the_fix(count: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 LLMs, not {count}.*concat"):
        CollaborativeRefiner(count, WIDTH, HEADS)


def test_concatenation_exchanges_nothing() -> None:
    xs, masks, conditions = branches(3)
    assert all(a is b for a, b in zip(ConcatFusion()(xs, masks, conditions), xs, strict=True))


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="5 heads do not divide width 32"):
        LinguisticTokenRefiner(WIDTH, 5)
