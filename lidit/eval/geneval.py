"""GenEval (Ghosh et al., 2023): are a prompt's objects in the picture, in the right number, colour and place?

A detector finds objects, CLIP names colours, and the rules of `geneval_rules.py` judge what was found. Rules and
colours are the official ones. The detector is not: the official one is mmdet's Mask2Former, and ours is transformers',
of the same architecture from another training run. So our scores are a variant, `geneval-m2f-hf`, which cannot be
compared with published scores.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from lidit.eval.geneval_rules import COLORS, Metadata, summary, verdict
from lidit.eval.mask2former import Mask2Former
from lidit.eval.openclip import CLIP, OpenCLIP
from lidit.eval.suite import Picture, Suite, present, prompt_file, read_image

NAME = "geneval-m2f-hf"
PROMPTS, PUBLISHED = "evaluation_metadata.jsonl", "https://github.com/djghosh13/geneval, prompts/"
GIT_BLOB = "efc21c7e639cd45554a1e44fac87157211f16d51"  # git hash-object of the file at commit af4902f
IMAGES_PER_PROMPT = 4
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BACKGROUND = 0x99  # grey level outside the object whose colour is asked
_NAMES = """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock,
    vase, scissors, teddy bear, hair drier, toothbrush
"""
# COCO's 80 classes in their order; for a mouse, a remote and a keyboard GenEval adds what they belong to
CLASSES = tuple(name.strip() for name in _NAMES.split(","))


def suite(prompts_dir: Path) -> Suite:
    """The pictures to draw, 4 for each of 553 prompts, with their metadata, in the official layout.

    Args:
        prompts_dir: folder with evaluation_metadata.jsonl from the authors' prompts folder.

    Raises:
        BenchmarkError: the file is missing, or is not the published one.
    """
    text, sha256 = prompt_file(prompts_dir, PROMPTS, PUBLISHED, GIT_BLOB)
    lines = text.splitlines()
    pictures = [
        Picture(f"{i:05d}/samples/{k:04d}.png", json.loads(line)["prompt"], sample=k)
        for i, line in enumerate(lines)
        for k in range(IMAGES_PER_PROMPT)
    ]
    files = {f"{i:05d}/metadata.jsonl": f"{line}\n" for i, line in enumerate(lines)}
    return Suite("geneval", pictures, {str(prompts_dir / PROMPTS): sha256}, files)


def score(
    run: Path,
    prompts_dir: Path,
    detector: str = "facebook/mask2former-swin-small-coco-instance",
    color_model: str = CLIP[0],
    color_weights: str = CLIP[1],
    device: str = "cpu",
    allow_missing: bool = False,
) -> dict[str, Any]:
    """Judge a run's pictures.

    Args:
        run: folder that `lidit sample --benchmark geneval`, or another generator in the official layout, wrote.
        prompts_dir: folder with evaluation_metadata.jsonl from the authors' prompts folder.
        detector: Hugging Face id or folder of a Mask2Former for COCO's instances.
        color_model: CLIP's architecture, as open_clip names it.
        color_weights: tag or file of CLIP's weights; or a folder or hf-hub:OWNER/NAME with an architecture of its own.
        device: device to run both models on.
        allow_missing: judge a run that lacks pictures.

    Returns:
        `scores` in [0, 1] of the tasks that have images, and `overall`, their mean; how many images were demanded and
        scored; `tasks`, `correct_images` and `correct_prompts` as in `Summary`; the `judges`; and `images`, each with
        its verdict and the boxes that count.

    Raises:
        BenchmarkError: pictures are missing or unreadable, the prompts are not the published ones, or a model cannot be
            loaded.
    """
    demanded = suite(prompts_dir)
    found = set(present(run, [picture.path for picture in demanded.pictures], allow_missing))
    clip = OpenCLIP(color_model, color_weights, device).load()
    judge = Judge(Mask2Former(detector, len(CLASSES), device), ColorClassifier(clip))
    images, results = [], []
    for picture in demanded.pictures:
        if picture.path in found:
            metadata = json.loads(demanded.files[f"{picture.path.split('/')[0]}/metadata.jsonl"])
            judged = judge(read_image(run / picture.path), metadata)
            images.append({"image": picture.path, "tag": metadata["tag"], "prompt": picture.prompt} | judged)
            results.append((metadata, judged["correct"]))
    total = summary(results)
    return {
        "name": NAME,
        "scores": {tag: right / count for tag, (right, count) in total.tasks.items()} | {"overall": total.overall},
        "images_demanded": len(demanded.pictures),
        "images_scored": total.images,
        "correct_images": total.correct_images,
        "correct_prompts": total.correct_prompts,
        "tasks": {tag: {"correct": right, "images": count} for tag, (right, count) in total.tasks.items()},
        "judges": {"detector": detector, "color": clip.describe()},
        "images": images,
    }


class Judge:
    """The detector, the colours and the rules together.

    Args:
        detector: finds objects of CLASSES in an image.
        color: names the colour of an object, from the image and the object's mask, box (x1, y1, x2, y2) and name.
    """

    def __init__(self, detector: Callable, color: Callable[..., str]) -> None:
        self.detector, self.color = detector, color

    def __call__(self, image: UInt8[np.ndarray, "h w 3"], metadata: Metadata) -> dict[str, Any]:
        """An image's verdict for JSON: `correct`, `reason`, and per class the `boxes` that count, best first."""
        found = self.detector(image)
        scored = torch.cat([found.boxes.double(), found.scores.double()[:, None]], 1).cpu().tolist()
        members: dict[str, list[int]] = {}
        for i, label in enumerate(found.labels.tolist()):
            members.setdefault(CLASSES[label], []).append(i)

        def color_of(name: str, k: int) -> str:
            i = members[name][k]
            return self.color(image, found.masks[i].cpu().numpy(), [int(x) for x in scored[i][:4]], name)

        boxes = {name: [scored[i] for i in indices] for name, indices in members.items()}
        judged = verdict(metadata, boxes, color_of)
        kept = {name: [boxes[name][k] for k in indices] for name, indices in judged.kept.items()}
        return {"correct": judged.correct, "reason": judged.reason, "boxes": kept}


class ColorClassifier:
    """Names an object's colour by CLIP: the one of COLORS whose texts are nearest to the cut-out object.

    DEVIATION: CLIP runs in float32; the official evaluator lets torch choose half precision.

    Args:
        clip: any CLIP; the official one is open_clip's ViT-L-14 of OpenAI, with the QuickGELU it was trained with.
    """

    def __init__(self, clip: OpenCLIP) -> None:
        self.clip = clip
        self._texts: dict[str, Tensor] = {}

    def __call__(
        self, image: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"], box: Sequence[int], name: str
    ) -> str:
        """The colour of the object under a mask.

        Args:
            image: RGB image.
            mask: True on the object.
            box: x1, y1, x2, y2 around the object, x2 and y2 exclusive.
            name: the object's name, in GenEval's words.
        """
        if name not in self._texts:
            self._texts[name] = self.texts(name)
        seen = self.clip.images([cut_out(image, mask, box)])[0]
        return COLORS[int((self._texts[name] @ seen).argmax())]

    def texts(self, name: str) -> Float[Tensor, "c e"]:
        """An embedding of length 1 for each of COLORS: the normalised mean of its templates' normalised embeddings."""
        sentences = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
        embedded = self.clip.texts(sentences).unflatten(0, (len(COLORS), len(TEMPLATES)))
        return F.normalize(embedded.mean(1), dim=-1)


def cut_out(
    image: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"], box: Sequence[int]
) -> UInt8[np.ndarray, "bh bw 3"]:
    """The part of an image within a box (x1, y1, x2, y2, exclusive), grey (#999) outside the mask."""
    x1, y1, x2, y2 = box
    return np.where(mask[..., None], image, np.uint8(BACKGROUND))[y1:y2, x1:x2]
