"""CLIP score, SigLIP score and CLIP-IQA of a folder of pictures, each with the prompt that its file holds.

python -m experiments.picture_scores score --pictures runs/a --out runs/b --clip bundled:clip --siglip bundled:siglip
"""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from lidit.disk.folder import SCORES
from lidit.disk.whole import write_text
from lidit.eval.metrics import CLIPIQA, CLIPScore, SigLIPScore
from lidit.eval.openclip import OpenCLIP
from lidit.eval.suite import read_image

BATCH = 64


def score(pictures: str, out: str, clip: str = "openai", siglip: str = "webli") -> None:
    """Score every PNG below a folder, and write the means to `OUT/scores.json`.

    Args:
        pictures: a folder that `lidit sample` wrote; a picture that holds no prompt is an error.
        out: folder to write.
        clip: open_clip weights of a CLIP model: `bundled:clip`, a folder, or a tag of ViT-L-14-quickgelu.
        siglip: likewise for a SigLIP model; a tag is one of ViT-SO400M-14-SigLIP-384.

    Raises:
        ValueError: there is no picture, or one holds no prompt.
    """
    found = sorted(Path(pictures).rglob("*.png"))
    if not found:
        raise ValueError(f"there is no PNG in {pictures}; draw some with lidit sample")
    clips = OpenCLIP(pretrained=clip)
    metrics = {
        "clip": CLIPScore(clips),
        "siglip": SigLIPScore(OpenCLIP("ViT-SO400M-14-SigLIP-384", siglip)),
        "clip_iqa": CLIPIQA(clips),
    }
    for first in range(0, len(found), BATCH):
        batch = found[first : first + BATCH]
        images, prompts = [read_image(path) for path in batch], [prompt_of(path) for path in batch]
        for metric in metrics.values():
            metric.update(images, prompts)
    scores = {name: float(metric.compute()) for name, metric in metrics.items()}
    record = {
        "benchmark": "picture-scores",
        "name": f"picture-scores, {clip}, {siglip}",
        "scores": scores,
        "images_demanded": len(found),
        "images_scored": len(found),
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    write_text(Path(out) / SCORES, json.dumps(record, indent=2) + "\n")
    print(f"{out}: {len(found)} pictures, {scores}")


def prompt_of(path: Path) -> str:
    """The prompt that a picture was drawn for.

    Raises:
        ValueError: the file holds no prompt.
    """
    with Image.open(path) as image:
        if "prompt" not in image.info:
            raise ValueError(f"{path} holds no prompt; score pictures that lidit sample wrote")
        return image.info["prompt"]


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli({"score": score}, as_positional=False)
