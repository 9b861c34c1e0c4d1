"""A frozen LLM gives the hidden states the whole model would give, and builds no more of it than that needs."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel, T5Config
from transformers.utils import logging

from lidit.models.llm import FrozenLLM

PROMPTS = [
    "a red circle",
    "",
    "a red circle to the left of a blue square, and nothing else at all in the picture",
    "🙂",
]
MODELS = ["tiny_llama", "tiny_qwen", "sliding_qwen", "gpt2", "llava", "llava_next", "llava_new_names"]


@pytest.fixture(params=MODELS)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def exact(folder: Path, **settings: object) -> FrozenLLM:
    return FrozenLLM(str(folder), **{"dtype": "float32"} | settings)


def whole_model(folder: Path) -> PreTrainedModel:
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    auto = AutoModelForImageTextToText if kind.startswith("llava") else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def full_forward(folder: Path, llm: FrozenLLM, prompt: str) -> tuple[Tensor, ...]:
    """All hidden states (1 l e) of one prompt by the whole model, as transformers returns them."""
    ids = torch.tensor([llm.prompts.split(prompt).ids])
    return whole_model(folder)(input_ids=ids, output_hidden_states=True).hidden_states


def rows(tokens: Tensor, mask: Tensor) -> list[Tensor]:
    """Each prompt's features (l e), without the padding."""
    return [row[valid] for row, valid in zip(tokens, mask, strict=True)]


@pytest.mark.parametrize("layer", [-5, -4, -3, -2, -1, 0, 3, 4])
def test_features_are_the_hidden_state_of_the_full_forward(folder: Path, layer: int) -> None:
    llm = exact(folder, layer=layer)
    tokens, mask, _ = llm([PROMPTS[2]])
    assert mask.all()
    torch.testing.assert_close(tokens, full_forward(folder, llm, PROMPTS[2])[layer], atol=1e-5, rtol=1e-5)


def test_only_the_needed_blocks_are_built(folder: Path) -> None:
    count = {layer: parameters(exact(folder, layer=layer).load()._model) for layer in (0, 1, 2, 3, 4)}
    block = count[2] - count[1]
    assert block > 0
    assert count[1] - count[0] == count[3] - count[2] == block
    norm = {"gpt2": 2}.get(json.loads((folder / "config.json").read_text())["model_type"], 1) * exact(folder).width
    assert count[4] - count[3] == block + norm  # the final norm belongs to the last hidden state alone
    embeddings = exact(folder).load()._model.get_input_embeddings().weight.numel()
    positions = 512 * 32 if "gpt2" in str(folder) else 0
    assert count[0] == embeddings + positions


def test_what_is_built_holds_no_head_and_no_vision_tower(llava: Path) -> None:
    model = exact(llava).load()._model
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"embed_tokens", "layers"}
    assert isinstance(model.norm, nn.Identity)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_prompt_alone_and_among_longer_ones_gives_the_same_features(folder: Path, side: str) -> None:
    llm = exact(folder, padding_side=side)
    batch = rows(*llm(PROMPTS)[:2])
    for prompt, row in zip(PROMPTS, batch, strict=True):
        torch.testing.assert_close(llm([prompt])[0][0], row, atol=1e-5, rtol=1e-5)


def test_the_side_of_the_padding_does_not_matter(folder: Path) -> None:
    right = exact(folder)(PROMPTS)
    left = exact(folder, padding_side="left")(PROMPTS)
    for a, b in zip(rows(*right[:2]), rows(*left[:2]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert right[1][:, 0].all()
    assert left[1][:, -1].all()
    padding = (~left[1]).sum(1)
    assert torch.equal(right[2] + padding, left[2])


def test_in_bfloat16_a_prompt_among_longer_ones_differs_by_rounding_only(tiny_llama: Path) -> None:
    llm = FrozenLLM(str(tiny_llama))
    tokens, mask, _ = llm(PROMPTS)
    assert tokens.dtype == torch.bfloat16
    for prompt, row in zip(PROMPTS, rows(tokens, mask), strict=True):
        torch.testing.assert_close(llm([prompt])[0][0], row, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_zero_and_the_kept_span_starts_at_the_caption(tiny_qwen: Path, side: str) -> None:
    llm = exact(tiny_qwen, padding_side=side)
    tokens, mask, start = llm(PROMPTS)
    assert tokens.shape == (*mask.shape, llm.width) == (4, mask.shape[1], 48)
    assert not tokens[~mask].any()
    kept = mask & (torch.arange(mask.shape[1]) >= start[:, None])
    assert kept.sum(1).tolist() == [sum(keep for _, keep in llm.show(prompt)) for prompt in PROMPTS]
    assert kept[1].sum() == 1


def test_long_captions_are_cut_counted_and_said_once(tiny_llama: Path) -> None:
    llm = exact(tiny_llama, max_tokens=4)
    with pytest.warns(UserWarning, match="tokens longer than max_tokens=4 and is cut there") as said:
        _, mask, start = llm([PROMPTS[2], "x", PROMPTS[2]])
    assert len(said) == 1
    assert llm.cut == 2
    assert (mask.sum(1) - start).tolist()[::2] == [5, 5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm([PROMPTS[2]])
    assert llm.cut == 3


def test_features_do_not_change_under_autocast(tiny_llama: Path) -> None:
    llm = exact(tiny_llama)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = llm(PROMPTS)[0]
    assert torch.equal(inside, llm(PROMPTS)[0])


def test_features_take_no_gradient_but_may_feed_what_is_trained(tiny_llama: Path) -> None:
    llm = exact(tiny_llama)
    layer = nn.Linear(llm.width, 1)
    layer(llm(PROMPTS)[0]).sum().backward()
    assert layer.weight.grad is not None
    assert not any(p.requires_grad for p in llm._model.parameters())
    assert not llm._model.training


def test_loading_twice_reads_once(tiny_llama: Path) -> None:
    llm = exact(tiny_llama)
    assert llm.load() is llm
    model = llm._model
    assert llm.load("cpu")._model is model


def test_loading_leaves_what_transformers_prints_as_it_was(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    exact(tiny_llama).load()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capsys.readouterr() == ("", "")


def test_the_width_needs_the_config_alone(tmp_path: Path, llava: Path) -> None:
    shutil.copy(llava / "config.json", tmp_path)
    assert FrozenLLM(str(tmp_path)).width == 32


def test_the_identity_changes_with_all_that_features_depend_on(tmp_path: Path, tiny_llama: Path) -> None:
    moved = shutil.copytree(tiny_llama, tmp_path / tiny_llama.name)
    first = exact(tiny_llama).identity
    assert first == exact(moved).identity == exact(tiny_llama, padding_side="left").identity
    assert json.loads(json.dumps(first)) == first
    settings = [
        {"layer": -2},
        {"instruction": "Draw:"},
        {"system": "You paint."},
        {"max_tokens": 9},
        {"dtype": "bfloat16"},
        {"template": "plain"},
    ]
    others = [exact(tiny_llama, **setting).identity for setting in settings]
    weights = load_file(moved / "model.safetensors")
    save_file(weights | {"model.norm.weight": torch.zeros(32)}, moved / "model.safetensors", {"format": "pt"})
    others.append(exact(moved).identity)
    assert len({json.dumps(one) for one in [first, *others]}) == 1 + len(others)


def test_no_prompt_at_all_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match=r"encodes a list of at least one prompt, got \[\]"):
        FrozenLLM(str(tiny_llama))([])


@pytest.mark.parametrize("layer", [-6, 5])
def test_a_layer_the_model_does_not_have_is_refused(tiny_llama: Path, layer: int) -> None:
    with pytest.raises(ValueError, match=rf"layer {layer}: .* has hidden states -5 to 4"):
        FrozenLLM(str(tiny_llama), layer=layer).load()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "there is no such folder, and it is no Hugging Face id"),
        ("someone/no-such-model", "the Hugging Face hub did not give config.json.*fetch it with `hf download someone/"),
    ],
)
@pytest.mark.parametrize(
    "use", [FrozenLLM.load, lambda llm: llm.width, lambda llm: llm.show("x"), lambda llm: llm.identity]
)
def test_a_missing_model_is_one_line_with_the_name_and_the_fix(
    name: str, message: str, use: Callable[[FrozenLLM], object]
) -> None:
    with pytest.raises(FileNotFoundError, match=f"^{name}: .*{message}") as caught:
        use(FrozenLLM(name))
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_bundled_name_that_is_none_lists_those_that_are() -> None:
    with pytest.raises(ValueError, match="bundled:nothing is not bundled with lidit; bundled: "):
        FrozenLLM("bundled:nothing").load()


def test_a_folder_without_config_or_weights_says_which_file_is_missing(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is a folder without config.json"):
        FrozenLLM(str(tmp_path)).load()
    shutil.copy(tiny_llama / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no weights that can be read .*model\.safetensors") as caught:
        FrozenLLM(str(tmp_path)).load()
    assert "\n" not in str(caught.value)


def test_weights_that_lack_a_needed_block_are_refused(tmp_path: Path, tiny_llama: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "llm")
    weights = load_file(folder / "model.safetensors")
    without = {
        block: {key: value for key, value in weights.items() if f"layers.{block}." not in key} for block in (0, 3)
    }
    save_file(without[0], folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit its config\.json: .*missing_keys.*layers\.0\."):
        FrozenLLM(str(folder)).load()
    save_file(without[3], folder / "model.safetensors", {"format": "pt"})
    FrozenLLM(str(folder)).load()  # the third-to-last of four blocks needs no fourth


def test_what_is_no_decoder_only_llm_is_refused(tmp_path: Path, tiny_vae: Path) -> None:
    T5Config(d_model=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is an encoder-decoder \(t5\); name a decoder-only LLM"):
        _ = FrozenLLM(str(tmp_path)).width
    with pytest.raises(ValueError, match="transformers does not know model type None"):
        _ = FrozenLLM(str(tiny_vae)).width


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
