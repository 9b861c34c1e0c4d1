"""The golden cases of T2I-CompBench: compares `t2i_compbench.py`, `blip_vqa.py` and `spatial.py` with official code.

`t2i_spatial2d_mean.json` holds only the mean over the cases of t2i_spatial2d_cases.jsonl; `spatial2d_mean` compares it.
`t2i_blip_tiny.json` has no check here, since only that file says how its weights are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from lidit.eval.blip_vqa import NO, YES, cleaned, four_decimals, yes_probability
from lidit.eval.spatial import Detection, position, spatial_score
from lidit.eval.t2i_compbench import product, questions

Check = Callable[[Any], Iterator[tuple[str, str | None]]]
UNASKED = 0.123  # the stub's answer to a question without a probability in the case


def _differs(what: str, found: Any, expected: Any, tolerance: float = 0.0) -> str | None:
    """A difference as text, or None; numbers may differ by the tolerance."""
    numbers = isinstance(found, (int, float)) and isinstance(expected, (int, float))
    if found == expected or (numbers and math.isclose(found, expected, rel_tol=0, abs_tol=tolerance)):
        return None
    return f"{what}: {found!r}, expected {expected!r}"


def _first(differences: Sequence[str | None]) -> str | None:
    return next((difference for difference in differences if difference), None)


def _file_number(image: dict) -> int:
    """N of `PROMPT_N.png`, which gives the official order of images."""
    return int(image["file"].rsplit("_", 1)[-1].split(".")[0])


def blipvqa(cases: Any) -> Iterator[tuple[str, str | None]]:
    """Check the questions, answers and mean of noun chunks and yes-probabilities."""
    for case in cases:
        images, expected = sorted(case["images"], key=_file_number), case["expected"]
        asked = [questions(image["noun_chunks"], case["np_num"]) for image in images]
        answers = [
            product([image["yes_prob"].get(q, UNASKED) if q else 1.0 for q in row])
            for image, row in zip(images, asked, strict=True)
        ]
        yield (
            case["id"],
            _first(
                [
                    _differs("questions", asked, expected["questions"]),
                    _differs(
                        "model_questions", [[cleaned(q) for q in row] for row in asked], expected["model_questions"]
                    ),
                    _differs("answers", [f"{answer:.4f}" for answer in answers], expected["answers"]),
                    _differs("question_ids", list(range(len(images))), expected["question_ids"]),
                    _differs("score", sum(answers) / len(answers), expected["score"], 1e-9),
                ]
            ),
        )


def yesprob(cases: Any) -> Iterator[tuple[str, str | None]]:
    """Check p(yes) of the logits of an answer's first token."""
    for case in cases:
        logits = torch.full((1, case["vocab_size"]), float(case["logit_all_others"]))
        if case["one_other"]:
            logits[0, case["one_other"][0]] = case["one_other"][1]
        logits[0, YES], logits[0, NO] = case["logit_yes"], case["logit_no"]
        found = float(yes_probability(logits)[0])
        yield (
            case["id"],
            _first(
                [
                    _differs("ids of yes and no", [YES, NO], [case["yes_id"], case["no_id"]]),
                    _differs("text", f"{four_decimals(found):.4f}", case["expected"]),
                    _differs("p(yes)", found, case["expected_float"], 1e-5),
                ]
            ),
        )


def question(cases: Any) -> Iterator[tuple[str, str | None]]:
    """Check how a question is cleaned."""
    for case in cases:
        yield case["id"], _differs("question", cleaned(case["text"]), case["expected"])


def _spatial(case: dict) -> float:
    nouns = [word for word, kind in case["tokens"] if kind == "NOUN"]
    found = [Detection(d["label"], _floats(d["box"]), float(d["score"])) for d in case["detections"]]
    return spatial_score(case["prompt"], nouns, found)


def _floats(values: Sequence[float | int]) -> list[float]:
    return [float(value) for value in values]


def spatial2d(cases: Any) -> Iterator[tuple[str, str | None]]:
    """Check the 2D-spatial score of detections."""
    for case in cases:
        yield case["id"], _differs("score", _spatial(case), case["expected"]["score"], 1e-5)


def spatial2d_mean(expected: float, cases: Sequence[dict]) -> str | None:
    """Compare the official mean over all cases of t2i_spatial2d_cases.jsonl with ours; None if they agree."""
    return _differs("mean", sum(map(_spatial, cases)) / len(cases), expected, 1e-5)


def positions(cases: Any) -> Iterator[tuple[str, str | None]]:
    """Check the rule of positions alone."""
    for case in cases:
        thresholds = _floats([case["iou_threshold"], case["distance_threshold"]])
        found = position(case["relation"], _floats(case["box1"]), _floats(case["box2"]), *thresholds)
        yield case["id"], _differs("position", found, case["expected"], 1e-6)


GOLDEN: dict[str, Check] = {
    "t2i_blipvqa_cases.jsonl": blipvqa,
    "t2i_yesprob_cases.jsonl": yesprob,
    "t2i_question_cases.jsonl": question,
    "t2i_spatial2d_cases.jsonl": spatial2d,
    "t2i_position_cases.jsonl": positions,
}
