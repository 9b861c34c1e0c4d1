"""T2I-CompBench is asked, multiplied and averaged as by its authors, and what was left out is said."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lidit.eval import t2i_compbench
from lidit.eval.spatial import Detection
from lidit.eval.suite import BenchmarkError
from lidit.eval.t2i_compbench import (
    product,
    prompts_of,
    questions,
    score,
    suite,
    template_chunks,
    template_nouns,
    template_pairs,
)
from lidit.eval.t2i_golden import GOLDEN, spatial2d_mean

SHARED = Path(os.environ.get("LIDIT_SHARED", Path(__file__).parents[2] / "../shared"))
needs_prompts = pytest.mark.skipif(not (SHARED / "data/t2i_compbench").is_dir(), reason="no data in LIDIT_SHARED")
needs_golden = pytest.mark.skipif(not (SHARED / "data/golden").is_dir(), reason="no golden cases in LIDIT_SHARED")

PROMPTS = {
    "color": ["a red bench and a blue car", "A bathroom with white tile."],
    "shape": ["a round cup and a square box", "an oval sink and a tall mirror."],
    "texture": ["a wooden desk and a glass jar", "a metallic key and a fabric hat"],
    "spatial": ["a cat on the left of a man", "a dog near a bee"],
}


def cases(name: str) -> list[dict]:
    path = SHARED / "data/golden" / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@needs_golden
@pytest.mark.parametrize("name", GOLDEN)
def test_no_golden_case_differs(name: str) -> None:
    found = list(GOLDEN[name](cases(name)))
    assert len(found) == len(cases(name)) > 0
    assert [(case, difference) for case, difference in found if difference] == []


def altered(name: str, case: dict) -> None:
    if name == "t2i_blipvqa_cases.jsonl":
        case["images"][0]["yes_prob"] = {}
        case["expected"]["score"] += 1e-6
    elif name == "t2i_spatial2d_cases.jsonl":
        case["expected"]["score"] += 1e-4
    elif name == "t2i_yesprob_cases.jsonl":
        case["logit_yes"] -= 1
        case["expected_float"] += 1e-4
    else:
        case["expected"] = "other" if name == "t2i_question_cases.jsonl" else case["expected"] + 1e-4


@needs_golden
@pytest.mark.parametrize("name", GOLDEN)
def test_an_altered_golden_case_is_found(name: str) -> None:
    changed = cases(name)
    altered(name, changed[1])
    (case, difference), *_ = [found for found in GOLDEN[name](changed) if found[1]]
    assert case == changed[1]["id"]
    assert "expected" in difference


@needs_golden
def test_the_mean_of_the_spatial_cases() -> None:
    found = cases("t2i_spatial2d_cases.jsonl")
    mean = float(np.mean([case["expected"]["score"] for case in found]))
    assert spatial2d_mean(mean, found) is None
    assert spatial2d_mean(mean + 1e-3, found)


def test_questions_are_noun_chunks_without_places() -> None:
    chunks = ["top", "The left", "the left", "a Red car", "the top", "the side", "the right", "it"]
    assert questions(chunks, 8) == ["The left?", "a Red car?", "the top?", "it?", "", "", "", ""]
    assert questions(chunks, 2) == ["The left?", "a Red car?"]
    assert questions([], 2) == ["", ""]


def test_probabilities_are_rounded_before_and_after_they_are_multiplied() -> None:
    assert product([0.00004, 1.0]) == 0.0
    assert product([0.5, 0.50004]) == 0.25
    assert product([0.0149, 0.0149]) == 0.0002
    assert product([]) == 1.0


@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        ("a red bench and a blue cell phone", ["a red bench", "a blue cell phone"]),
        ("an oval sink and a rectangular mirror.", ["an oval sink", "a rectangular mirror"]),
        ("a triangular slice of bread and a square plate", None),
        ("a red apple and yellow bananas", None),
        ("rubber gloves and a fluffy teddy bear", None),
        ("The round knob and the square plate were attached to the door.", None),
        ("a black and white cat", None),
        ("", None),
    ],
)
def test_the_template_reads_its_form_and_nothing_else(prompt: str, chunks: list[str] | None) -> None:
    assert template_chunks(prompt) == chunks


def test_pairs_and_spatial_nouns() -> None:
    assert template_pairs("an oval sink and a tall book stand") == [("an", "oval", "sink"), ("a", "tall", "book stand")]
    assert template_nouns("a bee on the right of an airplane") == ["bee", "airplane"]
    assert template_nouns("a bee on side of a key") == ["bee", "key"]
    assert template_nouns("a bee in front of a key") is None


def blob(text: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()


@pytest.fixture
def prompts_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two prompts a category in the place of 300, published as the authors do: CRLF, none after the last line."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    for category, prompts in PROMPTS.items():
        name, text = f"{category}_val.txt", "\r\n".join(prompts).encode()
        (folder / name).write_bytes(text)
        monkeypatch.setitem(t2i_compbench.GIT_BLOBS, name, blob(text))
    return folder


def drawn(run: Path, prompts_dir: Path, categories: list[str] | None = None) -> Path:
    """A run of it, its images 8 x 8 and each of one grey that says which it is."""
    wanted = suite(prompts_dir, categories or list(PROMPTS))
    for relative, content in wanted.files.items():
        (run / relative).parent.mkdir(parents=True, exist_ok=True)
        (run / relative).write_text(content)
    for picture in wanted.pictures:
        (run / picture.path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (int(Path(picture.path).stem),) * 3).save(run / picture.path)
    return run


class StubJudge:
    """Says yes with 0.9 to the first prompt's images and 0.5 to the second's, whatever the question."""

    def __init__(self, name: str, device: str):
        self.name = name

    def __call__(self, image: np.ndarray, questions: list[str]) -> list[float]:
        return [0.9 if image[0, 0, 0] < 10 else 0.5] * len(questions)

    def describe(self) -> dict:
        return {"name": self.name}


class StubDetector(StubJudge):
    """Finds two things beside each other."""

    def __init__(self, name: str, threshold: float, device: str):
        self.name = "t2i-spatial-stub"

    def __call__(self, image: np.ndarray, labels: list[str]) -> list[Detection]:
        boxes = ([0.0, 0.0, 9.0, 9.0], [300.0, 0.0, 309.0, 9.0])
        return [Detection(label, box, 0.8) for label, box in zip(labels, boxes, strict=True)]


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(t2i_compbench, "BlipVQA", StubJudge)
    monkeypatch.setattr(t2i_compbench, "Detector", StubDetector)


def test_ten_samples_of_each_prompt_are_drawn_in_the_official_order(prompts_dir: Path) -> None:
    wanted = suite(prompts_dir, ("shape", "spatial"))
    assert [p.sample for p in wanted.pictures[:20]] == [*range(10), *range(10)]
    assert wanted.pictures[13].path == "shape/samples/000013.png"
    assert wanted.pictures[13].prompt == PROMPTS["shape"][1]
    assert wanted.pictures[20].path == "spatial/samples/000000.png"
    assert len({p.path for p in wanted.pictures}) == 40
    assert [Path(path).name for path in wanted.sources] == ["shape_val.txt", "spatial_val.txt"]
    assert json.loads(wanted.files["prompts.json"])["prompts"] == {c: PROMPTS[c] for c in ("shape", "spatial")}


@needs_prompts
def test_the_published_prompts_are_300_a_category_and_two_thirds_are_templated() -> None:
    folder = SHARED / "data/t2i_compbench"
    assert len(suite(folder).pictures) == 12000
    parsed = {
        c: [(template_nouns if c == "spatial" else template_chunks)(p) for p in prompts_of(folder, f"{c}_val.txt")[0]]
        for c in PROMPTS
    }
    assert {c: sum(map(bool, found)) for c, found in parsed.items()} == {
        "color": 236,
        "shape": 219,
        "texture": 197,
        "spatial": 300,
    }
    old = prompts_of(folder, "color_val_2024-06.txt")[0]
    assert (len(old), len(set(old))) == (300, 295)
    assert (
        suite(folder, ["color"], "color_val_2024-06.txt").pictures[2270].prompt != suite(folder).pictures[2270].prompt
    )


def test_line_ends_do_not_matter_and_words_do(prompts_dir: Path) -> None:
    path = prompts_dir / "color_val.txt"
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n") + b"\n")
    assert prompts_of(prompts_dir, "color_val.txt")[0] == PROMPTS["color"]
    path.write_bytes(path.read_bytes().replace(b"red", b"pink"))
    with pytest.raises(
        BenchmarkError, match=r"color_val.txt is not the benchmark's file: git hash-object .* get it from"
    ):
        suite(prompts_dir)
    path.unlink()
    with pytest.raises(BenchmarkError, match=r"color_val.txt is missing; get it from https://github.com/Karine-Huang"):
        suite(prompts_dir)


def test_a_category_is_named_once() -> None:
    for categories in ([], ["color", "color"]):
        with pytest.raises(BenchmarkError, match="name one or more categories"):
            suite(Path("unused"), categories)


def test_unparsed_prompts_are_refused_or_left_out_and_named(tmp_path: Path, prompts_dir: Path, stubs: None) -> None:
    run = drawn(tmp_path / "run", prompts_dir)
    with pytest.raises(
        BenchmarkError, match=r"1 prompts cannot be parsed by .* for example 'A bathroom with white tile.'"
    ):
        score(run, prompts_dir)
    result = score(run, prompts_dir, allow_unparsed=True)
    half = (0.81 + 0.25) / 2
    assert [result["scores"][f"color {name}"] for name in ("np2", "np8")] == pytest.approx([0.81, 0.81])
    assert [result["scores"][f"shape {name}"] for name in ("np2", "np8")] == pytest.approx([half, half])
    assert result["scores"]["attributes np2"] == pytest.approx((0.81 + 0.53 + 0.53) / 3)
    assert result["scores"]["spatial t2i-spatial-stub"] == pytest.approx(0.9)
    assert result["images"]["color"] == {"demanded": 20, "found": 20, "scored": 10}
    assert result["images"]["shape"] == {"demanded": 20, "found": 20, "scored": 20}
    assert result["noun_phrases"] == {
        "parser": "template",
        "parsed": 7,
        "unparsed": 1,
        "unparsed_prompts": [["color", "A bathroom with white tile."]],
    }
    assert result["images_scored"] < result["images_demanded"]
    assert len(result["details"]) == 70
    json.dumps(result)


def test_missing_images_are_refused_or_counted(tmp_path: Path, prompts_dir: Path, stubs: None) -> None:
    run = drawn(tmp_path / "run", prompts_dir, ["shape", "texture"])
    complete = score(run, prompts_dir)
    assert complete["images_scored"] == complete["images_demanded"]
    assert not any(name.startswith("attributes") for name in complete["scores"])
    for sample in range(10):
        (run / f"shape/samples/{sample:06d}.png").unlink()
    with pytest.raises(
        BenchmarkError, match=r"holds 30 of 40 images; the first missing one is shape/samples/000000.png"
    ):
        score(run, prompts_dir)
    result = score(run, prompts_dir, allow_missing=True)
    assert result["images"]["shape"] == {"demanded": 20, "found": 10, "scored": 10}
    assert result["scores"]["shape np8"] == pytest.approx(0.25)
    assert result["images_scored"] < result["images_demanded"]
    for sample in range(10, 20):
        (run / f"shape/samples/{sample:06d}.png").unlink()
    assert "shape np2" not in score(run, prompts_dir, allow_missing=True)["scores"]


def test_an_unreadable_image_is_named(tmp_path: Path, prompts_dir: Path, stubs: None) -> None:
    run = drawn(tmp_path / "run", prompts_dir, ["shape"])
    (run / "shape/samples/000007.png").write_bytes(b"no image")
    with pytest.raises(BenchmarkError, match="000007.png cannot be read"):
        score(run, prompts_dir)


def test_a_run_of_other_prompts_is_refused(tmp_path: Path, prompts_dir: Path, stubs: None) -> None:
    run = drawn(tmp_path / "run", prompts_dir, ["shape"])
    listed = json.loads((run / "prompts.json").read_text())
    listed["prompts"]["shape"].reverse()
    (run / "prompts.json").write_text(json.dumps(listed))
    with pytest.raises(BenchmarkError, match="lists other prompts than"):
        score(run, prompts_dir)
    (run / "prompts.json").write_text("{")
    with pytest.raises(BenchmarkError, match="missing or damaged"):
        score(run, prompts_dir)
    (run / "prompts.json").unlink()
    with pytest.raises(BenchmarkError, match="missing or damaged"):
        score(run, prompts_dir)


def test_both_scales_come_from_one_pass(tmp_path: Path, prompts_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Judge(StubJudge):
        def __call__(self, image: np.ndarray, questions: list[str]) -> list[float]:
            asked.append(questions)
            return [0.9, 0.8, 0.5]

    monkeypatch.setattr(t2i_compbench, "BlipVQA", Judge)
    monkeypatch.setattr(t2i_compbench, "template_chunks", lambda prompt: ["a cup", "the side", "a box", "a lid"])
    result = score(drawn(tmp_path / "run", prompts_dir, ["shape"]), prompts_dir)
    assert asked == [["a cup?", "a box?", "a lid?"]] * 20
    assert [result["scores"][f"shape {name}"] for name in ("np2", "np8")] == pytest.approx([0.72, 0.36])


class StubSpacy:
    """In the place of spaCy: every word a chunk, words of more than two letters nouns."""

    __version__ = "0.0"

    def load(self, name: str):
        def read(prompt: str) -> SimpleNamespace:
            words = [SimpleNamespace(text=w, pos_="NOUN" if len(w) > 2 else "DET") for w in prompt.split()]
            return Doc(words)

        read.meta = {"version": name}
        return read


class Doc(list):
    @property
    def noun_chunks(self) -> list[SimpleNamespace]:
        return self


def test_spacy_reads_every_prompt(
    tmp_path: Path, prompts_dir: Path, stubs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "spacy", StubSpacy())
    result = score(drawn(tmp_path / "run", prompts_dir, ["color", "spatial"]), prompts_dir, noun_phrases="spacy")
    assert result["noun_phrases"]["spacy"] == "0.0"
    assert result["noun_phrases"]["unparsed"] == 0
    assert result["images_scored"] == result["images_demanded"]
    assert result["details"][10]["questions"] == ["A?", "bathroom?", "with?", "white?", "tile.?"]
    assert result["details"][20]["objects"] == ["cat", "man"]


def test_spacy_must_be_installed(tmp_path: Path, prompts_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = drawn(tmp_path / "run", prompts_dir, ["color"])
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(BenchmarkError, match="spaCy is not installed; pip install spacy"):
        score(run, prompts_dir, noun_phrases="spacy")
