"""How well a model fits held-out scenes: its loss with their captions, and how much larger it is with other captions.

This is a finer measure than the judge, who needs finished pictures: scenes, noise and times are the same for every
model, and there is no sampler. A model that does not read its text gains 0 from the right caption.

    python -m experiments.text_gain score --checkpoint bundled:lidit --out runs/gain
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lidit.disk.folder import SCORES
from lidit.disk.whole import write_text
from lidit.module import TextToImage
from lidit.pipeline import Pipeline
from lidit.pixels import to_tensor
from lidit.scenes.corpus import Example, examples

BATCH = 64


@torch.no_grad()
def losses(model: TextToImage, scenes: list[Example], captions: list[str]) -> Float[Tensor, " n"]:
    """Each scene's loss with its caption, at a noise and a time that depend only on its place in the list."""
    found = []
    for first in range(0, len(scenes), BATCH):
        images = to_tensor([scene.image for scene in scenes[first : first + BATCH]])
        latent = model.vae.load(model.device).encode(images.to(model.device))
        features = model.encode_prompts(captions[first : first + BATCH])
        draws = torch.Generator().manual_seed(first)
        loss, _ = model.objective.loss(lambda x, t, f=features: model.predict(x, t, f), latent, draws)
        found.append(loss)
    return torch.cat(found)


def score(checkpoint: str, out: str, count: int = 256, seed: int = 10_000) -> None:
    """Measure a model on held-out scenes and short captions, and write `OUT/scores.json`.

    Args:
        checkpoint: a checkpoint as for `lidit sample`.
        out: folder to write.
        count: number of scenes.
        seed: seed of the scenes.
    """
    model = Pipeline.load(checkpoint).model
    scenes = list(examples(seed, count, held=True))
    right = [scene.short.text for scene in scenes]
    with_right, with_other = losses(model, scenes, right), losses(model, scenes, right[1:] + right[:1])
    gain = (with_other - with_right).cpu().numpy()
    scores = {"gain": float(gain.mean()), "loss": float(with_right.mean())}
    record = {
        "benchmark": "text-gain",
        "name": "text-gain",
        "scores": scores,
        "standard_error": float(gain.std(ddof=1) / np.sqrt(count)),
        "images_demanded": count,
        "images_scored": count,
        "seed": seed,
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    write_text(Path(out) / SCORES, json.dumps(record, indent=2) + "\n")
    print(f"{out}: {scores}")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli({"score": score}, as_positional=False)
