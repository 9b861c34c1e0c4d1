"""The golden cases of DPG-Bench: one image's answers, and a whole run's CSV and answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from lidit.eval.dpg_bench import Question, aggregate, category, read_items, right_answers, tile_scores

Check = Callable[[Any], Iterator[tuple[str, str | None]]]
TOLERANCE = 1e-9


def images(cases: list[dict]) -> Iterator[tuple[str, str | None]]:
    """Check an image's tile scores, their mean and the last tile's answers, or the question that is missing."""
    for case in cases:
        questions = {
            each["qid"]: Question(each["question"], category(each["tuple"]), tuple(each["dependency"]))
            for each in case["questions"]
        }
        tiles = [{int(number): text for number, text in answers.items()} for answers in case["answers"]]
        right = right_answers(questions, tiles)
        try:
            scores = tile_scores(questions, right)
            last = {str(number): value for number, value in right[-1].items()}
            found = {
                "error": None,
                "tile_scores": scores,
                "score": sum(scores) / len(scores),
                "category_scores": last,
            }
        except KeyError as error:
            found = {"error": "KeyError", "missing_qid": error.args[0]}
        yield case["id"], difference(found, case["expected"])


def runs(cases: list[dict]) -> Iterator[tuple[str, str | None]]:
    """Check a run's score, categories, images and failures, without and with the CSV's first row."""
    for case in cases:
        answers = {
            item: [{int(number): text for number, text in tile.items()} for tile in tiles]
            for item, tiles in case["answers"].items()
        }
        found = {
            "official": aggregate(read_items(case["csv"], skip_first=True), answers),
            "first_row_kept": aggregate(read_items(case["csv"]), answers),
        }
        yield case["id"], difference(found, {kind: case[f"expected_{kind}"] for kind in found})


def difference(found: Any, expected: Any, place: str = "") -> str | None:
    """The first difference, with its place and what was found; None if there is none. Numbers may differ by 1e-9."""
    if isinstance(found, dict) and isinstance(expected, dict):
        if found.keys() != expected.keys():
            return f"{place or 'result'}: {sorted(found)} instead of {sorted(expected)}"
        parts = ((found[key], expected[key], f"{place}.{key}".lstrip(".")) for key in expected)
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        parts = ((a, b, f"{place}[{i}]") for i, (a, b) in enumerate(zip(found, expected, strict=True)))
    else:
        return None if _same(found, expected) else f"{place}: {found!r} instead of {expected!r}"
    return next((text for part in parts if (text := difference(*part))), None)


def _same(found: Any, expected: Any) -> bool:
    if isinstance(found, (int, float)) and isinstance(expected, (int, float)):
        return math.isclose(found, expected, rel_tol=0, abs_tol=TOLERANCE)
    return found == expected


GOLDEN: dict[str, Check] = {"dpg_cases.jsonl": images, "dpg_run_cases.jsonl": runs}
