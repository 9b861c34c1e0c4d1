"""The paper's stages as recipes that are laid over one another, counted once for all tests of a process."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

from jsonargparse import Namespace

from lidit.models.source import sizes_alone
from lidit.module import TextToImage
from lidit.plan.costs import Counts, count, planned
from lidit.plan.disk import saved
from lidit.plan.hours import gpu_hours
from lidit.plan.memory import GB, Plan
from lidit.plan.plan import read

CONFIGS = Path(__file__).parents[2] / "experiments/configs"


class Stage(NamedTuple):
    """Recipes without their overlay, the side of their pictures, and the paper's batch."""

    recipes: tuple[str, ...]
    pixels: int
    batch: int


SMALL, LARGE = ("lidit_1b",), ("lidit_10b",)
FINE = ("lidit_10b", "lidit_10b_1024")
STAGES = {  # by overlay; batches are Table 7's, and section 4's for the ablations
    "ablation": Stage(("ablation",), 256, 256),
    "lidit_1b": Stage(SMALL, 256, 2048),
    "lidit_1b_8gpu": Stage(SMALL, 256, 2048),
    "lidit_1b_64gpu": Stage(SMALL, 256, 2048),
    "lidit_10b": Stage(LARGE, 512, 4096),
    "lidit_10b_64gpu": Stage(LARGE, 512, 4096),
    "lidit_10b_1024": Stage(FINE, 1024, 4096),
    "lidit_10b_1024_64gpu": Stage(FINE, 1024, 4096),
}


FIRST, SECOND, THIRD = ("lidit_1b",), ("lidit_1b", "lidit_1b_512"), ("lidit_1b", "lidit_1b_1024")
TABLE = {  # the rows of docs/paper_scale.md: recipes, overlay, side of a picture, steps where the recipe names none
    "1B, 256 px": (FIRST, "lidit_1b", 256, None),
    "1B, 512 px": (SECOND, "lidit_1b", 512, 100_000),
    "1B, 1024 px": (THIRD, "lidit_1b", 1024, 50_000),
    "10B, 512 px": (LARGE, "lidit_10b", 512, None),
    "10B, 1024 px": (FINE, "lidit_10b_1024", 1024, 100_000),
}


def row(stage: str) -> str:
    """A row of docs/paper_scale.md, from what is counted."""
    recipes, overlay, pixels, steps = TABLE[stage]
    given, _, plan, counts = laid_out(recipes, overlay, pixels, *(["--trainer.max_steps", str(steps)] if steps else []))
    batch, days = plan.images * given.trainer.accumulate_grad_batches, gpu_hours(given, plan) / 24
    written = saved(given, plan, counts)
    cells = [
        stage,
        f"{given.trainer.max_steps:,}",
        f"{batch:,}",
        f"{given.trainer.max_steps * batch / 1e6:,.0f}M",
        str(plan.gpus),
        f"{days:,.0f}",
        f"{days / plan.gpus:,.1f}",
        f"{written.total / GB:.1f} GB",
        f"{plan.total / GB:.0f} GB",
        "not run",
    ]
    return f"| {' | '.join(cells)} |"


def share(stage: str) -> str:
    """A row of the operations there: TFLOP an image of backbone, prompt encoder, both LLMs, VAE, and all."""
    recipes, overlay, pixels, _ = TABLE[stage]
    plan = laid_out(recipes, overlay, pixels)[2]
    backbone, encoder, first, second, vae = plan.operations().values()
    numbers = [backbone, encoder, first + second, vae, plan.flops]
    return f"| {stage} | {' | '.join(f'{number / 1e12:.2f}' for number in numbers)} |"


def words(recipes: tuple[str, ...], overlay: str | None = None) -> list[str]:
    """A stage on the command line."""
    files = [CONFIGS / f"{name}.yaml" for name in recipes]
    files += [CONFIGS / "cluster" / f"{overlay}.yaml"] if overlay else []
    return [word for file in files for word in ("--config", str(file))]


@cache
def counted(recipes: tuple[str, ...], pixels: int) -> Counts:
    """What a stage's model takes, whatever overlay it has."""
    with sizes_alone():
        return count(*read([*words(recipes), "--pixels", str(pixels)]))


def laid_out(
    recipes: tuple[str, ...], overlay: str, pixels: int, *more: str
) -> tuple[Namespace, TextToImage, Plan, Counts]:
    """A stage with an overlay, as `lidit plan` has it."""
    with sizes_alone():
        given, model = read([*words(recipes, overlay), "--pixels", str(pixels), *more])
        counts = counted(recipes, pixels)
        return given, model, planned(given, model, counts), counts
