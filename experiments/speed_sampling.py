"""How fast and how well the bundled model draws with different numbers of evaluations.

Each sampler draws the same prompts from the same noise with (about) the same numbers of evaluations, and the judge
scores the pictures. Speed is that of `Pipeline`, from sentences to pixels, beside a PixArt-alpha pipeline of diffusers
that has the same VAE and a transformer of the same depth, width, heads and patch, and receives its text as features.
Both draw the same batch in turn, for several rounds in one process, with guidance in one batch, and are compared within
each round.

    python -m experiments.speed_sampling run --out experiments/results/speed_sampling.json
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, PixArtAlphaPipeline
from diffusers.models import AutoencoderKL, PixArtTransformer2DModel
from torch import Tensor

from experiments.cards import versions
from experiments.speed_data import machine
from lidit.assets import resolve
from lidit.pipeline import Pipeline
from lidit.pixels import to_uint8
from lidit.scenes import benchmarks

Row = dict[str, Any]
GUIDANCE = 3.0
INTERVAL = (0.2, 1.0)  # the times with guidance in the row that uses none near the data


def run(
    out: str,
    evaluations: list[int] = [5, 10, 25, 50],  # noqa: B006
    benchmark: str = "attributes",
    count: int = 60,
    batch_size: int = 32,
    rounds: int = 5,
    steps: int = 25,
) -> None:
    """Judge pictures and time drawing, print both and write them as JSON.

    Args:
        out: JSON file to write.
        evaluations: numbers of evaluations to judge; heun needs an odd number and takes the next lower one.
        benchmark: a miniature benchmark, of which the overall score is used.
        count: prompts per task.
        batch_size: images in a batch that is timed.
        rounds: how many times the pipelines are timed in turn, after one round that does not count.
        steps: sampling steps of the pipelines that are timed.
    """
    settings, at_start = dict(locals()), machine()
    pipeline = Pipeline.load()
    pipeline.model.cpu()  # the pipeline beside it draws there
    quality = judged(pipeline, benchmark, count, evaluations)
    speed = timed(pipeline, batch_size, rounds, steps)
    found = {"machine": at_start, "versions": versions("torch", "diffusers"), "settings": settings}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(found | {"quality": quality, "speed": speed}, indent=1) + "\n")


def judged(pipeline: Pipeline, benchmark: str, count: int, evaluations: list[int]) -> list[Row]:
    """The judge's overall score in [0, 1] for each sampler and number of evaluations."""
    questions = benchmarks.prompts(benchmark, count, 0)
    prompts, seeds = [q.text for q in questions], list(range(len(questions)))
    rows = []
    for wanted in evaluations:
        for sampler, steps, asked in (
            ("euler", wanted, wanted),
            ("heun", (wanted + 1) // 2, (wanted + 1) // 2 * 2 - 1),
        ):
            images = pipeline(prompts, seeds, batch_size=40, steps=steps, guidance=GUIDANCE, sampler=sampler)
            score = benchmarks.score(benchmark, questions, images)["overall"]
            rows.append({"sampler": sampler, "evaluations": asked, "images": len(images), benchmark: score})
            print(f"{sampler:5} {asked:3} evaluations: {score:.3f}", flush=True)
    return rows


def timed(pipeline: Pipeline, batch_size: int, rounds: int, steps: int) -> list[Row]:
    """For each way to draw a batch: images a second, and their ratio to diffusers' within a round."""
    prompts = [q.text for q in benchmarks.prompts("attributes", batch_size, 0)][:batch_size]
    noise = pipeline.noise(list(range(batch_size)), 64, 64)
    ours = partial(draw, pipeline, prompts, noise, steps)
    ways = {"diffusers, PixArt": beside(pipeline, batch_size, steps), "lidit": ours}
    ways |= {"lidit, guidance from 1 to 0.2 alone": partial(ours, INTERVAL)}
    ways |= {"lidit, its text alone": lambda: pipeline.model.encode_prompts([*prompts, *[""] * batch_size])}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, each in seconds.items():
        ratios = [a / b for a, b in zip(seconds["diffusers, PixArt"][1:], each[1:], strict=True)]
        rate = batch_size / statistics.median(each[1:])
        over = statistics.median(ratios)
        rows.append(
            {"way": name, "images_per_second": rate, "over_diffusers": over, "spread": statistics.pstdev(ratios)}
        )
        print(f"{name}: {rate:.2f} images a second, {over:.2f} of diffusers'", flush=True)
    return rows


@torch.no_grad()
def draw(
    pipeline: Pipeline, prompts: list[str], noise: Tensor, steps: int, interval: tuple[float, float] = (0.0, 1.0)
) -> None:
    """Draw a batch, from sentences to pixels."""
    latent = pipeline.latents(prompts, noise, steps, GUIDANCE, "euler", interval)
    to_uint8(pipeline.model.vae.load(latent.device).decode(latent))


def beside(pipeline: Pipeline, batch_size: int, steps: int) -> Callable[[], object]:
    """A pipeline of diffusers with a model of the same size, untrained, ready to draw a batch."""
    backbone, vae = pipeline.model.backbone, AutoencoderKL.from_pretrained(resolve("bundled:vae")).float()
    block = backbone.blocks[0]
    width, heads = backbone.width, block.self_attention.heads
    transformer = PixArtTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_layers=len(backbone.blocks),
        cross_attention_dim=width,
        caption_channels=width,
        sample_size=8,
        patch_size=backbone.patch,
        use_additional_conditions=False,
    ).eval()
    theirs = PixArtAlphaPipeline(None, None, vae, transformer, DDIMScheduler())
    theirs.set_progress_bar_config(disable=True)
    text = {"prompt_embeds": torch.randn(batch_size, 40, width), "prompt_attention_mask": torch.ones(batch_size, 40)}
    text |= {f"negative_{name}": tensor for name, tensor in text.items()}
    settings = {"guidance_scale": GUIDANCE, "num_inference_steps": steps, "height": 64, "width": 64}
    return partial(theirs, negative_prompt=None, **text, **settings, use_resolution_binning=False, output_type="np")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli({"run": run}, as_positional=False)
