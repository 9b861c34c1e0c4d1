"""GenEval judges as its authors: rules at their edges, mmdet's rule for masks, and the whole way on tiny models."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Mask2FormerConfig, SwinConfig
from transformers.models.mask2former import modeling_mask2former

from lidit.eval import geneval, mask2former
from lidit.eval.geneval import CLASSES, NAME, ColorClassifier, cut_out, score, suite
from lidit.eval.geneval_rules import Options, Verdict, iou, keep, relations, report, summary, verdict
from lidit.eval.mask2former import Mask2Former, boxes_of, instances, network, pixels, resized
from lidit.eval.openclip import OpenCLIP
from lidit.eval.suite import BenchmarkError

PROMPTS_DIR = Path(os.environ.get("LIDIT_SHARED", Path(__file__).parents[2] / "../shared")) / "data/geneval"
needs_prompts = pytest.mark.skipif(not PROMPTS_DIR.is_dir(), reason="no GenEval prompts in LIDIT_SHARED")
LINES = [
    {"tag": "single_object", "include": [{"class": "kite", "count": 1}], "prompt": "a photo of a kite"},
    {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"},
    {"tag": "colors", "include": [{"class": "kite", "count": 1, "color": "red"}], "prompt": "a photo of a red kite"},
]


def box(x: float = 0, y: float = 0, size: float = 10, score: float = 0.95) -> list[float]:
    return [float(x), float(y), float(x + size), float(y + size), score]


def judge(include: list[dict], detections: dict, colors: dict | None = None, **more: Any) -> Verdict:
    metadata = {"tag": "x", "prompt": "", "include": include} | more
    return verdict(metadata, detections, lambda name, i: (colors or {})[name][i])


# rules


@pytest.mark.parametrize(("tag", "threshold"), [("two_object", 0.3), ("counting", 0.9)])
def test_a_score_must_pass_the_tasks_threshold(tag: str, threshold: float) -> None:
    boxes = {"kite": [box(score=threshold), box(score=threshold + 1e-6), box(score=threshold - 1e-6)]}
    assert judge([], boxes, tag=tag).kept == {"kite": [1]}
    assert judge([], {"kite": boxes["kite"][:1]}, tag=tag).kept == {}


def test_the_best_sixteen_are_kept_and_then_the_overlapping_dropped() -> None:
    boxes = [box(20 * i, score=0.5 + i / 100) for i in range(18)]
    assert keep(boxes, 0.3) == list(range(17, 1, -1))
    twice = [box(score=0.9)] * 2 + [box(50, score=0.8)]
    assert keep(twice, 0.3, Options(max_objects=2)) == [0, 1]
    assert keep(twice, 0.3, Options(max_objects=2, max_overlap=0.9)) == [0]


def test_overlap_counts_pixels_and_is_dropped_from_the_limit_on() -> None:
    a, b = box(0, size=9), box(5, size=9)  # 10 x 10 pixels each, 5 x 5 of them shared with y 5
    assert iou(a, b) == pytest.approx(50 / 150)
    assert iou(a, box(10, size=9)) == 0
    assert iou([5.0] * 4, [5.0] * 4) == 1
    assert keep([a, b], 0.3, Options(max_overlap=iou(a, b))) == [0]
    assert keep([a, b], 0.3, Options(max_overlap=iou(a, b) + 1e-9)) == [0, 1]
    assert keep([a, a], 0.3) == [0, 1]


@pytest.mark.parametrize(
    ("found", "reason"), [(1, "expected kite>=2, found 1"), (2, ""), (3, ""), (4, "expected kite<4, found 4")]
)
def test_counts(found: int, reason: str) -> None:
    ask = {"include": [{"class": "kite", "count": 2}], "exclude": [{"class": "kite", "count": 4}]}
    judged = judge(detections={"kite": [box(score=0.9 + i / 100) for i in range(found)]}, **ask)
    assert (judged.correct, judged.reason) == (not reason, reason)


def test_colors_are_of_the_best_boxes_only() -> None:
    ask = [{"class": "kite", "count": 2, "color": "red"}]
    boxes = {"kite": [box(score=0.5), box(score=0.7), box(score=0.9)]}
    assert judge(ask, boxes, {"kite": ["blue", "red", "red"]}).correct
    judged = judge(ask, boxes, {"kite": ["red", "red", "blue"]})
    assert judged.reason == "expected red kite>=2, found 1 red; and 1 red, 1 blue"
    judged = judge(ask, boxes, {"kite": ["red", "white", "black"]})
    assert judged.reason == "expected red kite>=2, found 0 red; and 1 black, 1 white"


def test_colors_are_not_asked_in_vain() -> None:
    """Neither where no colour is demanded nor where boxes lack: there are no answers here to be had."""
    judged = judge(
        [{"class": "kite", "count": 1}, {"class": "cow", "count": 2, "color": "red"}], {"kite": [box()], "cow": [box()]}
    )
    assert judged.reason == "expected cow>=2, found 1"


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (-100, 0, ["left of"]),
        (100, 0, ["right of"]),
        (0, -100, ["above"]),
        (0, 100, ["below"]),
        (100, 100, ["below", "right of"]),
        (-100, -100, ["above", "left of"]),
        (100, 58, ["right of"]),  # 56 / 115.6, under a half
        (2, 0, []),  # sizes 10 and 10 take 2 off
        (3.9, 0, []),  # 1.9 / 3.9: the share of the whole offset
        (4.1, 0, ["right of"]),
        (0, 0, []),
    ],
)
def test_relations(x: float, y: float, expected: list[str]) -> None:
    assert relations(box(x, y), box(), 0.1) == expected


def test_every_taken_box_must_stand_so_to_every_target() -> None:
    ask = [{"class": "cow", "count": 2}, {"class": "kite", "count": 2, "position": ["above", 0]}]
    cows = [box(0, 100, score=0.9), box(50, 100, score=0.8)]
    assert judge(ask, {"cow": cows, "kite": [box(0), box(50)]}).correct
    judged = judge(ask, {"cow": cows, "kite": [box(0), box(50, 200)]})
    assert judged.reason == "expected kite above target, found below target"
    judged = judge(ask, {"cow": cows, "kite": [box(0), box(50, 200, score=0.5), box(9, score=0.7)]})
    assert judged.correct  # the third best is not looked at
    judged = judge(ask, {"cow": [*cows[:1], box(0, 0, score=0.8)], "kite": [box(0), box(50)]})
    assert judged.reason == "expected kite above target, found  target"


def test_positions_need_a_target_and_the_rest_of_the_clause() -> None:
    ask = [
        {"class": "cow", "count": 1, "color": "red"},
        {"class": "kite", "count": 1, "color": "blue", "position": ["above", 0]},
        {"class": "cup", "count": 1, "position": ["below", 1]},
    ]
    boxes = {"cow": [box(0, 100)], "kite": [box()], "cup": [box(0, 300)]}
    assert judge(ask, boxes, {"cow": ["red"], "kite": ["blue"]}).correct
    judged = judge(ask, boxes, {"cow": ["pink"], "kite": ["red"]})
    assert judged.reason.splitlines() == [
        "expected red cow>=1, found 0 red; and 1 pink",
        "expected blue kite>=1, found 0 blue; and 1 red",
        "no target for cup to be below",
    ]


# summary


def test_overall_is_the_mean_of_tasks_and_a_prompt_needs_one_image() -> None:
    other = LINES[0] | {"prompt": "another"}
    found = summary(
        [(LINES[2], True), (LINES[0], True), (LINES[0], False), (other, False), (LINES[2], False), (LINES[0], True)]
    )
    assert found.tasks == {"colors": (1, 2), "single_object": (2, 4)}
    assert (found.images, found.prompts, found.correct_images) == (6, 3, 0.5)
    assert found.correct_prompts == pytest.approx(2 / 3)
    uneven = summary([(LINES[0], True), (LINES[2], False), (LINES[2], False)])
    assert uneven.overall == 0.5
    assert report(uneven).splitlines() == [
        "Summary",
        "=======",
        "Total images: 3",
        "Total prompts: 2",
        "% correct images: 33.33%",
        "% correct prompts: 50.00%",
        "",
        "Task breakdown",
        "==============",
        "single_object    = 100.00% (1 / 1)",
        "colors           = 0.00% (0 / 2)",
        "",
        "Overall score (avg. over tasks): 0.50000",
    ]


# masks


def test_a_query_can_be_several_instances_and_scores_are_shared_by_the_mask() -> None:
    logits = torch.full((1, 1, 4, 4), -9.0)
    logits[..., 1:3, :2] = 2.0
    found = instances(torch.tensor([[2.0, 1.0, 0.0]]), logits[0], (4, 4), (4, 4))
    probability = torch.tensor([2.0, 1.0, 0.0]).softmax(0)[:2]
    assert found.labels.tolist() == [0, 1]
    torch.testing.assert_close(found.scores, probability * torch.tensor(2.0).sigmoid())
    assert found.boxes.tolist() == [[0, 1, 2, 3]] * 2
    assert found.masks.sum((1, 2)).tolist() == [4, 4]
    assert len(instances(torch.tensor([[2.0, 1.0, 0.0]]), logits[0], (4, 4), (4, 4), max_per_image=1).labels) == 1


def test_instances_have_the_mask_of_their_query() -> None:
    logits = torch.full((2, 4, 4), -9.0)
    logits[0, 0, 0] = logits[1, 3, 3] = 9.0
    found = instances(
        torch.tensor([[0.0, 5.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0]]), logits, (4, 4), (4, 4), max_per_image=2
    )
    boxes = dict(zip(found.labels.tolist(), found.boxes.tolist(), strict=True))
    assert boxes == {1: [0, 0, 1, 1], 0: [3, 3, 4, 4]}


def test_padding_is_cut_before_masks_are_resized() -> None:
    logits = torch.full((1, 4, 4), -9.0)
    logits[:, :2, 2:] = 9.0  # right of the image, which is 2 wide: padding
    logits[:, 2:, :2] = 9.0
    found = instances(torch.tensor([[1.0, 0.0]]), logits, (4, 2), (8, 4))
    assert found.masks.shape == (1, 8, 4)
    assert found.boxes.tolist() == [[0, 4, 4, 8]]


def test_empty_masks_have_no_box_and_no_score() -> None:
    found = instances(torch.tensor([[1.0, 0.0]]), torch.full((1, 4, 4), -1.0), (4, 4), (4, 4))
    assert found.boxes.tolist() == [[0, 0, 0, 0]]
    assert found.scores.tolist() == [0]
    masks = torch.zeros(2, 3, 5, dtype=torch.bool)
    masks[0, 2, 4] = masks[1, 0, 1] = masks[1, 1, 3] = True
    assert boxes_of(masks).tolist() == [[4, 2, 5, 3], [1, 0, 4, 2]]


@pytest.mark.parametrize(
    ("size", "expected"), [((512, 512), (800, 800)), ((400, 600), (800, 1200)), ((400, 100), (1333, 333))]
)
def test_the_input_is_800_to_1333_and_padded_to_32(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized(*size) == expected
    image = np.full((*size, 3), (255, 0, 128), np.uint8)
    inputs, shape = pixels(image)
    assert shape == expected
    assert inputs.shape[2:] == tuple(-(-side // 32) * 32 for side in expected)
    of = lambda values: (torch.tensor(values) - torch.tensor(mask2former.MEAN)) / torch.tensor(mask2former.STD)  # noqa: E731
    torch.testing.assert_close(inputs[0, :, 0, 0], of([255.0, 0, 128]))
    torch.testing.assert_close(inputs[0, :, shape[0] - 1, shape[1] - 1], of([255.0, 0, 128]))
    if inputs.shape[3] > shape[1]:
        torch.testing.assert_close(inputs[0, :, 0, -1], of([128.0] * 3))


# judges


def random_detector() -> torch.nn.Module:
    """A Mask2Former of 80 classes that finds kites everywhere."""
    torch.manual_seed(0)
    stages = [f"stage{i}" for i in (1, 2, 3, 4)]
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, out_features=stages
    )
    sizes = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32)
    sizes |= dict.fromkeys(("encoder_feedforward_dim", "dim_feedforward"), 16)
    model = network()(
        Mask2FormerConfig(
            backbone_config=backbone,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            num_queries=5,
            num_labels=len(CLASSES),
            **sizes,
        )
    )
    with torch.no_grad():
        model.class_predictor.bias[CLASSES.index("kite")] = 9
    return model.eval()


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("mask2former")
    random_detector().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Name of a CLIP that open_clip knows from a config, and its file of weights."""
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (folder / "lidit-test-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "lidit-test-clip.json")
    torch.manual_seed(0)
    save_file(open_clip.create_model("lidit-test-clip").state_dict(), folder / "weights.safetensors")
    return "lidit-test-clip", str(folder / "weights.safetensors")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A detector's input of 64 instead of 800 pixels."""
    monkeypatch.setattr(mask2former, "SHORT_SIDE", 64)
    monkeypatch.setattr(mask2former, "LONG_SIDE", 107)


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of three prompts, taken for the official ones."""
    monkeypatch.setattr(geneval, "GIT_BLOB", None)
    path = tmp_path / "prompts"
    path.mkdir()
    (path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def draw(run: Path, paths: list[str]) -> None:
    rng = np.random.default_rng(0)
    for path in paths:
        (run / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(run / path)


def image(height: int = 48, width: int = 64) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_the_detector_is_transformers_own_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    """Whose weights it reads, training loss and all, and whose outputs it takes to instances."""
    monkeypatch.setattr(modeling_mask2former, "requires_backends", lambda *_: None)  # scipy, for the loss alone
    ours = random_detector()
    real = modeling_mask2former.Mask2FormerForUniversalSegmentation(ours.config).eval()
    assert {key for key in real.state_dict() if key not in ours.state_dict()} == {"criterion.empty_weight"}
    real.load_state_dict(ours.state_dict(), strict=False)
    real.save_pretrained(tmp_path)
    found = Mask2Former(str(tmp_path), len(CLASSES))(image(40, 60))
    inputs, shape = pixels(image(40, 60))
    with torch.no_grad():
        outputs = real(pixel_values=inputs)
    assert inputs.shape[2:] == (64, 96)
    masks = torch.nn.functional.interpolate(
        outputs.masks_queries_logits, (64, 96), mode="bilinear", align_corners=False
    )
    expected = instances(outputs.class_queries_logits[0], masks[0], shape, (40, 60))
    assert found.masks.shape[1:] == (40, 60)
    torch.testing.assert_close(found.scores, expected.scores)
    assert torch.equal(found.boxes, expected.boxes)


def test_a_run_is_scored(tmp_path: Path, prompts: Path, detector: str, clip: tuple[str, str], small: None) -> None:
    pictures = [picture.path for picture in suite(prompts).pictures]
    assert len(pictures) == 12
    draw(tmp_path / "run", [pictures[0], pictures[1], pictures[5], pictures[8], pictures[9], pictures[10]])
    found = score(tmp_path / "run", prompts, detector, *clip, allow_missing=True)
    assert json.loads(json.dumps(found)) == found
    assert found["name"] == NAME
    assert (found["images_demanded"], found["images_scored"]) == (12, 6)
    red = [one["correct"] for one in found["images"][3:]]
    assert found["scores"] == {
        "single_object": pytest.approx(2 / 3),
        "colors": pytest.approx(sum(red) / 3),
        "overall": pytest.approx((2 / 3 + sum(red) / 3) / 2),
    }
    kite, cow, colored = found["images"][0], found["images"][2], found["images"][3]
    assert kite["correct"]
    assert set(kite["boxes"]) == {"kite"}
    assert (cow["correct"], cow["reason"]) == (False, "expected cow>=1, found 0")
    assert colored["correct"] or colored["reason"].startswith("expected red kite>=1, found 0 red; and 1 ")
    assert found["judges"] == {"detector": detector, "color": {"name": clip[0], "pretrained": clip[1]}}


def test_missing_and_broken_images_are_named(
    tmp_path: Path, prompts: Path, detector: str, clip: tuple[str, str], small: None
) -> None:
    draw(tmp_path / "run", ["00000/samples/0000.png"])
    with pytest.raises(BenchmarkError, match=r"1 of 12 images; the first missing one is 00000/samples/0001.png"):
        score(tmp_path / "run", prompts, detector, *clip)
    (tmp_path / "run/00000/samples/0000.png").write_text("no image")
    with pytest.raises(BenchmarkError, match=r"00000/samples/0000.png cannot be read"):
        score(tmp_path / "run", prompts, detector, *clip, allow_missing=True)


def test_colors_come_from_what_is_under_the_mask() -> None:
    picture, mask = image(), np.zeros((48, 64), bool)
    mask[10:20, 5:9] = True
    mask[10, 5] = False
    part = cut_out(picture, mask, [5, 10, 9, 20])
    assert part.shape == (10, 4, 3)
    assert part[0, 0].tolist() == [0x99] * 3
    assert np.array_equal(part[1:], picture[11:20, 5:9])


def test_the_nearest_text_names_the_color(clip: tuple[str, str]) -> None:
    color = ColorClassifier(OpenCLIP(*clip))
    texts = color.texts("tv remote")
    model, preprocess = open_clip.create_model_from_pretrained(*clip)
    pink = ["a photo of a pink tv remote", "a photo of a pink-colored tv remote", "a photo of a pink object"]
    with torch.no_grad():
        each = model.encode_text(open_clip.get_tokenizer(clip[0])(pink))
        mean = (each / each.norm(dim=1, keepdim=True)).mean(0)
        seen = model.encode_image(preprocess(Image.fromarray(image()))[None])[0]
    torch.testing.assert_close(texts[6], mean / mean.norm())
    assert torch.allclose(texts.norm(dim=1), torch.ones(10))
    for i, name in ((0, "red"), (6, "pink"), (9, "white")):
        color._texts["kite"] = -torch.ones(10, 1) * seen
        color._texts["kite"][i] *= -1
        assert color(image(), np.ones((48, 64), bool), [0, 0, 64, 48], "kite") == name


def test_wrong_detectors_are_refused(tmp_path: Path, detector: str) -> None:
    with pytest.raises(BenchmarkError, match="80 classes; name a Mask2Former for instances of 81"):
        Mask2Former(detector, 81)
    with pytest.raises(BenchmarkError, match="cannot be loaded as a Mask2Former"):
        Mask2Former(str(tmp_path / "nowhere"), 80)
    for name in os.listdir(detector):
        (tmp_path / name).write_bytes((Path(detector) / name).read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["class_predictor.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BenchmarkError, match=r"lacks class_predictor.bias"):
        Mask2Former(str(tmp_path), 80)


def test_without_its_clip_nothing_is_judged(tmp_path: Path, prompts: Path, detector: str) -> None:
    draw(tmp_path / "run", ["00000/samples/0000.png"])
    with pytest.raises(BenchmarkError, match="no-such-tag"):
        score(tmp_path / "run", prompts, detector, color_weights="no-such-tag", allow_missing=True)


# prompts


def test_the_layout_is_the_authors(prompts: Path) -> None:
    made = suite(prompts)
    assert made.name == "geneval"
    assert [picture.path for picture in made.pictures[3:5]] == ["00000/samples/0003.png", "00001/samples/0000.png"]
    assert [picture.sample for picture in made.pictures[:5]] == [0, 1, 2, 3, 0]
    assert made.pictures[-1].prompt == "a photo of a red kite"
    assert {path: json.loads(text) for path, text in made.files.items()} == {
        f"0000{i}/metadata.jsonl": line for i, line in enumerate(LINES)
    }


@needs_prompts
def test_the_published_prompts_are_read_and_altered_ones_refused(tmp_path: Path) -> None:
    assert len(suite(PROMPTS_DIR).pictures) == 553 * 4
    text = (PROMPTS_DIR / "evaluation_metadata.jsonl").read_text()
    (tmp_path / "evaluation_metadata.jsonl").write_text(text.replace("a photo of a bench", "a photo of a wench", 1))
    with pytest.raises(BenchmarkError, match="is not the benchmark's file"):
        suite(tmp_path)
    with pytest.raises(
        BenchmarkError, match=r"evaluation_metadata.jsonl is missing; get it from https://github.com/djgh"
    ):
        suite(tmp_path / "nowhere")


@needs_prompts
def test_classes_are_the_authors_in_their_order() -> None:
    assert list(CLASSES) == (PROMPTS_DIR / "object_names.txt").read_text().splitlines()


def test_classes_are_80() -> None:
    assert len(set(CLASSES)) == 80
    assert (CLASSES[0], CLASSES[64:67], CLASSES[79]) == (
        "person",
        ("computer mouse", "tv remote", "computer keyboard"),
        "toothbrush",
    )
