"""BLIP-VQA answers as the official code: its tokens, its pixels, and no question changed by another beside it."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    CLIPConfig,
)

from lidit.eval import blip_vqa, t2i_compbench
from lidit.eval.blip_vqa import BlipVQA, cleaned, convert, four_decimals, renamed, yes_probability
from lidit.eval.suite import BenchmarkError

QUESTIONS = ["a red bench?", "a blue car?", "a very long green and white striped bench?", "bench?"]
WORDS = ["a", "red", "blue", "green", "white", "very", "long", "striped", "bench", "car", "and", "?", ",", "."]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def tokenizer(yes: str = "yes") -> BertTokenizerFast:
    """BERT's special tokens, yes and no at their places, and some words, among fillers."""
    vocabulary = [f"filler{i}" for i in range(30522)]
    for i, word in {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 2748: yes, 2053: "no"}.items():
        vocabulary[i] = word
    vocabulary[5000 : 5000 + len(WORDS)] = WORDS
    return BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}, do_lower_case=True)


def config(**vision: object) -> BlipConfig:
    return BlipConfig(
        text_config=SIZES | {"encoder_hidden_size": 32, "initializer_range": 0.3},
        vision_config=SIZES | {"image_size": 32, "patch_size": 16, "initializer_range": 0.3} | vision,
    )


def random_model() -> BlipForQuestionAnswering:
    """A model whose answers are far from 0.5 and depend on image and question."""
    torch.manual_seed(0)
    model = BlipForQuestionAnswering(config())
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("blip")
    random_model().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def judge(folder: Path) -> BlipVQA:
    return BlipVQA(str(folder))


def picture(seed: int = 0, shape: tuple[int, int] = (40, 56)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_a_question_is_answered_alike_alone_and_among_others(judge: BlipVQA) -> None:
    together = judge(picture(), QUESTIONS)
    alone = [judge(picture(), [question])[0] for question in QUESTIONS]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert np.diff(sorted(together)).min() > 1e-4  # they differ, so that a mix-up of rows would show


def test_padding_would_have_changed_the_answers(judge: BlipVQA) -> None:
    """Why it groups by length: the padded batch, asked as the model's own forward would, differs."""
    tokens = tokenizer()(QUESTIONS, padding=True, return_tensors="pt")
    model, ids = judge._model, tokens["input_ids"].clone()
    ids[:, 0] = blip_vqa.ENC
    with torch.no_grad():
        seen = model.vision_model(pixel_values=judge.pixels(picture())).last_hidden_state
        read = model.text_encoder(
            ids, attention_mask=tokens["attention_mask"], encoder_hidden_states=seen.expand(len(ids), -1, -1)
        ).last_hidden_state
        logits = model.text_decoder(
            torch.full((len(ids), 1), blip_vqa.DEC),
            encoder_hidden_states=read,
            encoder_attention_mask=tokens["attention_mask"],
        ).logits[:, 0]
    assert np.abs(np.array(judge(picture(), QUESTIONS)) - yes_probability(logits).numpy()).max() > 1e-4


def test_the_first_token_is_enc_and_the_answer_starts_with_dec(judge: BlipVQA, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    for part in ("text_encoder", "text_decoder"):
        forward = getattr(judge._model, part).forward

        def spy(*args, forward=forward, part=part, **kwargs):
            asked[part] = kwargs["input_ids"].tolist()
            return forward(*args, **kwargs)

        monkeypatch.setattr(getattr(judge._model, part), "forward", spy)
    judge(picture(), ["A red, bench.?"])
    ids = tokenizer()("a red, bench?")["input_ids"]
    assert asked == {"text_encoder": [[30523, *ids[1:]]], "text_decoder": [[30522]]}


def test_long_questions_are_cut_at_35_tokens(judge: BlipVQA, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    ask = judge.ask
    monkeypatch.setattr(judge, "ask", lambda seen, ids: lengths.append(ids.shape[1]) or ask(seen, ids))
    judge(picture(), ["red " * 60 + "?"])
    assert lengths == [35]


def test_the_image_counts(judge: BlipVQA) -> None:
    assert abs(judge(picture(0), QUESTIONS[:1])[0] - judge(picture(1), QUESTIONS[:1])[0]) > 1e-4


def test_pixels_are_the_squashed_image_normalised_as_clips(judge: BlipVQA) -> None:
    image = picture(shape=(20, 90))
    pixels = judge.pixels(image)
    assert pixels.shape == (1, 3, 32, 32)
    squashed = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))
    expected = (squashed[5, 7] / 255 - blip_vqa.MEAN) / blip_vqa.STD
    np.testing.assert_allclose(pixels[0, :, 5, 7], expected, atol=1e-5)


def test_no_question_needs_no_model_and_an_empty_one_is_a_mistake(judge: BlipVQA) -> None:
    assert judge(picture(), []) == []
    with pytest.raises(ValueError, match="empty question"):
        judge(picture(), ["a red bench?", ""])


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ('A "Red" (Bench)*#:;~.!?', "a red bench?"),
        ("a bench?  ", "a bench?"),
        (" a  bench", " a  bench"),
        ("no-one's cup, red?", "no-one's cup, red?"),
        ("w " * 60, " ".join("w" * 50)),
    ],
)
def test_clean_up(question: str, expected: str) -> None:
    assert cleaned(question) == expected


def test_far_off_logits_give_no_nan() -> None:
    logits = torch.zeros(3, 30524)
    logits[:, blip_vqa.YES] = torch.tensor([-500.0, -500.0, 3.0])
    logits[:, blip_vqa.NO] = torch.tensor([-501.0, -400.0, 3.0])
    found = yes_probability(logits).tolist()
    assert found == pytest.approx([1 / (1 + math.exp(-1)), 0.0, 0.5])


def test_four_decimals() -> None:
    assert four_decimals(0.12344999) == 0.1234
    assert four_decimals(1.0) == 1.0


def test_the_hubs_weights_are_a_variant_and_converted_ones_are_not(judge: BlipVQA, tmp_path: Path) -> None:
    assert judge.describe() == {"name": "blipvqa-hf32", "model": judge.source, "image_size": 32}
    official = config(image_size=480, patch_size=240)
    official.original_sha256 = "abc"
    BlipForQuestionAnswering(official).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert BlipVQA(str(tmp_path)).describe()["name"] == "blipvqa"
    assert BlipVQA(str(tmp_path)).describe()["original_sha256"] == "abc"


def blips_names(model: BlipForQuestionAnswering) -> dict[str, torch.Tensor]:
    """The weights under the names of BLIP's own classes (models/vit.py, models/med.py there)."""
    found = {}
    for name, weight in model.state_dict().items():
        for new, old in {
            "vision_model.embeddings.class_embedding": "visual_encoder.cls_token",
            "vision_model.embeddings.position_embedding": "visual_encoder.pos_embed",
            "vision_model.embeddings.patch_embedding": "visual_encoder.patch_embed.proj",
            "vision_model.post_layernorm": "visual_encoder.norm",
            "vision_model.encoder.layers": "visual_encoder.blocks",
            "self_attn.projection": "attn.proj",
            "self_attn": "attn",
            "layer_norm": "norm",
        }.items():
            if name.startswith(("vision_model", "visual_encoder")):
                name = name.replace(new, old)
        found[name] = weight
    found["text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    return found


def test_blips_own_checkpoint_converts(judge: BlipVQA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = blips_names(judge._model)
    assert "visual_encoder.blocks.1.attn.qkv.weight" in names
    assert set(renamed(names)) == set(judge._model.state_dict())

    torch.save({"model": names}, tmp_path / "original.pth")
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    wanted = {}

    def small(**settings: dict) -> BlipConfig:
        wanted.update(settings)
        return config()

    monkeypatch.setattr("transformers.BlipConfig", small)
    convert(tmp_path / "original.pth", str(tmp_path / "tokenizer"), tmp_path / "out")
    converted = BlipVQA(str(tmp_path / "out"))
    np.testing.assert_allclose(converted(picture(), QUESTIONS), judge(picture(), QUESTIONS), atol=1e-6)
    assert len(converted.describe()["original_sha256"]) == 64
    assert wanted["vision_config"] == {"image_size": 480, "layer_norm_eps": 1e-6}
    assert wanted["text_config"]["num_attention_heads"] == 12


def test_a_file_of_other_weights_does_not_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"model": {"visual_encoder.cls_token": torch.zeros(1, 1, 32)}}, tmp_path / "other.pth")
    monkeypatch.setattr("transformers.BlipConfig", lambda **_: config())
    with pytest.raises(BenchmarkError, match="is not model_base_vqa_capfilt_large.pth"):
        convert(tmp_path / "other.pth", "unused", tmp_path / "out")


def test_what_cannot_judge_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="cannot be loaded as a BLIP-VQA model"):
        BlipVQA(str(tmp_path / "nowhere"))
    CLIPConfig().save_pretrained(tmp_path / "clip")
    with pytest.raises(BenchmarkError, match="is a clip model"):
        BlipVQA(str(tmp_path / "clip"))
    BlipForConditionalGeneration(config()).save_pretrained(tmp_path / "captions")
    tokenizer().save_pretrained(tmp_path / "captions")
    with pytest.raises(BenchmarkError, match="is not a VQA model"):
        BlipVQA(str(tmp_path / "captions"))
    random_model().save_pretrained(tmp_path / "words")
    tokenizer(yes="yeah").save_pretrained(tmp_path / "words")
    with pytest.raises(BenchmarkError, match="yes and no at"):
        BlipVQA(str(tmp_path / "words"))


def test_the_hubs_early_mistake_of_eight_heads_is_refused() -> None:
    text = BlipConfig().text_config  # transformers' default
    with pytest.raises(BenchmarkError, match="with 8 heads"):
        blip_vqa._check("hub", text, tokenizer())


def test_a_run_is_scored_by_a_real_judge(
    folder: Path, judge: BlipVQA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = b"a red bench and a blue car"
    blob = hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()
    monkeypatch.setitem(t2i_compbench.GIT_BLOBS, "color_val.txt", blob)
    (tmp_path / "color_val.txt").write_bytes(text)
    wanted = t2i_compbench.suite(tmp_path, ["color"])
    (tmp_path / "color/samples").mkdir(parents=True)
    (tmp_path / "prompts.json").write_text(wanted.files["prompts.json"])
    for i, each in enumerate(wanted.pictures):
        Image.fromarray(picture(i)).save(tmp_path / each.path)
    result = t2i_compbench.score(tmp_path, tmp_path, blip=str(folder))
    yes = [judge(picture(i), ["a red bench?", "a blue car?"]) for i in range(10)]
    assert result["scores"]["color np8"] == pytest.approx(np.mean([a * b for a, b in yes]), abs=2e-4)
    assert result["judges"]["attributes"]["name"] == "blipvqa-hf32"
    json.dumps(result)
