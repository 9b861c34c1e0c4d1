"""DPG-Bench (ELLA, Hu et al., 2024): 1,065 long prompts, and the share of their propositions that a VQA judge affirms.

The rules are those of `dpg_bench/compute_dpg_bench.py` of github.com/TencentQQGYLab/ELLA, with two sums over the same
answers: `official` has that script's errors, as published numbers have, and `fixed` does not.

| | official | fixed |
|---|---|---|
| first row of the CSV | skipped, so that partiprompts97 fails and is left out | read |
| category scores | answers of the last tile | answers of all tiles |

In both, a proposition counts for the score only if the propositions it depends on hold; its category's score ignores
that.

The authors' judge is not available in transformers; ours are variants, and are named so (see `dpg_judges.py`).
"""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from lidit.eval.dpg_judges import Judge, load_judge
from lidit.eval.suite import BenchmarkError, Picture, Suite, present, prompt_file, read_image

CSV = "dpg_bench.csv"
PUBLISHED = "https://github.com/TencentQQGYLab/ELLA/tree/main/dpg_bench"
GIT_BLOB = "98457fc9901943f51ff9a30367250fc292533bed"
TILES = 4  # per image: top left, top right, bottom left, bottom right

Answers = Mapping[int, str]  # answers for one tile, by the question's number


@dataclass(frozen=True)
class Question:
    """A proposition as a question; it counts only if its parents, which are other questions, hold."""

    text: str
    category: str
    parents: tuple[int, ...]


@dataclass(frozen=True)
class Item:
    """A prompt and its questions by number, in the CSV's order, in which a failed parent fails its children."""

    prompt: str
    questions: dict[int, Question] = field(default_factory=dict)


def suite(prompts_dir: Path) -> Suite:
    """The pictures to draw: one image of four tiles for each prompt, named by the prompt's id.

    Args:
        prompts_dir: folder with ELLA's dpg_bench.csv.

    Raises:
        BenchmarkError: the CSV is missing, or is not the published one.
    """
    text, sources = _read(prompts_dir)
    # UNSTATED: whether the CSV's text column, which we draw, always agrees with prompts/*.txt, which ELLA draws.
    pictures = [Picture(_file(i), item.prompt, tiles=TILES) for i, item in read_items(text).items()]
    return Suite("dpg-bench", pictures, sources)


def score(
    run: Path,
    prompts_dir: Path,
    judge: str = "Salesforce/blip-vqa-capfilt-large",
    tile: int | None = None,
    allow_missing: bool = False,
    device: str = "cpu",
) -> dict:
    """Both scores of a run and of its categories, times 100; each image's score in [0, 1]; and the judge.

    Args:
        run: folder that `lidit sample --benchmark dpg-bench` wrote.
        prompts_dir: folder with ELLA's dpg_bench.csv.
        judge: Hugging Face id or folder of a BLIP-VQA model, or of a chat model that reads images, such as Qwen-VL.
        tile: side of a tile in pixels; by default half the side of the first image. All images must have this size.
        allow_missing: score a run that lacks images; the result then names them.
        device: device to run the judge on.

    Raises:
        BenchmarkError: the CSV or the judge is missing or of another kind, an image cannot be read, or images are
            missing without `allow_missing`.
    """
    text, sources = _read(prompts_dir)
    items = read_items(text)
    files = present(run, [_file(i) for i in items], allow_missing)
    tile = _tile_side(run, files, tile)
    asked = load_judge(judge, device)
    answers: dict[str, list[Answers]] = {}
    for file in files:
        item = file.removesuffix(".png")
        answers[item] = _ask(asked, split(read_image(run / file), tile, file), items[item].questions)
    words = Counter(word for tiles in answers.values() for each in tiles for word in each.values())
    official = aggregate(read_items(text, skip_first=True), answers)
    fixed = aggregate(items, answers, last_tile=False)
    return {
        "name": asked.label,
        "scores": {**_columns("official", official), **_columns("fixed", fixed)},
        "images_demanded": len(items),
        "images_scored": len(files),
        "missing": [i for i in items if i not in answers],
        "judge": asked.describe(),
        "tile": tile,
        "answers": {"yes": words["yes"], "no": words["no"], "other": words.total() - words["yes"] - words["no"]},
        "official": official,
        "fixed": fixed,
        "sources": sources,
    }


def read_items(text: str, skip_first: bool = False) -> dict[str, Item]:
    """The CSV's prompts by id; an id is a text, even if it looks like a number.

    Args:
        text: text of the CSV.
        skip_first: leave out the first row, as the official script does.
    """
    items: dict[str, Item] = {}
    for row in list(csv.DictReader(io.StringIO(text, newline="")))[skip_first:]:
        item = items.setdefault(row["item_id"], Item(row["text"]))
        item.questions[int(row["proposition_id"])] = Question(
            row["question_natural_language"],
            category(row["tuple"]),
            tuple(int(parent) for parent in row["dependency"].split(",")),
        )
    return items


def category(proposition: str) -> str:
    """The detailed category of `attribute - color (bench, red)`."""
    return proposition.partition("(")[0].strip()


def gated(right: Mapping[int, int], questions: Mapping[int, Question]) -> dict[int, int]:
    """Which right answers count: in their order, one counts only if all its parents count. Parent 0 means none.

    Raises:
        KeyError: a parent that must be looked up is not a question.
    """
    counts = dict(right)
    for number, question in questions.items():
        if any(counts[parent] == 0 for parent in question.parents if parent != 0):
            counts[number] = 0
    return counts


def right_answers(questions: Mapping[int, Question], tiles: Sequence[Answers]) -> list[dict[int, int]]:
    """Per tile, 1 for each question that is answered exactly "yes", whatever its parents' answers."""
    return [{number: int(answers[number] == "yes") for number in questions} for answers in tiles]


def tile_scores(questions: Mapping[int, Question], right: Sequence[Mapping[int, int]]) -> list[float]:
    """Per tile, the share of all questions that count, in [0, 1].

    Raises:
        KeyError: a parent that must be looked up is not a question.
    """
    return [sum(gated(tile, questions).values()) / len(tile) for tile in right]


def aggregate(items: Mapping[str, Item], answers: Mapping[str, Sequence[Answers]], last_tile: bool = True) -> dict:
    """A run's score and category scores, times 100, and each image's score in [0, 1].

    Args:
        items: prompts by id.
        answers: each image's answers by prompt id, tile by tile.
        last_tile: take category scores from the last tile only.

    Returns:
        dpg_score, l1 and l2 (scores by category), per_image, and failed, the images that are left out: they have no
        questions, or a question depends on one that does not exist. If all images failed, only failed.
    """
    right: dict[str, list[dict[int, int]]] = {}
    per_image: dict[str, dict] = {}
    for i in (i for i in answers if i in items):
        asked = right_answers(items[i].questions, answers[i])
        try:
            tiles = tile_scores(items[i].questions, asked)
        except KeyError:
            continue
        right[i] = asked[-1:] if last_tile else asked
        per_image[i] = {"tile_scores": tiles, "score": sum(tiles) / len(tiles)}
    failed = [i for i in answers if i not in per_image]
    if not per_image:
        return {"failed": failed}
    overall = _percent(image["score"] for image in per_image.values())
    return {"dpg_score": overall, **_categories(items, right), "per_image": per_image, "failed": failed}


def _categories(items: Mapping[str, Item], right: Mapping[str, list[dict[int, int]]]) -> dict[str, dict[str, float]]:
    """Scores of broad (`attribute`) and detailed (`attribute - color`) categories, pooled over questions."""
    pools: dict[str, dict[str, list[int]]] = {"l1": defaultdict(list), "l2": defaultdict(list)}
    for i, tiles in right.items():
        for tile in tiles:
            for number, value in tile.items():
                detailed = items[i].questions[number].category
                pools["l1"][detailed.partition("-")[0].strip()].append(value)
                pools["l2"][detailed].append(value)
    return {level: {name: _percent(values) for name, values in pool.items()} for level, pool in pools.items()}


def split(image: UInt8[np.ndarray, "h w 3"], tile: int, name: str) -> list[UInt8[np.ndarray, "t t 3"]]:
    """The four tiles of an image, row by row.

    Raises:
        BenchmarkError: the image does not consist of two by two tiles of that side.
    """
    height, width = image.shape[:2]
    if (height, width) != (2 * tile, 2 * tile):
        raise BenchmarkError(
            f"{name} is {width}x{height}, not two by two tiles of {tile} px; draw the run again, or pass --tile"
        )
    return [image[y : y + tile, x : x + tile] for y in (0, tile) for x in (0, tile)]


def _ask(judge: Judge, tiles: list[np.ndarray], questions: Mapping[int, Question]) -> list[Answers]:
    texts = [question.text for question in questions.values()]
    return [dict(zip(questions, judge.answers(tile, texts), strict=True)) for tile in tiles]


def _tile_side(run: Path, files: list[str], tile: int | None) -> int:
    """The side of all tiles. Every image is checked here, before the judge works for hours."""
    for file in files:
        image = read_image(run / file)
        tile = tile or image.shape[0] // 2
        split(image, tile, str(run / file))
    return int(tile or 0)


def _read(prompts_dir: Path) -> tuple[str, dict[str, str]]:
    """The CSV's text, and its SHA-256 by its path."""
    text, sha = prompt_file(prompts_dir, CSV, PUBLISHED, GIT_BLOB)
    return text, {str(prompts_dir / CSV): sha}


def _columns(kind: str, found: dict) -> dict[str, float]:
    """The columns of ELLA's table: the score and the broad categories; empty if all images failed."""
    if "dpg_score" not in found:
        return {}
    return {f"{kind} average": found["dpg_score"]} | {f"{kind} {name}": value for name, value in found["l1"].items()}


def _file(item: str) -> str:
    return f"{item}.png"


def _percent(values: Iterable[int | float]) -> float:
    values = list(values)
    return 100 * sum(values) / len(values)
