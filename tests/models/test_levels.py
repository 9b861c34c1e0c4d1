"""Several hidden states of an LLM: which they are, how they become one text, and what the presets make of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from lidit.models.presets import PRESETS
from torch.nn import functional as F
from transformers import AutoModel

from lidit.cli import main
from lidit.models.llm import FrozenLLM
from lidit.models.prompt_encoder import PromptEncoder
from lidit.models.refiners import CollaborativeRefiner
from lidit.plan import read

PROMPTS = ["a red circle", "two blue squares to the left of a green star"]
PAGE = Path(__file__).parents[2] / "docs/prompt_encoders.md"


@torch.no_grad()
def hidden_states(folder: Path, llm: FrozenLLM, prompt: str) -> tuple[torch.Tensor, ...]:
    ids = torch.tensor([llm.prompts.split(prompt).ids])
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model(input_ids=ids, output_hidden_states=True).hidden_states


@pytest.mark.parametrize(("layer", "levels", "taps"), [(-1, 4, [1, 2, 3, 4]), (-1, 2, [2, 4]), (-3, 2, [1, 2])])
@pytest.mark.parametrize("side", ["right", "left"])
def test_levels_are_hidden_states_beside_one_another(
    layer: int, levels: int, taps: list[int], side: str, tiny_llama: Path
) -> None:
    llm = FrozenLLM(str(tiny_llama), layer=layer, levels=levels, dtype="float32", padding_side=side)
    assert llm.taps == taps
    tokens, mask, _ = llm(PROMPTS)  # with the shared instruction run once, where the padding is on the right
    assert tokens.shape[2] == llm.width == levels * 32
    for row, prompt in enumerate(PROMPTS):
        states = hidden_states(tiny_llama, llm, prompt)
        expected = torch.cat([states[tap] for tap in taps], -1)[0]
        torch.testing.assert_close(tokens[row, mask[row]], expected, atol=1e-5, rtol=1e-5)


def test_the_mean_is_of_all_hidden_states_each_normalised(tiny_qwen: Path) -> None:
    llm = FrozenLLM(str(tiny_qwen), layer=-1, levels="mean", dtype="float32")
    tokens, _, _ = llm(PROMPTS[:1])
    states = hidden_states(tiny_qwen, llm, PROMPTS[0])[1:]
    assert tokens.shape[2] == llm.width == 48
    expected = torch.stack([F.layer_norm(state, (48,)) for state in states]).mean(0)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


def test_a_cache_of_one_level_is_stale_for_several_and_valid_as_before(tiny_llama: Path) -> None:
    one, two = (FrozenLLM(str(tiny_llama), levels=levels).identity for levels in (1, 2))
    assert "levels" not in one
    assert one != two


@pytest.mark.parametrize(("levels", "message"), [(5, "has 4 blocks up to layer -1"), (0, "at least one hidden state")])
def test_levels_that_are_not_there_are_refused(levels: int, message: str, tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match=message):
        _ = FrozenLLM(str(tiny_llama), layer=-1, levels=levels).taps


def test_levels_of_llm_and_prompt_encoder_must_agree() -> None:
    with pytest.raises(ValueError, match="features of 32 channels are not of 3 levels; set levels of llms alike"):
        PromptEncoder([32], 64, heads=4, levels=3)
    with pytest.raises(ValueError, match="set refiner_depth=0, fusion=concat"):
        PromptEncoder([32, 32], 64, heads=4, levels=2, mix="per_block")


def test_learnt_weights_begin_as_a_mean_and_choose(tiny_llama: Path) -> None:
    model = PromptEncoder([64], 32, heads=4, refiner_depth=0, levels=2, mix="weights")
    low, high = torch.randn(2, 1, 5, 32)
    mix = model.project[0]
    torch.testing.assert_close(mix(torch.cat([low, high], -1)), mix.project((low + high) / 2))
    with torch.no_grad():
        mix.weights[1] = 100
    torch.testing.assert_close(mix(torch.cat([low, high], -1)), mix.project(high))


def test_every_preset_is_explained_with_its_source() -> None:
    page = PAGE.read_text()
    assert re.findall(r"^## `([\w-]+)`$", page, re.MULTILINE) == list(PRESETS)
    for preset in PRESETS.values():
        assert preset.source in page


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains(name: str, tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = yaml.safe_load(tiny_recipe.read_text())
    recipe["model"]["llms"] = [{"name": f"bundled:llm_{llm}", "dtype": "float32"} for llm in ("llama", "qwen")]
    recipe["model"]["backbone"]["init_args"]["depth"] = 6
    recipe["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path)
    recipe["trainer"] |= {"callbacks": [], "enable_checkpointing": False, "max_steps": 2, "limit_val_batches": 0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", str(tmp_path / "recipe.yaml"), "--model.prompt_encoder.preset", name]) == 0
    (saved,) = tmp_path.rglob("config.yaml")
    model = yaml.safe_load(saved.read_text())["model"]
    encoder, llm = model["prompt_encoder"]["init_args"], model["llms"][0].get("init_args", model["llms"][0])
    assert encoder["preset"] is None
    assert PRESETS[name].prompt_encoder.items() <= encoder.items()
    assert PRESETS[name].llm.items() <= llm.items()


def test_a_preset_that_does_not_exist_lists_those_that_do(tiny_recipe: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["fit", "--config", str(tiny_recipe), "--model.prompt_encoder.preset", "hunian"]) == 1
    assert "there is no preset 'hunian'; there are li-dit, hunyuan" in capsys.readouterr().err


def test_a_preset_for_llms_is_refused_with_a_t5(tiny_recipe: Path, capsys: pytest.CaptureFixture) -> None:
    t5 = '[{"class_path": "lidit.models.t5.FrozenT5", "init_args": {"name": "x"}}]'
    chosen = ["--model.prompt_encoder.preset", "krea", "--model.llms", t5]
    assert main(["fit", "--config", str(tiny_recipe), *chosen]) == 1
    assert "preset krea sets levels of every FrozenLLM, and one in the recipe has none" in capsys.readouterr().err


def table() -> dict[str, list[str]]:
    """The page's table: a preset's cells after its name."""
    rows = [line.strip("| ").split("|") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("recipe", ["mini", "mini_ablation"])
def test_over_a_recipe_a_preset_is_what_the_page_says(name: str, recipe: str) -> None:
    chosen = ["--config", f"experiments/configs/{recipe}.yaml", "--model.prompt_encoder.preset", name]
    two = [] if recipe == "mini" else ["--model.llms", '[{"name": "bundled:llm_llama"}, {"name": "bundled:llm_qwen"}]']
    _, model = read([*chosen, *two])
    with torch.device("meta"):
        _, encoder = model.build()
    _, instruction, cut, refiner, _, fusion, once = table()[name]
    assert [bool(llm.prompts.instruction) for llm in model.llms] == [instruction == "sentence"] * 2
    assert encoder.timeless == (once == "yes")
    if cut:
        assert encoder.truncate == {"kept": "never"}.get(cut, cut)
    assert len(encoder.refiners[0].blocks) == (0 if refiner == "none" else 2)
    assert isinstance(encoder.fusion, CollaborativeRefiner) == (fusion == "collaborative")


def test_what_the_command_line_sets_beside_a_preset_stays_and_is_named(
    tiny_recipe: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    changed = ["--model.prompt_encoder.preset=hunyuan", "--model.prompt_encoder.pool=linear"]
    changed += ["--model.prompt_encoder.fusion=collaborative", "--trainer.max_steps=0"]
    changed += [f"--trainer.logger.init_args.save_dir={tmp_path}"]
    with caplog.at_level("INFO"):
        assert main(["fit", "--config", str(tiny_recipe), *changed]) == 0
    assert "truncate=before, pool=linear (kept), fusion=collaborative (kept)" in caplog.text
