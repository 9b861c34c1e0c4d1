"""The golden cases of GenEval: compares `geneval_rules.py` and `mask2former.py` with the official code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from lidit.eval.geneval_rules import Options, report, summary, verdict
from lidit.eval.mask2former import Instances, instances

Check = Callable[[Any], Iterator[tuple[str, str | None]]]
SCORE_TOLERANCE = 1e-5


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """The values that differ from the expected ones, as text; None if there are none."""
    wrong = [f"{key}: {found[key]!r}, expected {expected[key]!r}" for key in found if found[key] != expected[key]]
    return "; ".join(wrong) or None


def verdicts(cases: Any) -> Iterator[tuple[str, str | None]]:
    """Check verdicts on detections and colours: the verdict, its reasons and the boxes that count."""
    for case in cases:
        boxes = {name: [[float(x) for x in box] for box in found] for name, found in case["detections"].items()}
        options = {key: float(value) for key, value in case["options"].items()}
        options["max_objects"] = case["options"]["max_objects"]
        colors = case["colors"]
        found = verdict(case["metadata"], boxes, lambda name, i, colors=colors: colors[name][i], Options(**options))
        lines = {"correct": found.correct, "reason_lines": found.reason.splitlines(), "kept": found.kept}
        yield case["id"], _differences(lines, case["expected"])


def summaries(cases: Any) -> Iterator[tuple[str, str | None]]:
    """Check the figures and the printed report of a run's verdicts."""
    for case in cases:
        found = summary([(result["metadata"], result["correct"]) for result in case["results"]])
        figures = {
            "total_images": found.images,
            "total_prompts": found.prompts,
            "pct_correct_images": _percent(found.correct_images),
            "pct_correct_prompts": _percent(found.correct_prompts),
            "tasks": {
                tag: {"pct": _percent(right / count), "correct": right, "n": count}
                for tag, (right, count) in found.tasks.items()
            },
            "overall": float(f"{found.overall:.5f}"),
            "order of tasks": list(found.tasks),
            "report": report(found).strip(),
        }
        more = {"order of tasks": list(case["expected"]["tasks"]), "report": case["stdout"].strip()}
        yield case["id"], _differences(figures, case["expected"] | more)


def _percent(share: float) -> float:
    return float(f"{share:.2%}"[:-1])


def mask_posts(cases: Any) -> Iterator[tuple[str, str | None]]:
    """Check the labels, boxes, scores and areas of Mask2Former's logits."""
    for case in cases:
        shapes = [(int(case[key][0]), int(case[key][1])) for key in ("img_shape", "ori_shape")]
        logits = [torch.tensor(case[key], dtype=torch.float32) for key in ("class_logits", "mask_logits")]
        found = _listed(instances(*logits, *shapes, case["max_per_image"]))
        expected = _sorted([(i["label"], *i["box"], i["mask_area"], i["score"]) for i in case["expected"]])
        yield case["id"], _first_unlike(found, expected)


def _listed(found: Instances) -> list[tuple[float, ...]]:
    """Label, box, area and score of each instance, sorted."""
    areas = found.masks.sum((1, 2))
    rows = torch.cat([found.labels[:, None], found.boxes, areas[:, None], found.scores.double()[:, None]], 1)
    return _sorted([tuple(row) for row in rows.tolist()])


def _sorted(rows: Sequence[Sequence[Any]]) -> list[tuple[float, ...]]:
    """Rows sorted by all but the score first, since nearly equal scores may come in any order."""
    return sorted(tuple(map(float, row)) for row in rows)


def _first_unlike(found: Sequence[tuple[float, ...]], expected: Sequence[tuple[float, ...]]) -> str | None:
    if len(found) != len(expected):
        return f"{len(found)} instances, expected {len(expected)}"
    for one, other in zip(found, expected, strict=True):
        if one[:-1] != other[:-1] or abs(one[-1] - other[-1]) > SCORE_TOLERANCE:
            return f"(label, box, area, score) {one}, expected {other}"
    return None


GOLDEN: dict[str, Check] = {
    "geneval_cases.jsonl": verdicts,
    "geneval_summary_cases.jsonl": summaries,
    "geneval_maskpost_cases.jsonl": mask_posts,
}
