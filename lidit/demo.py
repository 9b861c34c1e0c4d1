"""The whole story in minutes: draw scenes, train a small LI-DiT, compare it with the bundled one, write a report."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import shutil
import time
from importlib.resources import files
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure  # without pyplot, which would choose a backend

from data_prep.precompute import precompute
from data_prep.shard import shard
from lidit.disk.folder import METRICS
from lidit.fit import run
from lidit.pipeline import BUNDLED, Pipeline
from lidit.scenes.benchmarks import Prompt, prompts, score

BENCHMARK = "heldout"
SAMPLER_STEPS, GUIDANCE = 20, 3.0
SHOWN = 4  # prompts per task in the picture
SCORES = {"clip_score/scenes": "CLIP score", "siglip_score/scenes": "SigLIP score", "judge/overall": "judge"}

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>lidit demo</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse }} td, th {{ padding: .3rem 1rem; border-bottom: 1px solid #ccc; text-align: right }}
th:first-child, td:first-child {{ text-align: left }} img {{ max-width: 100% }}
code {{ background: #f2f2f2; padding: 0 .2rem }}
</style></head><body>
<h1>lidit demo</h1>
<p>A small LI-DiT was trained from scratch for {minutes:.1f} minutes ({done} of {steps} steps) on {scenes} drawn
scenes. Below it stands beside the bundled model, which is larger and was trained for longer. Both drew the same
{count} prompts about looks that training never showed, from the same noise, and the judge read the pictures back.</p>
<h2>Scores</h2>
<p>Share of pictures in which everything the prompt states is true.</p>
<table><tr><th>prompts</th><th>trained just now</th><th>bundled</th></tr>
{rows}</table>
<h2>Pictures</h2>
<p>In each pair: left the model trained just now, right the bundled one.</p>
<img alt="Pairs of pictures with their prompts" src="data:image/png;base64,{samples}">
<h2>While training</h2>
<p>What a model of open_clip says of the pictures (100 times the cosine of picture and prompt), and what the judge does.
Both scorers are bundled miniatures; their numbers mean nothing beside those of the large ones.</p>
<img alt="CLIP score, SigLIP score and the judge's score over steps" src="data:image/png;base64,{scores}">
<img alt="Training loss over steps" src="data:image/png;base64,{loss}">
<h2>Next</h2>
<p><code>lidit sample "a red circle to the left of a blue square" --out out.png</code> draws with the bundled model;
<code>--checkpoint {checkpoint}</code> with the one trained just now.</p>
</body></html>
"""


def demo(
    out: str = "runs/demo", steps: int = 1000, scenes: int = 4000, prompts_per_task: int = 16, seed: int = 0
) -> None:
    """Train a small model for some minutes, then compare it with the bundled one; writes a report.

    Args:
        out: folder to write: report.html, samples.png, scores.json and the training run.
        steps: of training; the learning rate decays over them.
        scenes: drawn images to train on.
        prompts_per_task: held-out prompts of each kind that both models draw.
        seed: of scenes, weights, prompts and noise.
    """
    folder = Path(out)
    say(1, f"drawing {scenes} scenes with captions into {folder}/shards")
    shard(str(folder / "shards"), count=scenes, seed=seed)
    say(2, "encoding them with the bundled autoencoder, once")
    precompute(str(folder / "shards"), str(folder / "latents"), "bundled:vae")
    say(3, f"training a small LI-DiT for {steps} steps, or 6 minutes; loss and checkpoint go to {folder}/run")
    start = time.monotonic()
    checkpoint, done = train(folder, steps, seed)
    minutes = (time.monotonic() - start) / 60
    questions = prompts(BENCHMARK, prompts_per_task, seed)
    say(4, f"drawing {len(questions)} held-out prompts with both models, and judging the pictures")
    drawn = {name: draw(source, questions, seed) for name, source in (("demo", str(checkpoint)), ("bundled", BUNDLED))}
    scores = {name: score(BENCHMARK, questions, images) for name, images in drawn.items()}
    say(5, "writing the report")
    picture, run_folder = pairs(questions, drawn, prompts_per_task), folder / "run"
    (folder / "samples.png").write_bytes(picture)
    settings = {"steps": steps, "scenes": scenes, "seed": seed, "prompts_per_task": prompts_per_task}
    record = {
        **settings,
        "steps_done": done,
        "sampler_steps": SAMPLER_STEPS,
        "guidance": GUIDANCE,
        "minutes": round(minutes, 2),
    }
    (folder / "scores.json").write_text(json.dumps({**record, "scores": scores}, indent=2) + "\n")
    rows = "".join(
        f"<tr><td>{html.escape(task)}</td><td>{scores['demo'][task]:.2f}</td><td>{scores['bundled'][task]:.2f}</td></tr>\n"
        for task in scores["demo"]
    )
    page = PAGE.format(
        minutes=minutes,
        done=done,
        steps=steps,
        scenes=scenes,
        count=len(questions),
        rows=rows,
        samples=base64.b64encode(picture).decode(),
        loss=base64.b64encode(curve(run_folder, {"train/loss": "loss"})).decode(),
        scores=base64.b64encode(curve(run_folder, SCORES)).decode(),
        checkpoint=html.escape(str(checkpoint)),
    )
    (folder / "report.html").write_text(page)
    for task in scores["demo"]:
        print(f"  {task:<10} trained just now {scores['demo'][task]:.2f}   bundled {scores['bundled'][task]:.2f}")
    print(f"Look at {folder}/report.html (pictures: {folder}/samples.png, numbers: {folder}/scores.json).")


def say(stage: int, what: str) -> None:
    """Announce a stage."""
    print(f"\n[{stage}/5] {what}", flush=True)


def train(folder: Path, steps: int, seed: int) -> tuple[Path, int]:
    """Train by the recipe experiments/configs/demo.yaml, as `lidit fit` would.

    Returns:
        the checkpoint, and how many steps there was time for.
    """
    shutil.rmtree(folder / "run", ignore_errors=True)
    recipe = files("experiments") / "configs" / "demo.yaml"
    settings = {
        "seed_everything": seed,
        "data.train": folder / "shards",
        "data.cache": folder / "latents",
        "trainer.max_steps": steps,
        "trainer.logger.init_args.save_dir": folder,
    }
    fitted = run("fit", ["--config", str(recipe), *(f"--{key}={value}" for key, value in settings.items())])
    checkpoint = folder / "run" / "model.ckpt"
    fitted.trainer.save_checkpoint(checkpoint, weights_only=False)
    return checkpoint, fitted.trainer.global_step


def draw(source: str, questions: list[Prompt], seed: int) -> list[np.ndarray]:
    """One picture per prompt, each from its own noise."""
    seeds = [seed + i for i in range(len(questions))]
    pipeline = Pipeline.load(source)
    return pipeline([q.text for q in questions], seeds, steps=SAMPLER_STEPS, guidance=GUIDANCE)


def pairs(questions: list[Prompt], drawn: dict[str, list[np.ndarray]], per_task: int) -> bytes:
    """A PNG of the first prompts of each task: pairs of pictures, the prompt above."""
    tasks, shown = len(questions) // per_task, min(SHOWN, per_task)
    figure = Figure(figsize=(3.4 * shown, 2.2 * tasks))
    axes = figure.subplots(tasks, shown, squeeze=False)
    for axis, (task, i) in zip(axes.flat, np.ndindex(tasks, shown), strict=True):
        at = task * per_task + i
        gap = np.full((drawn["demo"][at].shape[0], 4, 3), 255, np.uint8)
        axis.imshow(np.concatenate([drawn["demo"][at], gap, drawn["bundled"][at]], 1))
        axis.set_title(fill(questions[at].text, 48), fontsize=8)
        axis.axis("off")
    return as_png(figure)


def curve(run_folder: Path, columns: dict[str, str]) -> bytes:
    """A PNG of a run's logged numbers over steps, an axis for each column of its metrics.csv, by their labels."""
    with (next(run_folder.rglob(METRICS))).open() as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(8, 3))
    axes = figure.subplots(1, len(columns), squeeze=False)
    for axis, (column, label) in zip(axes.flat, columns.items(), strict=True):
        points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
        axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 20 else None)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.set_ylim(bottom=min([0.0, *(value for _, value in points)]))
    return as_png(figure)


def as_png(figure: Figure) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
