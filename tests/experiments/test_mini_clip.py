"""The miniature scorers: open_clip folders from open_clip's losses, and what their cards measure."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from jsonargparse import ArgumentParser
from open_clip.model import CustomTextCLIP
from PIL import Image

from experiments import mini_clip
from experiments.mini_clip import GROUP, Scorer
from lidit.eval.suite import BenchmarkError
from lidit.scenes.corpus import examples, texts
from lidit.scenes.draw import Object, Scene, draw
from lidit.scenes.suites import HELDOUT

CONFIGS = Path(__file__).parents[2] / "experiments/configs"
TEXT = {"context_length": 16, "width": 16, "heads": 2, "layers": 1}
VISION = {"image_size": 64, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1, "mlp_ratio": 2.0}
MODELS = {
    "clip": {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT | {"pool_type": "eos"}},
    "siglip": {
        "embed_dim": 8,
        "custom_text": True,
        "init_logit_bias": -2,
        "vision_cfg": VISION,
        "text_cfg": TEXT | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    },
}
TINY = {"vocabulary": 400, "steps": 2, "batch_size": 4, "scenes": 4, "threads": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with clip/ and siglip/, each after two steps on four scenes."""
    folder = tmp_path_factory.mktemp("scorers")
    for loss, model in MODELS.items():
        mini_clip.train(out=str(folder / loss), loss=loss, model=model, **TINY)
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return mini_clip.make_tokenizer(512, list(texts(0, 300)))


@pytest.mark.parametrize("loss", MODELS)
def test_open_clip_loads_the_folder_from_any_place(loss: str, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    features = []
    for name in (loss, str(trained / loss), f"../{trained.name}/{loss}"):
        model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{name}")
        model.eval()
        tokens = open_clip.get_tokenizer(f"local-dir:{name}")(["a red circle"])
        assert tokens.shape == (1, 16)
        image = preprocess(Image.new("RGB", (96, 64), "white"))
        assert image.shape == (3, 64, 64)
        assert image.min() == image.max() == 1
        features.append(torch.cat([model.encode_image(image[None]), model.encode_text(tokens)]))
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[0], features[2])


@pytest.mark.parametrize("loss", MODELS)
def test_what_is_loaded_is_what_was_trained_rounded_to_half(loss: str, trained: Path) -> None:
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{trained / loss}")
    config = json.loads((trained / loss / "open_clip_config.json").read_text())["model_cfg"]
    torch.manual_seed(0)  # what train began with
    begun = mini_clip.make_model(config)
    assert type(model) is type(begun)
    assert isinstance(model, CustomTextCLIP) == (loss == "siglip")
    assert (model.logit_bias is not None) == (loss == "siglip")
    assert all(torch.equal(p.half().float(), p) for p in model.parameters())
    changes = [(a - b).detach().abs().max() for a, b in zip(model.parameters(), begun.parameters(), strict=True)]
    assert all(0 < change < 0.1 for change in changes if change)
    assert sum(change > 0 for change in changes) > len(changes) * 0.9


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(trained: Path, tmp_path: Path) -> None:
    for seed, same in ((0, True), (1, False)):
        mini_clip.train(out=str(tmp_path), loss="clip", model=MODELS["clip"], seed=seed, **TINY)
        name = "open_clip_model.safetensors"
        assert ((tmp_path / name).read_bytes() == (trained / "clip" / name).read_bytes()) == same


@pytest.mark.parametrize("loss", MODELS)
def test_training_learns_which_image_belongs_to_which_caption(loss: str, tokenizer: object) -> None:
    torch.manual_seed(0)
    model = mini_clip.make_model(mini_clip.complete(MODELS[loss], tokenizer))
    stream = mini_clip.batches(list(examples(0, 4)), 4, dense_share=0.0, seed=0)
    losses = mini_clip.optimize(model, tokenizer, stream, steps=80, learning_rate=2e-3, loss=loss)
    chance = math.log(4) if loss == "clip" else 4 * math.log(4) - 3 * math.log(3)  # a sigmoid at the base rate
    assert np.mean(losses[-10:]) < 0.85 * chance
    assert 0 <= model.logit_scale.item() <= math.log(100)


def test_a_long_caption_keeps_its_end_token_and_a_short_one_is_padded(tokenizer: object) -> None:
    long, short = mini_clip.tokens(tokenizer, ["a red circle and " * 20, "A Red circle"], 16).tolist()
    pad, start, end = (tokenizer.convert_tokens_to_ids(token) for token in mini_clip.SPECIALS)
    assert (long[0], long[-1]) == (start, end)
    assert long.count(end) == 1
    assert short == [start, *tokenizer.encode(" a red circle", add_special_tokens=False), end, *[pad] * 11]


def test_scene_language_is_a_token_a_word_and_other_language_is_not_lost(tokenizer: object) -> None:
    assert len(tokenizer.tokenize("two small checkered purple diamonds above a heart")) == 8
    assert "ü" in tokenizer.decode(tokenizer.encode("a Müsli"))


def test_captions_are_worded_anew_and_belong_to_their_images() -> None:
    drawn = list(examples(0, 6))
    stream = mini_clip.batches(drawn, 3, dense_share=0.0, seed=0)
    shapes = {e.image.tobytes(): {o.shape for o in e.scene.objects} for e in drawn}
    worded = {key: set() for key in shapes}
    for _ in range(8):
        pixels, captions = next(stream)
        assert pixels.shape == (3, 3, 64, 64)
        assert -1 <= float(pixels.min()) < float(pixels.max()) <= 1
        for image, caption in zip(pixels, captions, strict=True):
            key = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy().tobytes()
            worded[key].add(caption)
            assert all(shape in caption for shape in shapes[key])
    assert all(worded.values())
    assert max(map(len, worded.values())) > 1
    dense = next(mini_clip.batches(drawn, 3, dense_share=1.0, seed=0))[1]
    assert all("background" in caption for caption in dense)


def test_disturbed_images_differ_each_to_another_degree() -> None:
    torch.manual_seed(0)
    one = torch.from_numpy(next(examples(0, 1)).image).permute(2, 0, 1).float() / 127.5 - 1
    changes = (mini_clip.disturb(one.repeat(32, 1, 1, 1)) - one).abs().mean((1, 2, 3))
    assert changes.min() < 0.04
    assert 0.08 < changes.max() < 0.4


def test_retrieval_counts_what_is_found_in_its_own_group() -> None:
    unit = torch.eye(GROUP)
    found = {"image_to_text": 1.0, "text_to_image": 1.0}
    assert mini_clip.retrieval(unit, unit) == found
    assert mini_clip.retrieval(unit.repeat(2, 1), unit.repeat(2, 1)) == found  # alike, but in different groups
    assert mini_clip.retrieval(unit, unit.roll(1, 0)) == {"image_to_text": 0.0, "text_to_image": 0.0}
    alike = unit.clone()
    alike[1] = 2 * unit[0]  # image 1 looks like image 0, only more so
    assert mini_clip.retrieval(alike, unit) == {"image_to_text": 0.9844, "text_to_image": 0.9688}
    for images, captions in ((unit[:63], unit[:63]), (unit, unit.repeat(2, 1)), (unit[:0], unit[:0])):
        with pytest.raises(ValueError, match="groups of 64"):
            mini_clip.retrieval(images, captions)


def run_of(folder: Path, right: int) -> str:
    """A run of one prompt a task: the first pictures show what they should, the others are white."""
    suite = HELDOUT.suite(count_per_task=1)
    for name, content in suite.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    for i, picture in enumerate(suite.pictures):
        (folder / picture.path).parent.mkdir(parents=True, exist_ok=True)
        facts = mini_clip.benchmarks.prompts("heldout", 1, 0)[i].facts
        looks = [fact.look for fact in facts]
        objects = [Object(k.shape, k.color, k.texture or "plain", k.size or "large", 0, j) for j, k in enumerate(looks)]
        image = draw(Scene(tuple(objects)), 64, 64) if i < right else np.full((64, 64, 3), 247, np.uint8)
        Image.fromarray(image).save(folder / picture.path)
    return str(folder)


def test_a_stage_is_judged_image_by_image(tmp_path: Path) -> None:
    images, prompts, shares = mini_clip.judged(Path(run_of(tmp_path / "run", right=2)))
    assert len(images) == len(prompts) == 4
    assert shares == [1.0, 1.0, 0.0, 0.0]


class Oracle:
    """Scores an image by its darkness, which only drawn objects have; no prompt matters."""

    def images(self, pixels: list[np.ndarray]) -> torch.Tensor:
        return torch.tensor([[float((247 - image.astype(float)).mean())] for image in pixels])

    def texts(self, captions: list[str]) -> torch.Tensor:
        return torch.ones(len(captions), 1)


def test_agreement_is_a_rank_correlation_over_the_images_of_all_stages(tmp_path: Path) -> None:
    stages = [run_of(tmp_path / "early", right=0), run_of(tmp_path / "late", right=2)]
    found = mini_clip.agreement(Oracle(), stages)
    assert found["images"] == 8
    # two drawn images, ordered among themselves by the score and not by the judge, above six equal ones
    assert 0.95 < found["spearman"] <= 1
    assert [stage["run"] for stage in found["stages"]] == ["early", "late"]
    assert [stage["judge"] for stage in found["stages"]] == [0.0, 0.5]
    assert found["stages"][1]["score"] > found["stages"][0]["score"] == 0


def test_stages_that_cannot_be_judged_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BenchmarkError, match=r"empty.prompts\.json is missing"):
        mini_clip.agreement(Oracle(), [str(tmp_path / "empty")])
    with pytest.raises(BenchmarkError, match="the judge gives every image 0.0"):
        mini_clip.agreement(Oracle(), [run_of(tmp_path / "blank", right=0)])
    partly = Path(run_of(tmp_path / "partly", right=1))
    (partly / "two/00001.png").unlink()
    with pytest.raises(BenchmarkError, match="3 of 4 images"):
        mini_clip.agreement(Oracle(), [str(partly)])


def test_a_card_says_what_was_measured(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, recipe = run_of(tmp_path / "late", right=2), tmp_path / "recipe.yaml"
    recipe.write_text("seed: 7\n")
    monkeypatch.chdir(tmp_path)
    mini_clip.card(str(trained / "clip"), recipe="recipe.yaml", stages=[stage], count=GROUP)
    card = json.loads((trained / "clip/card.json").read_text())
    measured = card["measured"]
    assert "--config recipe.yaml" in card["made_by"]
    assert card["seed"] == 7
    assert str(tmp_path) not in json.dumps(card)
    for kind in ("short_captions", "dense_captions"):
        assert all(0 <= share < 0.5 for share in measured[kind].values())  # it was hardly trained
    assert measured["parameters"] == sum(p.numel() for p in Scorer(str(trained / "clip")).model.parameters())
    assert measured["judge"]["images"] == 4
    assert -1 <= measured["judge"]["spearman"] <= 1


@pytest.mark.parametrize("name", MODELS)
def test_the_recipes_build_models_that_are_small_enough_to_bundle(name: str, tokenizer: object) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(mini_clip.train)
    recipe = parser.parse_path(str(CONFIGS / f"mini_{name}.yaml"))
    assert recipe.loss == name
    assert recipe.out == f"lidit/assets/{name}"
    model = mini_clip.make_model(mini_clip.complete(recipe.model, tokenizer))
    assert (model.logit_bias is not None) == (name == "siglip")
    assert 2 * sum(p.numel() for p in model.parameters()) < 1.5e6


@pytest.mark.parametrize(("loss", "model"), [("siglip", "clip"), ("clip", "siglip")])
def test_a_bias_goes_with_the_sigmoid_and_only_with_it(loss: str, model: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="init_logit_bias"):
        mini_clip.train(out=str(tmp_path / "x"), loss=loss, model=MODELS[model], **TINY)
    assert not (tmp_path / "x").exists()
