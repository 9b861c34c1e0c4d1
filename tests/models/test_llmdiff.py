"""The block-wise encoding: its identities, on real LLMs of each family it knows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from lidit.draws import SampleDraws
from lidit.models.llm import FrozenLLM
from lidit.models.llmdiff import BlockwiseLLM, LLMDiffEncoder, alone, recorded

PROMPTS = ["a red circle", "two blue squares to the left of a green star"]
BLOCKS, WIDTH = 4, {"tiny_llama": 32, "tiny_qwen": 48, "tiny_mistral": 32}


@pytest.fixture(scope="module")
def tiny_mistral(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_llama)
    folder = tmp_path_factory.mktemp("mistral")
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4, "num_key_value_heads": 1}
    MistralForCausalLM(MistralConfig(vocab_size=len(tokenizer), intermediate_size=64, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=list(WIDTH))
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def exact(folder: Path, **settings: object) -> BlockwiseLLM:
    return BlockwiseLLM(str(folder), dtype="float32", **settings)


@torch.no_grad()
def states(folder: Path, llm: FrozenLLM, prompt: str) -> tuple[Tensor, Tensor]:
    """The embedding and the last block's output, before the final norm."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    seen = []
    model.layers[-1].register_forward_hook(lambda _, arguments, output: seen.append(output))
    first = model(input_ids=torch.tensor([llm.prompts.split(prompt).ids]), output_hidden_states=True).hidden_states[0]
    return first, seen[0]


def test_without_the_empty_context_the_sum_telescopes_to_the_last_block(folder: Path) -> None:
    llm = exact(folder, empty="none")
    tokens, _, _ = llm(PROMPTS[:1])
    first, last = states(folder, llm, PROMPTS[0])
    parts = tokens.chunk(1 + BLOCKS, -1)
    torch.testing.assert_close(parts[0], first)
    torch.testing.assert_close(sum(parts), last, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_cheap_branch_is_the_block_run_with_a_diagonal_mask(folder: Path) -> None:
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    x = torch.randn(2, 7, model.config.hidden_size)
    diagonal = torch.full((7, 7), torch.finfo(torch.float32).min).fill_diagonal_(0)[None, None]
    places = model.rotary_emb(x, torch.arange(7)[None])
    for layer in model.layers:
        masked = layer(x, attention_mask=diagonal, position_embeddings=places)
        added, after = alone(layer, x)
        torch.testing.assert_close(added, masked - x, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(after, masked, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("empty", ["same", "isolated"])
def test_a_first_token_has_no_score_and_later_ones_have(empty: str, folder: Path) -> None:
    tokens, mask, _ = exact(folder, empty=empty)(PROMPTS)
    scores = tokens[..., tokens.shape[2] // (1 + BLOCKS) :]
    assert scores[:, 0].abs().max() < 1e-5
    assert scores[:, 1:][mask[:, 1:]].abs().mean() > 1e-3


@pytest.mark.parametrize("empty", ["same", "isolated"])
def test_in_bfloat16_a_first_token_has_no_score_at_all(empty: str, folder: Path) -> None:
    llm = BlockwiseLLM(str(folder), empty=empty, dtype="bfloat16").load()
    with torch.no_grad():
        for parameter in llm._model.layers.parameters():
            parameter *= 4  # so that roundings are seen
    tokens, mask, _ = llm(PROMPTS)
    scores = tokens[..., tokens.shape[2] // (1 + BLOCKS) :]
    assert not scores[:, 0].any()
    assert scores[:, 1:][mask[:, 1:]].abs().mean() > 1e-3


def test_the_readings_of_the_empty_context_differ_from_the_second_block_on(tiny_llama: Path) -> None:
    same, isolated = (exact(tiny_llama, empty=empty)(PROMPTS[:1])[0] for empty in ("same", "isolated"))
    e = WIDTH["tiny_llama"]
    torch.testing.assert_close(same[..., : 2 * e], isolated[..., : 2 * e])
    assert (same[..., 2 * e :] - isolated[..., 2 * e :]).abs().max() > 1e-3


def test_the_sums_are_the_sums_and_narrower(tiny_qwen: Path) -> None:
    every, sums = exact(tiny_qwen), exact(tiny_qwen, sums=True)
    (a, _, _), (b, _, _) = every(PROMPTS), sums(PROMPTS)
    assert (every.width, sums.width) == (48 * (1 + BLOCKS), 48 * 2)
    first, *parts = a.chunk(1 + BLOCKS, -1)
    torch.testing.assert_close(b, torch.cat([first, sum(parts)], -1))
    assert every.identity != sums.identity


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_prompt_alone_and_batched_has_the_same_features(side: str, tiny_qwen: Path) -> None:
    llm = exact(tiny_qwen, padding_side=side)
    together, mask, _ = llm(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(together[row, mask[row]], llm([prompt])[0][0], atol=1e-5, rtol=1e-5)


def test_hooks_do_not_stay(tiny_llama: Path) -> None:
    model = AutoModel.from_pretrained(tiny_llama)
    with recorded(model.layers):
        pass
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_residual_stream_that_grows_a_thousandfold_stays_finite(dtype: torch.dtype, tiny_llama: Path) -> None:
    llm = BlockwiseLLM(str(tiny_llama), dtype="bfloat16").load()
    with torch.no_grad():
        for layer in llm._model.layers:
            layer.mlp.down_proj.weight *= 1e5
    features = llm(PROMPTS)
    first, *parts = features[0].chunk(1 + BLOCKS, -1)
    assert sum(parts).norm() > 1e3 * first.norm()
    encoder = LLMDiffEncoder([llm.width], 16, levels=1 + BLOCKS)
    with torch.autocast("cpu", dtype):
        text = encoder([features], torch.rand(2))
    assert text.tokens.isfinite().all()
    text.tokens.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)


def test_g_of_one_and_no_noise_gives_the_normalised_sum_and_g_weighs_blocks() -> None:
    encoder = LLMDiffEncoder([15], 8, levels=3).eval()
    x = torch.randn(2, 4, 15)
    torch.testing.assert_close(encoder.encode(x), encoder.norm(sum(x.chunk(3, -1))))
    with torch.no_grad():
        encoder.g[0] = 0
    torch.testing.assert_close(encoder.encode(x), encoder.norm(x[..., :5] + x[..., 10:]))
    zero = LLMDiffEncoder([15], 8, levels=3, start="zero").eval()
    torch.testing.assert_close(zero.encode(x), zero.norm(x[..., 5:10] + x[..., 10:]))


def test_noise_is_of_the_stated_size_and_in_training_alone() -> None:
    encoder = LLMDiffEncoder([3 * 400], 8, levels=3)
    encoder.norm = torch.nn.Identity()
    with torch.no_grad():
        encoder.h.fill_(0.0)
    x = torch.randn(8, 50, 1200)
    noise = encoder.encode(x) - encoder.eval().encode(x)
    assert noise.std().item() == pytest.approx((2 * 2 * torch.log(torch.tensor(2.0)).item()) ** 0.5, rel=0.01)
    assert torch.equal(encoder.encode(x), encoder.encode(x))
    assert LLMDiffEncoder([15], 8, levels=3, noise=False).h is None


def test_the_noise_of_a_sample_follows_from_its_number_alone() -> None:
    encoder, x = LLMDiffEncoder([15], 8, levels=3), torch.randn(4, 5, 15)

    def encoded(first: int, count: int) -> Tensor:
        encoder.draws = SampleDraws([3], first)
        return encoder.encode(x[first : first + count])

    parts = encoded(0, 2), encoded(2, 2)
    assert torch.equal(torch.cat(parts), encoded(0, 4))
    encoder.draws = SampleDraws([3], 4)
    assert not torch.equal(encoder.encode(x), encoded(0, 4))


def test_the_last_hidden_state_alone_is_one_level(tiny_llama: Path) -> None:
    plain = FrozenLLM(str(tiny_llama), layer=-1, dtype="float32")
    text = LLMDiffEncoder([plain.width], 16, levels=1)([plain(PROMPTS)], torch.rand(2))
    assert text.tokens.shape[2] == 16
    assert text.mask.sum(1).tolist() == [len([k for _, k in plain.show(p) if k]) for p in PROMPTS]


def test_without_norm_and_projection_the_text_is_what_the_frozen_model_gave(tiny_llama: Path) -> None:
    plain = FrozenLLM(str(tiny_llama), layer=-1, dtype="float32", instruction="", template="plain")
    features = plain(["a red circle"])
    text = LLMDiffEncoder([plain.width], 16, levels=1, project=False, normalise=False)([features], torch.rand(1))
    assert torch.equal(text.tokens, features[0][:, int(features[2]) :])


def test_gradient_reaches_every_parameter(tiny_llama: Path) -> None:
    llm = exact(tiny_llama)
    encoder = LLMDiffEncoder([llm.width], 16, levels=1 + BLOCKS)
    text = encoder([llm(PROMPTS)], torch.rand(2))
    (text.tokens.square().mean() + text.pooled.square().mean()).backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_mistakes_are_one_clear_message(tmp_path: Path, tiny_llama: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_embd=16, n_layer=2, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a gpt2; block-wise encoding knows the blocks of llama, mistral"):
        _ = BlockwiseLLM(str(tmp_path)).width
    with pytest.raises(ValueError, match="reads one LLM, not 2"):
        LLMDiffEncoder([32, 32], 16, levels=2)
    with pytest.raises(ValueError, match=r"160 feature channels do not divide into 3 levels; set levels to 1 \+"):
        LLMDiffEncoder([160], 16, levels=3)
