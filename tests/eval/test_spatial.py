"""The 2D-spatial rule is the official one, and detectors of transformers give it boxes in its pixels."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizerFast,
    CLIPTokenizerFast,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    SwinConfig,
)

from lidit.eval import t2i_compbench
from lidit.eval.spatial import Detection, Detector, iou, label_of, position, relation_of, resized, spatial_score
from lidit.eval.suite import BenchmarkError

LEFT, RIGHT = [0.0, 200.0, 20.0, 220.0], [300.0, 200.0, 320.0, 220.0]
ABOVE, BELOW = [200.0, 0.0, 220.0, 20.0], [200.0, 300.0, 220.0, 320.0]


@pytest.mark.parametrize(
    ("relation", "box1", "box2"),
    [
        ("on the left of", LEFT, RIGHT),
        ("on the right of", RIGHT, LEFT),
        ("on the top of", ABOVE, BELOW),
        ("on the bottom of", BELOW, ABOVE),
    ],
)
def test_a_direction_holds_one_way(relation: str, box1: list[float], box2: list[float]) -> None:
    assert position(relation, box1, box2) == 1.0
    assert position(relation, box2, box1) == 0.0
    sideways = [[b[1], b[0], b[3], b[2]] for b in (box1, box2)]
    assert position(relation, *sideways) == 0.0


def test_a_direction_needs_the_longer_axis_strictly() -> None:
    assert position("on the left of", [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]) == 0.0
    assert position("on the left of", [0.0, 0.0, 10.0, 10.0], [50.0, 49.0, 60.0, 59.0]) == 1.0


def test_overlap_softens_a_direction() -> None:
    box1, box2 = [0.0, 0.0, 100.0, 100.0], [50.0, 0.0, 150.0, 100.0]
    assert iou(box1, box2) == pytest.approx(1 / 3)
    assert position("on the left of", box1, box2) == pytest.approx(0.3)
    assert position("on the left of", box1, box2, iou_threshold=0.5) == 1.0


@pytest.mark.parametrize("relation", ["near", "next to", "on side of"])
def test_near_on_one_axis_is_near(relation: str) -> None:
    box = [0.0, 0.0, 10.0, 10.0]
    assert position(relation, box, [149.0, 400.0, 159.0, 410.0]) == 1.0
    assert position(relation, box, [150.0, 300.0, 160.0, 310.0]) == pytest.approx(0.5)
    assert position(relation, box, [150.0, 300.0, 160.0, 310.0], distance_threshold=151.0) == 1.0


@pytest.mark.parametrize("relation", ["on top of", "in front of", None])
def test_other_relations_never_hold(relation: str | None) -> None:
    assert position(relation, ABOVE, BELOW) == 0.0


def test_boxes_without_area_do_not_divide_by_zero() -> None:
    point = [5.0, 5.0, 5.0, 5.0]
    assert iou(point, point) == 0.0
    assert position("on the left of", point, [9.0, 5.0, 9.0, 5.0]) == 1.0


def test_the_first_listed_relation_is_found_as_a_substring() -> None:
    assert relation_of("a cat on top of a dog") == "on top of"
    assert relation_of("a cat on the top of a dog") == "on the top of"
    assert relation_of("a cat on the left of a dog nearby") == "near"
    assert relation_of("a cat and a dog") is None


def test_people_are_persons() -> None:
    assert [label_of(noun) for noun in ("girl", "boy", "man", "woman", "child")] == ["person"] * 4 + ["child"]


def found(*labels: tuple[str, list[float], float]) -> list[Detection]:
    return [Detection(*each) for each in labels]


def test_the_score_adds_both_scores_and_the_position() -> None:
    both = found(("cat", LEFT, 0.9), ("person", RIGHT, 0.7))
    assert spatial_score("a cat on the left of a man", ["cat", "left", "man"], both) == pytest.approx(0.9)


def test_scores_under_a_half_become_none() -> None:
    wrong = found(("cat", RIGHT, 0.9), ("dog", LEFT, 0.9))
    assert spatial_score("a cat on the left of a dog", ["cat", "dog"], wrong) == 0.0
    sure = found(("cat", RIGHT, 1.0), ("dog", LEFT, 1.0))
    assert spatial_score("a cat on the left of a dog", ["cat", "dog"], sure) == 0.5
    assert spatial_score("a cat on the left of a dog", ["cat", "dog"], sure[:1]) == 0.0
    assert spatial_score("a cat on the left of a dog", ["cat", "dog"], []) == 0.0


def test_the_first_box_of_a_label_counts() -> None:
    boxes = found(("cat", RIGHT, 0.6), ("cat", LEFT, 0.9), ("dog", [150.0, 200.0, 170.0, 220.0], 0.6))
    prompt, nouns = "a cat on the right of a dog", ["cat", "dog"]
    assert spatial_score(prompt, nouns, boxes) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((512, 512), (479, 479)), ((479, 479), (479, 479)), ((512, 768), (320, 480)), ((958, 956), (480, 479))],
)
def test_the_detectors_pixels(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized(*size) == expected


TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def clip_tokenizer(folder: Path) -> CLIPTokenizerFast:
    letters = [chr(c) for c in range(97, 123)]
    # OWLv2 takes a query that starts with token 0 for none
    words = ["!", "<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizerFast.from_pretrained(folder, model_max_length=32)


@pytest.fixture(scope="module")
def owlv2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("owlv2")
    tokenizer = clip_tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    config = Owlv2Config(
        text_config=TEXT
        | {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2},
        vision_config=TEXT | {"image_size": 64, "patch_size": 16},
        projection_dim=16,
    )
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessor(size={"height": 64, "width": 64}), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "traffic", "light", "person", "cat", "?"]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}, do_lower_case=True)
    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = GroundingDinoConfig(
        backbone_config=swin,
        text_config=TEXT | {"model_type": "bert", "vocab_size": len(tokenizer)},
        d_model=32, encoder_layers=1, decoder_layers=2, num_queries=10, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    processor = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    GroundingDinoProcessor(processor, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(params=["owlv2", "dino"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def picture(height: int = 60, width: int = 90) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_detections_are_sorted_labelled_and_inside(folder: Path) -> None:
    detections = Detector(str(folder), threshold=0.0)(picture(), ["person", "cat", "person"])
    assert detections
    scores = [detection.score for detection in detections]
    assert scores == sorted(scores, reverse=True)
    assert {detection.label for detection in detections} <= {"person", "cat"}
    for x1, y1, x2, y2 in (detection.box for detection in detections):
        assert 0 <= x1 <= x2 <= 480
        assert 0 <= y1 <= y2 <= 320


def test_the_threshold_is_strict(folder: Path) -> None:
    every = Detector(str(folder), threshold=0.0)(picture(), ["person", "cat"])
    cut = Detector(str(folder), threshold=every[0].score)(picture(), ["person", "cat"])
    assert cut == []


class Fixed:
    """In the place of a model: one query's logits and box."""

    def __init__(self, logits: list[list[float]], boxes: list[list[float]]):
        self.logits, self.pred_boxes = torch.tensor([logits]), torch.tensor([boxes])

    def __call__(self, **_: object) -> Fixed:
        return self


def with_answers(folder: Path, logits: list[list[float]], boxes: list[list[float]]) -> Detector:
    detector = Detector(str(folder))
    detector._model = Fixed(logits, boxes)
    return detector


def test_owlv2s_boxes_are_shares_of_the_padded_square(owlv2: Path) -> None:
    detector = with_answers(owlv2, [[2.0, 0.0], [-9.0, 1.0]], [[0.5, 0.25, 1.0, 0.5], [0.25, 0.25, 0.5, 0.5]])
    first, second = detector(picture(100, 200), ["cat", "person"])  # 240 x 480 in the rule's pixels
    assert (first.label, second.label) == ("cat", "person")
    assert first.score == pytest.approx(torch.tensor(2.0).sigmoid().item())
    np.testing.assert_allclose(first.box, [0, 0, 480, 240])
    np.testing.assert_allclose(second.box, [0, 0, 240, 240])


def test_grounding_dinos_labels_are_those_of_their_best_token(dino: Path) -> None:
    # [CLS] traffic light . person . [SEP]: special tokens and full stops never name a box
    logits = [[9.0, -9.0, 1.0, 9.0, 0.5, 9.0, 9.0, 9.0], [9.0, -9.0, 1.0, 9.0, 2.0, 9.0, 9.0, 9.0]]
    detector = with_answers(dino, logits, [[0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.5, 1.0]])
    first, second = detector(picture(100, 200), ["traffic light", "person"])
    assert (first.label, second.label) == ("person", "traffic light")
    assert second.score == pytest.approx(torch.tensor(1.0).sigmoid().item())
    np.testing.assert_allclose(second.box, [0, 0, 480, 240])
    np.testing.assert_allclose(first.box, [0, 0, 240, 240])


def test_scores_are_named_after_the_detector(owlv2: Path, dino: Path) -> None:
    assert Detector(str(owlv2)).name == "t2i-spatial-owlv2"
    described = Detector(str(dino), threshold=0.3).describe()
    assert described == {"name": "t2i-spatial-grounding-dino", "model": str(dino), "threshold": 0.3}


def test_what_cannot_detect_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="cannot be loaded as a detector"):
        Detector(str(tmp_path / "nowhere"))
    SwinConfig().save_pretrained(tmp_path)
    with pytest.raises(BenchmarkError, match="is a swin model; name a detector of these kinds: owlv2"):
        Detector(str(tmp_path))


def test_a_run_is_scored_by_a_real_detector(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"a cat on the left of a man"
    blob = hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()
    monkeypatch.setitem(t2i_compbench.GIT_BLOBS, "spatial_val.txt", blob)
    (tmp_path / "spatial_val.txt").write_bytes(text)
    wanted = t2i_compbench.suite(tmp_path, ["spatial"])
    (tmp_path / "spatial/samples").mkdir(parents=True)
    (tmp_path / "prompts.json").write_text(wanted.files["prompts.json"])
    for each in wanted.pictures:
        Image.fromarray(picture()).save(tmp_path / each.path)
    result = t2i_compbench.score(tmp_path, tmp_path, detector=str(folder), detector_threshold=0.0)
    name = result["judges"]["spatial"]["name"]
    assert set(result["scores"]) == {f"spatial {name}"}
    boxes = Detector(str(folder), threshold=0.0)(picture(), ["cat", "person"])
    assert result["scores"][f"spatial {name}"] == pytest.approx(spatial_score(text.decode(), ["cat", "man"], boxes))
    json.dumps(result)
