"""Bundle the trained miniature LI-DiT, and score it, or any other model, on the miniature benchmarks.

lidit fit --config experiments/configs/mini.yaml --run runs/mini --resume auto
python -m experiments.mini_lidit bundle --checkpoint runs/mini/checkpoints/latest
python -m experiments.mini_lidit score --checkpoint bundled:lidit --benchmark geneval --count 100
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from textwrap import fill
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

from experiments.cards import versions, write_card
from lidit.checkpoint import record
from lidit.demo import as_png
from lidit.export import export
from lidit.pipeline import BUNDLED, Pipeline
from lidit.scenes import benchmarks

HEADLINE = "heldout"


def score(
    checkpoint: str = BUNDLED,
    benchmark: str = HEADLINE,
    count: int = 100,
    seed: int = 0,
    steps: int = 25,
    guidance: float = 3.0,
    sampler: Literal["euler", "heun", "ddim"] | None = None,
) -> dict[str, float]:
    """Draw the prompts of a miniature benchmark and print the judge's scores in [0, 1].

    Args:
        checkpoint: a checkpoint as for `lidit sample`.
        benchmark: heldout, attributes, geneval, positional_bias or dense.
        count: prompts per task.
        seed: seed of prompts and noise.
        steps: sampling steps.
        guidance: classifier-free guidance scale.
        sampler: a sampler as for `lidit sample`; heun evaluates the model twice a step.
    """
    questions = benchmarks.prompts(benchmark, count, seed)
    seeds = [seed + i for i in range(len(questions))]
    settings = {"batch_size": 50, "steps": steps, "guidance": guidance, "sampler": sampler}
    drawn = Pipeline.load(checkpoint)([q.text for q in questions], seeds, **settings)
    scores = {task: round(value, 4) for task, value in benchmarks.score(benchmark, questions, drawn).items()}
    print(json.dumps({benchmark: scores}), flush=True)
    return scores


def bundle(
    checkpoint: str,
    out: str = "lidit/assets/lidit",
    picture: str = "docs/samples.png",
    count: int = 500,
    others: int = 100,
    training: str = "lidit fit --config experiments/configs/mini.yaml",
) -> None:
    """Export a checkpoint's averaged weights in bfloat16, score them, and write the card and a picture of samples.

    Args:
        checkpoint: a checkpoint of `lidit fit`.
        out: folder to write; an old one is replaced.
        picture: PNG of samples to write.
        count: held-out prompts per task.
        others: prompts per task of the other miniature benchmarks.
        training: the command that made the checkpoint, for the card.
    """
    fresh = Path(out).with_name(".new-" + Path(out).name)
    shutil.rmtree(fresh, ignore_errors=True)
    export(checkpoint, str(fresh), dtype="bfloat16")
    measured = {name: score(str(fresh), name, count if name == HEADLINE else others) for name in benchmarks.TASKS}
    measured[f"{HEADLINE}, heun"] = score(str(fresh), HEADLINE, count, sampler="heun")
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
    write_card(
        Path(out),
        made_by=training,
        seed=0,
        data=f"drawn 64x64 scenes; measured on {count} prompts per held-out task and {others} per other task, 25 "
        "steps, Euler's unless said otherwise, guidance 3, seed 0",
        optimizer_steps=record(Path(checkpoint))["global_step"],
        measured=measured,
        versions=versions("torch", "lightning", "transformers", "diffusers"),
    )
    show(picture)


def show(picture: str = "docs/samples.png", seed: int = 0) -> None:
    """Draw six held-out prompts of each headline task with the bundled model into one PNG; none is picked by hand.

    Args:
        picture: PNG to write.
        seed: seed of prompts and noise.
    """
    questions = benchmarks.prompts(HEADLINE, 6, seed)
    drawn = Pipeline.load()([q.text for q in questions], [seed + i for i in range(len(questions))])
    figure = Figure(figsize=(14, 10.5))
    axes = figure.subplots(4, 6)
    for axis, question, image in zip(axes.flat, questions, drawn, strict=True):
        held = all(benchmarks.facts_held(question.facts, np.asarray(image)))
        axis.imshow(image)
        axis.set_title(fill(question.text, 30), fontsize=8, color="black" if held else "firebrick")
        axis.axis("off")
    Path(picture).parent.mkdir(parents=True, exist_ok=True)
    Path(picture).write_bytes(as_png(figure))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli({"score": score, "bundle": bundle, "show": show}, as_positional=False)
