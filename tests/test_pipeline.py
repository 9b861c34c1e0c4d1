"""From a checkpoint or an export and prompts to pictures: repeatable, checked, and written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lidit.cli import main
from lidit.pipeline import Pipeline
from lidit.sample import read_prompts

PROMPTS = ["a red circle", "a blue square above two green stars and a yellow triangle", ""]


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint: Path) -> Pipeline:
    return Pipeline.load(str(tiny_checkpoint))


def draw(pipeline: Pipeline, prompts: list[str], seeds: list[int], **settings: object) -> list[np.ndarray]:
    return pipeline(prompts, seeds, **{"size": (32, 32), "steps": 3} | settings)


def furthest(images: list[np.ndarray], others: list[np.ndarray]) -> int:
    """The largest difference of two pixels, of 255."""
    return max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(images, others, strict=True))


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(pipeline: Pipeline) -> None:
    first, second = (draw(pipeline, PROMPTS, [0, 1, 2]) for _ in range(2))
    assert furthest(first, second) == 0
    assert furthest(first, draw(pipeline, PROMPTS, [3, 4, 5])) > 30


def test_a_picture_does_not_depend_on_its_batch(pipeline: Pipeline) -> None:
    together = draw(pipeline, PROMPTS, [0, 1, 2])
    alone = [draw(pipeline, [prompt], [seed])[0] for seed, prompt in enumerate(PROMPTS)]
    assert furthest(together, alone) <= 1  # sums in another order may round otherwise
    assert furthest(together, draw(pipeline, PROMPTS, [0, 1, 2], batch_size=2)) <= 1


def test_a_picture_depends_on_its_prompt_and_on_guidance(pipeline: Pipeline) -> None:
    image = draw(pipeline, PROMPTS[:1], [0], guidance=4.0)
    assert furthest(image, draw(pipeline, PROMPTS[1:2], [0], guidance=4.0)) > 0
    assert furthest(image, draw(pipeline, PROMPTS[:1], [0], guidance=1.0)) > 0
    assert furthest(*(draw(pipeline, [""], [0], guidance=scale) for scale in (1.0, 4.0))) <= 1


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (48, 80), (16, 16)])
def test_pictures_have_the_size_that_is_asked_for(pipeline: Pipeline, size: tuple[int, int]) -> None:
    (image,) = draw(pipeline, PROMPTS[:1], [0], size=size)
    assert image.shape == (size[1], size[0], 3)
    assert image.dtype == np.uint8


@pytest.mark.parametrize(
    ("size", "fixes"),
    [((50, 64), ["48x64", "64x64"]), ((33, 70), ["32x64", "48x80"]), ((8, 8), ["16x16"]), ((0, 64), ["16x64"])],
)
def test_a_size_that_does_not_divide_is_refused_with_sizes_that_work(
    pipeline: Pipeline, size: tuple[int, int], fixes: list[str]
) -> None:
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} is not divisible by 16; take {' or '.join(fixes)}$"):
        pipeline.noise([0], *size)
    for fix in fixes:
        assert pipeline.noise([0], *map(int, fix.split("x"))).isfinite().all()


@pytest.mark.parametrize("sampler", ["euler", "heun", None])
def test_every_sampler_for_velocities_draws(pipeline: Pipeline, sampler: str | None) -> None:
    assert len(draw(pipeline, PROMPTS[:1], [0], sampler=sampler)) == 1


def test_a_sampler_for_another_prediction_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="ddim.*use one of euler, heun"):
        draw(pipeline, PROMPTS[:1], [0], sampler="ddim")


def refused(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line with which a command ends."""
    capsys.readouterr()
    assert main(arguments) == 1
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lidit: error: ")]
    return message


def damaged(kind: str, tiny_checkpoint: Path, exported: Path, folder: Path) -> Path:
    """Something that is no model."""
    place = folder / "given"
    whole, weights = tiny_checkpoint.read_bytes(), (exported / "model.safetensors").read_bytes()
    config = (exported / "config.json").read_text()
    if kind in (
        contents := {"empty": b"", "text": b"hello\n" * 50, "half": whole[: len(whole) // 2], "cut": whole[:-1]}
    ):
        place.write_bytes(contents[kind])
    elif kind in (objects := {"tensor": torch.zeros(2), "other": {"model": {}}, "code": Path("x")}):
        torch.save(objects[kind], place)
    elif kind in (
        parts := {"half export": (config, weights[:-9]), "no config": ("{", weights), "a list": ("[]", weights)}
    ):
        place.mkdir()
        (place / "config.json").write_text(parts[kind][0])
        (place / "model.safetensors").write_bytes(parts[kind][1])
    elif kind == "folder":
        place.mkdir()
    return place


MESSAGES = {
    "missing": "no checkpoint, exported folder or run at",
    "empty": "is not a complete checkpoint",
    "text": "is not a complete checkpoint",
    "half": "is not a complete checkpoint",
    "cut": "is not a complete checkpoint",
    "tensor": "is no checkpoint of `lidit fit`",
    "other": "is no checkpoint of `lidit fit`",
    "code": "could run code",
    "folder": "has no config.json; `lidit export` writes such folders",
    "half export": "is damaged",
    "no config": "is damaged",
    "a list": "describes no model",
}


@pytest.mark.parametrize(("kind", "message"), MESSAGES.items())
def test_what_is_no_model_ends_in_one_line_and_leaves_nothing_behind(
    kind: str, message: str, tiny_checkpoint: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    place = damaged(kind, tiny_checkpoint, exported, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    said = refused(["sample", "x", "--checkpoint", str(place), "--out", str(tmp_path / "out.png")], capsys)
    assert message in said
    assert str(place) in said
    if place.is_file():
        refused(["export", str(place), str(tmp_path / "exported")], capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_without_averages_is_refused_with_the_fix(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    saved = torch.load(tiny_checkpoint, weights_only=True)
    del saved["callbacks"]["EMA"]
    torch.save(saved, tmp_path / "plain.ckpt")
    said = refused(["sample", "x", "--checkpoint", str(tmp_path / "plain.ckpt")], capsys)
    assert "holds no averaged weights; say --ema false" in said
    assert Pipeline.load(str(tmp_path / "plain.ckpt"), ema=False)


@pytest.mark.parametrize("change", ["shape", "missing", "left over", "setting"])
def test_weights_of_another_architecture_are_refused(
    change: str, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config, weights = json.loads((exported / "config.json").read_text()), load_file(exported / "model.safetensors")
    if change == "shape":
        weights["backbone.final.bias"] = torch.zeros(3)
    elif change == "missing":
        del weights["backbone.final.bias"]
    elif change == "left over":
        weights["backbone.more"] = torch.zeros(3)
    else:
        config["model"]["backbone"]["init_args"]["depth_of_old"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors")
    said = refused(["sample", "x", "--checkpoint", str(tmp_path)], capsys)
    expected = {
        "shape": "1 tensors differ, first backbone.final.bias, expected (16,), found (3,)",
        "missing": "first backbone.final.bias, expected (16,), found None",
        "left over": "first backbone.more, expected None, found (3,)",
        "setting": "depth_of_old",
    }
    assert expected[change] in said


def test_a_png_carries_prompt_seed_and_settings(tiny_checkpoint: Path, tmp_path: Path) -> None:
    prompt = "ein roter Kreis, 红色的圆"
    out = tmp_path / "new" / "out.png"
    settings = ["--seed", "3", "--steps", "2", "--guidance", "2.5", "--size", "48x32"]
    assert main(["sample", prompt, "--out", str(out), "--checkpoint", str(tiny_checkpoint), *settings]) == 0
    image = Image.open(out)
    assert image.size == (48, 32)
    facts = {"prompt": prompt, "seed": "3", "steps": "2", "guidance": "2.5", "size": "48x32"}
    assert facts.items() <= image.text.items()
    assert image.text["checkpoint"] == str(tiny_checkpoint)
    assert [path.name for path in out.parent.iterdir()] == ["out.png"]


def test_n_pictures_of_each_prompt_in_a_file_have_seeds_one_after_another(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\n  a blue square  \n")
    out = ["--out", str(tmp_path / "o.png"), "--checkpoint", str(tiny_checkpoint)]
    small = ["--n", "2", "--seed", "5", "--steps", "1", "--size", "16x16"]
    assert main(["sample", "--prompts", str(prompts), *small, *out]) == 0
    texts = [Image.open(path).text for path in sorted(tmp_path.glob("*.png"))]
    drawn = [(text["prompt"], text["seed"]) for text in texts]
    assert drawn == [("a red circle", "5"), ("a red circle", "6"), ("a blue square", "5"), ("a blue square", "6")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n", "0"], "--n is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--seed", str(2**65)], "--seed is"),
        (["--steps", "0"], "steps is 0"),
        (["--guidance", "-1"], "guidance scale is -1"),
        (["--size", "64"], "not of the form WIDTHxHEIGHT"),
        (["--size", "50x64"], "take 48x64 or 64x64"),
        (["--sampler", "ddim"], "use one of euler, heun"),
        (["--prompts", "file.txt"], "either a prompt"),
    ],
)
def test_a_setting_that_cannot_be_honoured_is_one_line_and_draws_nothing(
    arguments: list[str], message: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = ["--out", str(tmp_path / "out.png"), "--checkpoint", str(tiny_checkpoint)]
    assert message in refused(["sample", "x", *arguments, *out], capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_as_output_is_refused_before_anything_is_drawn(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    said = refused(["sample", "x", "--out", str(tmp_path), "--checkpoint", str(tiny_checkpoint)], capsys)
    assert "is a folder; name a file in it" in said
    assert list(tmp_path.parent.glob(".*.partial")) == []


def test_files_of_prompts_that_do_not_serve_are_refused(tmp_path: Path) -> None:
    blank, binary = tmp_path / "blank.txt", tmp_path / "binary.txt"
    blank.write_text("\n  \n")
    binary.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match=r"blank.txt holds no prompts; write one per line"):
        read_prompts(None, str(blank))
    with pytest.raises(ValueError, match=r"binary.txt is no UTF-8 text"):
        read_prompts(None, str(binary))
    for missing in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(FileNotFoundError, match="there is no file of prompts"):
            read_prompts(None, str(missing))
    with pytest.raises(ValueError, match="either a prompt"):
        read_prompts(None, None)
    assert read_prompts("", None) == [""]


@pytest.mark.parametrize("key", ["revision", "layer", "instruction"])
def test_a_model_is_not_run_on_features_of_another_llm(exported: Path, tmp_path: Path, key: str) -> None:
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["prompts"][1][key] = "another"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"trained with another LLM 1: {key} was 'another'.*use the LLM it was"):
        Pipeline.load(str(tmp_path))


def test_a_checkpoint_knows_its_llms(tiny_checkpoint: Path) -> None:
    checkpoint = torch.load(tiny_checkpoint, weights_only=True)
    assert checkpoint["llms"] == [llm.identity for llm in Pipeline.load(str(tiny_checkpoint)).model.llms]
