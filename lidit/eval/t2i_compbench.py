"""T2I-CompBench (Huang et al., 2023): colour, shape and texture by BLIP-VQA, 2D-spatial by a detector.

A category has 300 prompts, with ten images of each. The official name of an image is `PROMPT_NNNNNN.png`, and the
official scripts read the prompt from the name, which fails for prompts with "_" or "/" or of more than 255 bytes. Here
image N of a category is `CATEGORY/samples/NNNNNN.png`, with the official N = 10 x prompt + sample, and `prompts.json`
in the run folder lists the prompts.

Attribute scores depend on how many noun phrases of a prompt are multiplied: 2 was the default of the authors' code
until December 2023, and 8 is the default since then and in their tables. Published numbers mix both, so we give both:
`np2` and `np8`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lidit.eval.blip_vqa import BlipVQA, four_decimals
from lidit.eval.spatial import Detection, Detector, label_of, relation_of, spatial_score
from lidit.eval.suite import BenchmarkError, Picture, Suite, present, prompt_file, read_image

Category = Literal["color", "shape", "texture", "spatial"]
ColorFile = Literal["color_val.txt", "color_val_2024-06.txt"]
Parser = Literal["template", "spacy"]

ATTRIBUTES = ("color", "shape", "texture")
PUBLISHED = "https://github.com/Karine-Huang/T2I-CompBench, examples/dataset"
# git hash-object of the published files: lines end in CRLF, and the last line, but for shape_val.txt, in nothing
GIT_BLOBS = {
    "color_val.txt": "700badf7bd0989c45eb307ff3573f127ecee0a53",
    "color_val_2024-06.txt": "d1d3fa492f98454f118aef1ae2f08b369fbfe8f6",
    "shape_val.txt": "b82835d72b25c2aa2962736f091fe04ee6a39a21",
    "texture_val.txt": "61d35c8e7127e530f221780fd117c905315ce00a",
    "spatial_val.txt": "e453b999d311ddc47f303d389db02818b63a256c",
}
IMAGES_PER_PROMPT = 10
SCALES = {"np2": 2, "np8": 8}
DROPPED = ("top", "the side", "the left", "the right")  # noun chunks that are not objects
SPACY_MODEL = "en_core_web_sm"
PAIR = re.compile(r"(an?) ([\w-]+) ([\w' -]+?) and (an?) ([\w-]+) ([\w' -]+)\.?")
SPLITTING = {
    "of",
    "with",
    "in",
    "on",
    "for",
    "by",
    "to",
}  # words that split a noun phrase into chunks: "a slice of bread"
RELATED = re.compile(
    r"an? (\w+) (?:on side of|next to|near|on the (?:left|right|bottom|top) of|on top of) an? (\w+)\.?"
)


Key = tuple[str, str]  # category, prompt


@dataclass(frozen=True)
class Reader:
    """A parser: what a result says about it, and how to get a prompt's noun chunks and nouns (None: unparsed)."""

    about: dict[str, str]
    chunks: Callable[[str], list[str] | None]
    nouns: Callable[[str], list[str] | None]


def questions(noun_chunks: Sequence[str], np_num: int) -> list[str]:
    """The np_num questions about an image, spelt as in the prompt; missing questions are ''."""
    asked = [f"{chunk}?" for chunk in noun_chunks if chunk not in DROPPED][:np_num]
    return asked + [""] * (np_num - len(asked))


def product(probabilities: Sequence[float]) -> float:
    """An image's score from its questions' p(yes): rounded to 4 decimals, multiplied in float32, rounded again.

    An empty question counts as 1, and so the score without questions is 1.
    """
    score = np.float32(1)
    for probability in probabilities:
        score *= np.float32(f"{probability:.4f}")
    return float(f"{score:.4f}")


def template_pairs(prompt: str) -> list[tuple[str, str, str]] | None:
    """(article, adjective, noun) of both halves of "a ADJ NOUN and a ADJ NOUN[.]", or None for other prompts."""
    found = PAIR.fullmatch(prompt)
    if not found or SPLITTING & set(prompt.split()):
        return None
    return [found.group(1, 2, 3), found.group(4, 5, 6)]


def template_chunks(prompt: str) -> list[str] | None:
    """Both noun phrases of "a ADJ NOUN and a ADJ NOUN", or None for other prompts."""
    pairs = template_pairs(prompt)
    return [" ".join(pair) for pair in pairs] if pairs else None


def template_nouns(prompt: str) -> list[str] | None:
    """The two objects of "a NOUN RELATION a NOUN", or None for other prompts."""
    found = RELATED.fullmatch(prompt)
    return list(found.groups()) if found else None


def suite(
    prompts_dir: Path,
    categories: Sequence[Category] = ("color", "shape", "texture", "spatial"),
    color_file: ColorFile = "color_val.txt",
) -> Suite:
    """The pictures to draw: 10 x 300 for each category.

    Args:
        prompts_dir: folder with CATEGORY_val.txt from the authors' examples/dataset.
        categories: categories to draw.
        color_file: color_val.txt as it is since September 2025 or, for numbers of 2024, as it was before five
            duplicates were replaced (commit 5c4ae15), saved as color_val_2024-06.txt.

    Raises:
        BenchmarkError: a file is missing or is not the published one, or a category is named twice.
    """
    if not categories or len(set(categories)) < len(categories):
        raise BenchmarkError(f"name one or more categories, each once, not {list(categories)}")
    prompts, sources = {}, {}
    for category in categories:
        name = color_file if category == "color" else f"{category}_val.txt"
        prompts[category], sources[str(prompts_dir / name)] = prompts_of(prompts_dir, name)
    drawn = {"color_file": color_file, "images_per_prompt": IMAGES_PER_PROMPT, "prompts": prompts}
    pictures = [picture for category in categories for picture in _pictures(category, prompts[category])]
    return Suite("t2i-compbench", pictures, sources, {"prompts.json": json.dumps(drawn, indent=1) + "\n"})


def prompts_of(prompts_dir: Path, name: str) -> tuple[list[str], str]:
    """The prompts of one of the authors' files, whatever its line ends, and its SHA-256.

    Raises:
        BenchmarkError: the file is missing, or is not the published one.
    """
    text, sha256 = prompt_file(prompts_dir, name, PUBLISHED)
    prompts = [line.strip() for line in text.strip().splitlines()]
    rebuilt = "\r\n".join(prompts).encode()
    found = [hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest() for raw in (rebuilt, rebuilt + b"\r\n")]
    if GIT_BLOBS[name] not in found:
        raise BenchmarkError(
            f"{prompts_dir / name} is not the benchmark's file: git hash-object must give {GIT_BLOBS[name]} "
            f"(line ends do not matter); get it from {PUBLISHED}"
        )
    return prompts, sha256


def _pictures(category: str, prompts: Sequence[str]) -> list[Picture]:
    return [
        Picture(f"{category}/samples/{IMAGES_PER_PROMPT * i + sample:06d}.png", prompt, sample)
        for i, prompt in enumerate(prompts)
        for sample in range(IMAGES_PER_PROMPT)
    ]


def score(
    run: Path,
    prompts_dir: Path,
    blip: str = "Salesforce/blip-vqa-capfilt-large",
    detector: str = "google/owlv2-base-patch16-ensemble",
    noun_phrases: Parser = "template",
    allow_unparsed: bool = False,
    allow_missing: bool = False,
    detector_threshold: float = 0.5,
    device: str = "cpu",
) -> dict[str, Any]:
    """Scores in [0, 1] of a run's images, with each image's questions and answers.

    Args:
        run: folder that `lidit sample --benchmark t2i-compbench` wrote.
        prompts_dir: folder with CATEGORY_val.txt from the authors' examples/dataset.
        blip: Hugging Face id or folder of BLIP-VQA, see `lidit/eval/blip_vqa.py`.
        detector: Hugging Face id or folder of the detector for 2D-spatial, see `lidit/eval/spatial.py`.
        noun_phrases: how prompts are parsed. template: only prompts of the templates, which are two thirds of the
            attributes' prompts and all of 2D-spatial's; spacy: with en_core_web_sm, as the authors do (its version
            3.5.0, with spaCy 3.5.3).
        allow_unparsed: leave out the images of prompts that cannot be parsed; the result names these prompts.
        allow_missing: score a run that lacks images; the result counts them.
        detector_threshold: score above which a box counts; 0.5 is the official value, for UniDet.
        device: device to run both models on.

    Returns:
        `scores` per category and scale (np2, np8; for spatial t2i-spatial-DETECTOR) that has images, and the mean of
        the three attributes if all were scored; the numbers of `images`; how `noun_phrases` were parsed, and which
        prompts were not; the `judges`; and `details` of each image.

    Raises:
        BenchmarkError: the run was drawn from other prompts, images are missing or unreadable, prompts cannot be
            parsed, spaCy is not installed, or a model cannot be loaded.
    """
    wanted = _drawn(run, prompts_dir)
    found = set(present(run, [picture.path for picture in wanted.pictures], allow_missing))
    reader = _reader(noun_phrases)
    parsed, unparsed = _parse(wanted.pictures, reader)
    if unparsed and not allow_unparsed:
        raise BenchmarkError(
            f"{len(unparsed)} prompts cannot be parsed by {noun_phrases}, for example {min(unparsed)[1]!r}; "
            "pass --noun_phrases spacy, or --allow_unparsed true to leave them out"
        )
    scored = [p for p in wanted.pictures if p.path in found and (_category(p), p.prompt) in parsed]
    judges, details = _answers(run, scored, parsed, blip, (detector, detector_threshold), device)
    return {
        "name": "t2i-compbench",
        "scores": _scores(wanted, details),
        "images_demanded": len(wanted.pictures),
        "images_scored": len(scored),
        "images": {
            category: {
                "demanded": sum(_category(p) == category for p in wanted.pictures),
                "found": sum(path.split("/")[0] == category for path in found),
                "scored": sum(_category(p) == category for p in scored),
            }
            for category in _categories(wanted)
        },
        "noun_phrases": reader.about
        | {
            "parsed": len(parsed),
            "unparsed": len(unparsed),
            "unparsed_prompts": [list(key) for key in sorted(unparsed)],
        },
        "judges": judges,
        "details": details,
    }


def _category(picture: Picture) -> str:
    return picture.path.split("/")[0]


def _categories(suite: Suite) -> list[str]:
    return list(dict.fromkeys(map(_category, suite.pictures)))


def _drawn(run: Path, prompts_dir: Path) -> Suite:
    """The suite that the run folder was drawn from."""
    path = run / "prompts.json"
    try:
        drawn = json.loads(path.read_text())
        wanted = suite(prompts_dir, list(drawn["prompts"]), drawn["color_file"])
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise BenchmarkError(
            f"{path} is missing or damaged ({type(error).__name__}); draw the run with "
            "lidit sample --benchmark t2i-compbench"
        ) from error
    if json.loads(wanted.files["prompts.json"]) != drawn:
        raise BenchmarkError(
            f"{path} lists other prompts than {prompts_dir}; score with the folder that the run was drawn from"
        )
    return wanted


def _parse(pictures: Sequence[Picture], reader: Reader) -> tuple[dict[Key, list[str]], set[Key]]:
    """Noun chunks, or for spatial nouns, of the prompts that could be parsed; and the other prompts."""
    found = {}
    for category, prompt in {(_category(p), p.prompt): None for p in pictures}:
        found[category, prompt] = (reader.nouns if category == "spatial" else reader.chunks)(prompt)
    return {k: v for k, v in found.items() if v is not None}, {k for k, v in found.items() if v is None}


def _reader(parser: Parser) -> Reader:
    if parser == "template":
        return Reader({"parser": "template"}, template_chunks, template_nouns)
    try:
        spacy = import_module("spacy")  # lidit does not require spaCy
        read = spacy.load(SPACY_MODEL)
    except ImportError as error:
        raise BenchmarkError(
            f"spaCy is not installed; pip install spacy and python -m spacy download {SPACY_MODEL}, or pass "
            "--noun_phrases template"
        ) from error
    except OSError as error:
        raise BenchmarkError(f"spaCy lacks its model; run python -m spacy download {SPACY_MODEL}") from error
    return Reader(
        {"parser": "spacy", "spacy": spacy.__version__, SPACY_MODEL: read.meta["version"]},
        lambda prompt: [chunk.text for chunk in read(prompt).noun_chunks],
        lambda prompt: [word.text for word in read(prompt) if word.pos_ == "NOUN"] or None,
    )


def _answers(
    run: Path, scored: list[Picture], parsed: dict[Key, list[str]], blip: str, detector: tuple[str, float], device: str
) -> tuple[dict[str, dict], list[dict]]:
    """What a result says about the judges that were needed, and their answers for each image."""
    judges: dict[str, Any] = {}
    details = []
    for picture in scored:
        category, image = _category(picture), read_image(run / picture.path)
        words = parsed[category, picture.prompt]
        if category == "spatial":
            judge = judges.get("spatial") or judges.setdefault("spatial", Detector(*detector, device=device))
            found = judge(image, [label_of(words[0]), label_of(words[-1])])
            answer = _related(picture.prompt, words, found, judge.name)
        else:
            judge = judges.get("attributes") or judges.setdefault("attributes", BlipVQA(blip, device))
            asked = [question for question in questions(words, max(SCALES.values())) if question]
            answer = _asked(asked, judge(image, asked))
        details.append({"image": picture.path, "category": category, "prompt": picture.prompt} | answer)
    return {kind: judge.describe() for kind, judge in judges.items()}, details


def _asked(asked: list[str], yes: list[float]) -> dict[str, Any]:
    """Both scales from the same answers: the two questions of np2 are the first two of np8."""
    scores = {name: product(yes[:np_num]) for name, np_num in SCALES.items()}
    return {"questions": asked, "yes": [four_decimals(p) for p in yes], "scores": scores}


def _related(prompt: str, nouns: list[str], found: list[Detection], name: str) -> dict[str, Any]:
    first = {detection.label: detection for detection in reversed(found)}
    return {
        "objects": [nouns[0], nouns[-1]],
        "relation": relation_of(prompt),
        "first_boxes": [asdict(detection) for detection in first.values()],
        "scores": {name: spatial_score(prompt, nouns, found)},
    }


def _scores(wanted: Suite, details: list[dict]) -> dict[str, float]:
    """Means over images, as `CATEGORY np2`; and `attributes`, LI-DiT's T2I-avg, if all three were scored."""
    scores: dict[str, float] = {}
    for category in _categories(wanted):
        images = [detail["scores"] for detail in details if detail["category"] == category]
        for name in images[0] if images else ():
            scores[f"{category} {name}"] = float(np.mean([image[name] for image in images]))
    for name in SCALES:
        parts = [scores.get(f"{category} {name}") for category in ATTRIBUTES]
        if None not in parts:
            scores[f"attributes {name}"] = float(np.mean(parts))
    return scores
