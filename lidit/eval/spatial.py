"""T2I-CompBench's 2D-spatial rule, with open-vocabulary detectors of transformers in place of UniDet.

The rule is the official one. The detector is not: UniDet knows 722 names, and 9 of the benchmark's 50 objects are not
among them, so that 100 of its 300 prompts always score 0. A detector that reads names finds these objects, too, so its
scores are a variant, named after it (`t2i-spatial-owlv2`), which cannot be compared with published scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from lidit.eval.suite import BenchmarkError

# in the order in which a prompt is searched for them
RELATIONS = (
    "on side of",
    "next to",
    "near",
    "on the left of",
    "on the right of",
    "on the bottom of",
    "on the top of",
    "on top of",
)
NEAR = ("on side of", "next to", "near")
# axis, and the sign of object 2's centre minus object 1's; "on top of" is not here, so it never holds
DIRECTIONS = {
    "on the left of": (0, 1),
    "on the right of": (0, -1),
    "on the bottom of": (1, -1),
    "on the top of": (1, 1),
}
PERSONS = ("girl", "boy", "man", "woman")
SHORT_SIDE, LONG_SIDE = 479, 480  # of UniDet's input; distances are in its pixels
PASSED = 0.5  # lower scores become 0
DETECTORS = ("owlv2", "owlvit", "grounding-dino", "mm-grounding-dino")

Box = Sequence[float]  # x1, y1, x2, y2


@dataclass(frozen=True)
class Detection:
    """A box (x1, y1, x2, y2) in pixels of the image resized by `resized`, with its label and score in [0, 1]."""

    label: str
    box: Box
    score: float


def relation_of(prompt: str) -> str | None:
    """The first of RELATIONS that the prompt contains, as a part of its text."""
    return next((relation for relation in RELATIONS if relation in prompt), None)


def label_of(noun: str) -> str:
    """The detector's name for an object: girls, boys, men and women are persons."""
    return "person" if noun in PERSONS else noun


def iou(box1: Box, box2: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 if both have no area."""
    sides = [max(0.0, min(box1[i + 2], box2[i + 2]) - max(box1[i], box2[i])) for i in (0, 1)]
    shared = sides[0] * sides[1]
    union = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (box1, box2)) - shared
    return shared / union if union else 0.0  # DEVIATION: the official rule divides by zero there


def position(
    relation: str | None, box1: Box, box2: Box, iou_threshold: float = 0.1, distance_threshold: float = 150.0
) -> float:
    """How well a relation holds between two boxes (x1, y1, x2, y2; y points down), in [0, 1].

    Args:
        relation: relation of object 1 to object 2; one that is not in RELATIONS, and "on top of", never hold.
        box1: box of object 1.
        box2: box of object 2.
        iou_threshold: overlap from which a direction counts less.
        distance_threshold: distance between centres, in pixels, below which boxes are near.
    """
    offset = [(box2[i] + box2[i + 2]) / 2 - (box1[i] + box1[i + 2]) / 2 for i in (0, 1)]
    size = [abs(o) for o in offset]
    if relation in NEAR:
        return 1.0 if min(size) < distance_threshold else distance_threshold / max(size)
    if relation not in DIRECTIONS:
        return 0.0
    axis, sign = DIRECTIONS[relation]
    if offset[axis] * sign <= 0 or size[axis] <= size[1 - axis]:
        return 0.0
    overlap = iou(box1, box2)
    return 1.0 if overlap < iou_threshold else iou_threshold / overlap


def spatial_score(prompt: str, nouns: Sequence[str], detections: Sequence[Detection]) -> float:
    """An image's 2D-spatial score: 0, or 0.5 to 1.

    Args:
        prompt: the prompt, which names the relation.
        nouns: the prompt's nouns, in order; the first is object 1, the last object 2.
        detections: the boxes found, best first; the first box of a label is taken.
    """
    first: dict[str, Detection] = {}
    for detection in detections:
        first.setdefault(detection.label, detection)
    one, two = (first.get(label_of(noun)) for noun in (nouns[0], nouns[-1]))
    score = sum(0.25 * found.score for found in (one, two) if found)
    if one and two:
        score += 0.5 * position(relation_of(prompt), one.box, two.box)
    return score if score >= PASSED else 0.0


def resized(height: int, width: int) -> tuple[int, int]:
    """Height and width of UniDet's input: the shorter side is 479, or less if the longer one would pass 480."""
    scale = min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


class Detector:
    """An open-vocabulary detector of transformers.

    All labels are given at one time, and each box goes to its best label, so that one thing is not found under two
    names. A label's score is the sigmoid of its logit; if it has a logit for each token (Grounding DINO), of the best.

    Args:
        name: Hugging Face id or folder of an OWLv2, OWL-ViT, Grounding DINO or MM-Grounding-DINO.
        threshold: score above which a box counts; 0.5 is the official confidence, though for UniDet.
        device: device to run on.

    Raises:
        BenchmarkError: the model cannot be loaded, lacks weights, or is of another kind.
    """

    def __init__(self, name: str, threshold: float = 0.5, device: str = "cpu") -> None:
        self.source, self.threshold, self.device = name, threshold, device
        self._model, self._processor = _load(name)
        self._model.to(device)
        self.kind = self._model.config.model_type

    @property
    def name(self) -> str:
        """The name of this detector's scores: `t2i-spatial-KIND`."""
        return f"t2i-spatial-{self.kind}"

    def describe(self) -> dict:
        """What a result says about its detector."""
        return {"name": self.name, "model": self.source, "threshold": self.threshold}

    @torch.no_grad()
    def __call__(self, image: UInt8[np.ndarray, "h w 3"], labels: Sequence[str]) -> list[Detection]:
        """The boxes of these labels above the threshold, best first."""
        labels = list(dict.fromkeys(labels))
        # UNSTATED: how to ask a detector that reads text, since UniDet reads none; we ask as the detector's authors do.
        asked = labels if "dino" in self.kind else [f"a photo of a {label}" for label in labels]
        inputs = self._processor(images=Image.fromarray(image), text=[asked], return_tensors="pt").to(self.device)
        outputs = self._model(**inputs)
        scores = outputs.logits[0].float().sigmoid()
        if "dino" in self.kind:
            scores = self._by_label(scores, inputs["input_ids"][0], len(labels))
        best, which = scores.max(dim=-1)
        boxes = self._in_pixels(outputs.pred_boxes[0].float(), image.shape[0], image.shape[1])
        found = [i for i in best.argsort(descending=True, stable=True).tolist() if best[i] > self.threshold]
        return [Detection(labels[int(which[i])], boxes[i].tolist(), float(best[i])) for i in found]

    def _by_label(self, scores: Float[Tensor, "q t"], ids: Tensor, count: int) -> Float[Tensor, "q l"]:
        """Per label, the score of its best token; the text is `[CLS] label . label . [SEP]`."""
        tokenizer = self._processor.tokenizer
        stop = ids == tokenizer.convert_tokens_to_ids(".")
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids, device=ids.device))
        label = torch.where(stop | special, -1, stop.cumsum(0))
        return torch.stack([scores[:, : len(ids)][:, label == k].amax(dim=-1) for k in range(count)], dim=-1)

    def _in_pixels(self, boxes: Float[Tensor, "q 4"], height: int, width: int) -> Float[Tensor, "q 4"]:
        """Corners of boxes in pixels of the resized image, from centres and sizes as shares of the model's input."""
        centre, half = boxes[:, :2], boxes[:, 2:] / 2
        high, wide = resized(height, width)
        side = max(high, wide)  # OWLv2 sees the image padded to a square, right and below
        sides = (side, side) if self.kind == "owlv2" else (wide, high)
        scale, edge = torch.tensor([*sides] * 2).to(boxes), torch.tensor([wide, high] * 2).to(boxes)
        return (torch.cat([centre - half, centre + half], dim=-1) * scale).clamp(min=0).minimum(edge)


def _load(name: str) -> tuple:
    from transformers import AutoConfig, AutoModelForZeroShotObjectDetection, AutoProcessor

    try:
        kind = AutoConfig.from_pretrained(name).model_type
        if kind not in DETECTORS:
            raise BenchmarkError(f"{name} is a {kind} model; name a detector of these kinds: {', '.join(DETECTORS)}")
        model, report = AutoModelForZeroShotObjectDetection.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True
        )
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        if isinstance(error, BenchmarkError):
            raise
        raise BenchmarkError(
            f"{name} cannot be loaded as a detector: {error}; name a Hugging Face id or a folder with config.json, "
            "weights and processor"
        ) from error
    if report["missing_keys"]:
        raise BenchmarkError(f"{name} is not a detector: it lacks {min(report['missing_keys'])} and others")
    return model.eval(), processor
