"""GenEval's rules (Ghosh et al., 2023): they make verdicts from boxes and colours, and scores from verdicts.

The rules need no model. Thresholds, order and wording are the official evaluator's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

Box = Sequence[float]  # x1, y1, x2, y2, score
Metadata = Mapping[str, Any]  # a line of evaluation_metadata.jsonl: tag, prompt, include, exclude
Clause = Mapping[str, Any]  # an entry of include or exclude: class, count, perhaps color and position


@dataclass(frozen=True)
class Options:
    """The official evaluator's options.

    Args:
        threshold: a box counts if its score is greater.
        counting_threshold: the threshold for counting tasks.
        max_objects: largest number of boxes of a class that count.
        max_overlap: IoU from which the less certain of two boxes of a class is dropped; 1 drops none.
        position_threshold: share of two boxes' sizes by which their centres must differ.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1


OFFICIAL = Options()


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows its prompt, a line for each reason why not, and per class the boxes that count."""

    correct: bool
    reason: str
    kept: dict[str, list[int]]


def verdict(
    metadata: Metadata,
    detections: Mapping[str, Sequence[Box]],
    color_of: Callable[[str, int], str],
    options: Options = OFFICIAL,
) -> Verdict:
    """Judge what was found in a picture.

    Args:
        metadata: metadata of the picture's prompt.
        detections: the boxes of each class, in any order.
        color_of: gives the colour, one of COLORS, for a class and the index of a box in `detections`; called only if
            the colour matters.
        options: thresholds.
    """
    threshold = options.counting_threshold if metadata["tag"] == "counting" else options.threshold
    kept = {name: found for name, boxes in detections.items() if (found := keep(boxes, threshold, options))}
    reasons: list[str] = []
    groups: list[list[Box] | None] = []  # the boxes of each clause, None if it failed
    for clause in metadata.get("include", []):
        name = clause["class"]
        taken = kept.get(name, [])[: clause["count"]]
        boxes = [detections[name][i] for i in taken]
        reason = (
            _count_wrong(clause, len(taken))
            or _color_wrong(clause, [color_of(name, i) for i in taken] if "color" in clause else [])
            or _position_wrong(clause, boxes, groups, options.position_threshold)
        )
        groups.append(None if reason else boxes)
        reasons += [reason] if reason else []
    for clause in metadata.get("exclude", []):
        found = len(kept.get(clause["class"], []))
        if found >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {found}")
    return Verdict(not reasons, "\n".join(reasons), kept)


def keep(boxes: Sequence[Box], threshold: float, options: Options = OFFICIAL) -> list[int]:
    """Indices of the boxes of one class that count, best first."""
    certain = [i for i, box in enumerate(boxes) if box[4] > threshold]
    best = sorted(certain, key=lambda i: boxes[i][4], reverse=True)[: options.max_objects]
    kept: list[int] = []
    for i in best:
        if options.max_overlap >= 1 or all(iou(boxes[i], boxes[k]) < options.max_overlap for k in kept):
            kept.append(i)
    return kept


def iou(a: Box, b: Box) -> float:
    """Intersection over union; a side is counted from its first pixel to its last, as x2 - x1 + 1."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0.0) * max(y2 - y1 + 1, 0.0)

    shared = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a[:4]) + area(*b[:4]) - shared
    return shared / union if union else 0.0


def relations(a: Box, b: Box, position_threshold: float) -> list[str]:
    """Where a lies relative to b: none, one or two of above, below, left of, right of.

    Per axis, the offset of the centres is shortened by a share of both sizes, and divided by the offset's length.
    """
    corners = np.array([a[:4], b[:4]], np.float64).reshape(2, 2, 2)  # axes: box, corner, coordinate
    offset = corners[0].mean(0) - corners[1].mean(0)
    sizes = np.abs(corners[:, 1] - corners[:, 0]).sum(0)
    shortened = np.sign(offset) * np.maximum(np.abs(offset) - position_threshold * sizes, 0)
    if (np.abs(shortened) < 1e-3).all():
        return []
    dx, dy = shortened / np.linalg.norm(offset)
    # DEVIATION: relations are named in this order; the official order is that of a Python set.
    holds = {"above": dy < -0.5, "below": dy > 0.5, "left of": dx < -0.5, "right of": dx > 0.5}
    return [name for name, true in holds.items() if true]


def _count_wrong(clause: Clause, found: int) -> str | None:
    wrong = found < clause["count"]
    return f"expected {clause['class']}>={clause['count']}, found {found}" if wrong else None


def _color_wrong(clause: Clause, colors: list[str]) -> str | None:
    if "color" not in clause or colors.count(clause["color"]) >= clause["count"]:
        return None
    asked = f"expected {clause['color']} {clause['class']}>={clause['count']}"
    seen = ", ".join(f"{colors.count(color)} {color}" for color in COLORS if color in colors)
    return f"{asked}, found {colors.count(clause['color'])} {clause['color']}; and {seen}"


def _position_wrong(clause: Clause, boxes: list[Box], groups: list[list[Box] | None], threshold: float) -> str | None:
    if "position" not in clause:
        return None
    relation, target = clause["position"]
    targets = groups[target]
    if targets is None:
        return f"no target for {clause['class']} to be {relation}"
    held = (relations(box, other, threshold) for box in boxes for other in targets)
    wrong = next((found for found in held if relation not in found), None)
    if wrong is None:
        return None
    return f"expected {clause['class']} {relation} target, found {' and '.join(wrong)} target"


@dataclass(frozen=True)
class Summary:
    """The figures of a run; all shares are in [0, 1].

    Args:
        images: number of images judged.
        prompts: number of their distinct prompts.
        correct_images: share of the images that are correct.
        correct_prompts: share of the prompts with at least one correct image.
        tasks: for each task, in order of first appearance, the number of correct images and of all images.
        overall: mean of the tasks' shares of correct images.
    """

    images: int
    prompts: int
    correct_images: float
    correct_prompts: float
    tasks: dict[str, tuple[int, int]]
    overall: float


def summary(results: Sequence[tuple[Metadata, bool]]) -> Summary:
    """The official summary of at least one image's metadata and verdict."""
    prompts: dict[str, bool] = {}
    tasks: dict[str, tuple[int, int]] = {}
    for metadata, correct in results:
        prompt = json.dumps(metadata, sort_keys=True)
        prompts[prompt] = prompts.get(prompt, False) or correct
        right, count = tasks.get(metadata["tag"], (0, 0))
        tasks[metadata["tag"]] = right + correct, count + 1
    return Summary(
        images=len(results),
        prompts=len(prompts),
        correct_images=sum(correct for _, correct in results) / len(results),
        correct_prompts=sum(prompts.values()) / len(prompts),
        tasks=tasks,
        overall=float(np.mean([right / count for right, count in tasks.values()])),
    )


def report(found: Summary) -> str:
    """The summary as the official script prints it."""
    tasks = [f"{tag:<16} = {right / n:.2%} ({right} / {n})" for tag, (right, n) in found.tasks.items()]
    lines = [
        *("Summary", "======="),
        f"Total images: {found.images}",
        f"Total prompts: {found.prompts}",
        f"% correct images: {found.correct_images:.2%}",
        f"% correct prompts: {found.correct_prompts:.2%}",
        *("", "Task breakdown", "=============="),
        *tasks,
        *("", f"Overall score (avg. over tasks): {found.overall:.5f}"),
    ]
    return "\n".join(lines) + "\n"
