"""The stages of a rehearsal: each plays commands of lidit on the small recipe, and looks at what they left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import yaml

from lidit.callbacks.ema import EMA
from lidit.disk.folder import CHECKPOINTS, checkpoints_in
from lidit.jobs.state import STOPPED_CODE
from lidit.rehearsal.data import with_drawn_data
from lidit.rehearsal.play import Failed
from lidit.rehearsal.shared import FAILED, SKIPPED, Play, Verdict, timed
from lidit.rehearsal.small import STEPS, STOP, Ranks
from lidit.rehearsal.whole import whole_run
from lidit.rehearsal.witness import batches, losses

SAME, NEAR, NEAR_BF16 = 1e-6, 1e-3, 5e-3  # relative differences of losses: same CPU ranks; others; those in bfloat16
BENCHMARK = ("scenes-attributes", "--count_per_task", "1")
NEXT = 2  # steps of the next stage, on pictures of twice the side


def played(play: Play) -> Iterator[Verdict]:
    """Play the life of a recipe, and give a verdict on each stage as soon as it is known."""
    first = list(whole_run(play))
    yield from first
    stages: list[tuple[str, Callable[[Play], str]]] = [
        ("stop signal, requeue, resume", resumed),
        ("same losses as uninterrupted", same_losses),
        ("resume on another number of ranks", other_ranks),
        ("next stage by --start_from", next_stage),
        ("export", exported),
        ("sample", sampled),
        ("sample --benchmark, score", benchmark),
    ]
    if any(verdict.verdict == FAILED for verdict in first):
        yield from (Verdict(name, SKIPPED, 0.0, "not played: the first run failed") for name, _ in stages)
        return
    for name, stage in stages:
        yield timed(name, lambda stage=stage: stage(play))


def resumed(play: Play) -> str:
    """Told to stop by a signal on one rank, a run saves, and the same command goes on to the end."""
    play.fit("stopped", "stopped", "--resume", "auto", stop_at=STOP, expected=STOPPED_CODE)
    shutil.copytree(play.run("stopped"), play.run("elsewhere"), symlinks=True)
    play.fit("resumed", "stopped", "--resume", "auto")
    return f"stopped after step {STOP} with exit code {STOPPED_CODE}, went on to {STEPS}"


def same_losses(play: Play) -> str:
    """The losses of the run that was stopped are those of the one that was not."""
    allowed = near(play) if play.recipe["trainer"]["accelerator"] == "gpu" else SAME  # a GPU adds in any order
    return compared(of_all_ranks(play, "whole"), of_all_ranks(play, "stopped"), allowed)


def of_all_ranks(play: Play, run: str) -> list[float]:
    """The losses of a run in which no rank came less far than another.

    Raises:
        Failed: one did.
    """
    counts = batches(play.notes(run))
    if len(set(counts)) != 1:
        raise Failed(f"the ranks of {run} trained on {counts} batches")
    return losses(play.notes(run))


def near(play: Play) -> float:
    """How far losses may be apart that were added up in another order."""
    return NEAR_BF16 if "bf16" in str(play.recipe["trainer"]["precision"]) else NEAR


def other_ranks(play: Play) -> str:
    """Half as many ranks go on, or two where there was one."""
    ranks = Ranks(1, play.ranks.all // 2) if play.ranks.all > 1 else Ranks(2, 1)
    if play.recipe["trainer"]["accelerator"] == "gpu" and ranks.all > torch.cuda.device_count():
        return "- there is one GPU"
    play.fit("other", "elsewhere", "--resume", "auto", ranks=ranks)
    rest = of_all_ranks(play, "elsewhere")
    said = compared(of_all_ranks(play, "whole")[STOP * play.passes :], rest, near(play))
    return f"{play.ranks.all} to {ranks.all}: {said}"


def compared(whole: list[float], other: list[float], allowed: float) -> str:
    """How far losses are apart.

    Raises:
        Failed: there are more or fewer, or they are too far apart.
    """
    if len(whole) != len(other):
        raise Failed(f"{len(other)} batches instead of {len(whole)}: some were lost or shown again")
    apart = max((abs(a - b) / max(abs(a), 1e-12) for a, b in zip(whole, other, strict=True)), default=0.0)
    if apart > allowed:
        raise Failed(f"losses differ by {apart:.1e} of themselves, and {allowed:.0e} is allowed")
    return f"{len(other)} losses, at most {apart:.1e} apart (allowed: {allowed:.0e})"


def next_stage(play: Play) -> str:
    """Train on from the run's weights, on pictures of twice the side."""
    sizes = [(2 * width, 2 * height) for width, height in play.sizes]
    run = lambda argv: play.player("next-data", argv)  # noqa: E731
    recipe = with_drawn_data(play.recipe, play.folder / "data" / "next", sizes, f"{play.url}/next", run)
    replace(play, recipe=recipe).fit(
        *("next", "next", "--start_from", str(play.run("whole")), "--trainer.max_steps", str(NEXT)),
        *("--start_ema", str(averages(play)).lower()),
    )
    return f"{sizes[0][0]}x{sizes[0][1]} px, loss {losses(play.notes('next'))[-1]:.4f}"


def exported(play: Play) -> str:
    """The run becomes a folder."""
    words = ["--out", str(play.folder / "exported"), "--ema", str(averages(play)).lower(), *trust(play)]
    play.player("export", ["export", str(play.run("whole")), *words])
    return "from the run's folder"


def sampled(play: Play) -> str:
    """The exported folder draws a sentence."""
    out = play.folder / "sample.png"
    source = ["--checkpoint", str(play.folder / "exported"), *trust(play)]
    play.player("sample", ["sample", "a red circle", "--steps", "2", "--out", str(out), *source])
    if not out.is_file():
        raise Failed(f"{out} was not written")
    return "from the exported folder"


def benchmark(play: Play) -> str:
    """The newest checkpoint draws a benchmark's pictures, which are scored."""
    out, name = play.folder / "pictures", BENCHMARK[0]
    newest = checkpoints_in(play.run("whole") / CHECKPOINTS)[0]
    source = ["--checkpoint", str(newest), "--out", str(out), "--steps", "2", *trust(play)]
    ema = ["--ema", str(averages(play)).lower()]
    play.player("benchmark", ["sample", "--benchmark", *BENCHMARK, *source, *ema])
    play.player("score", ["score", str(out)])
    return f"{name} from {newest.name}"


def trust(play: Play) -> list[str]:
    """The option that names the modules besides lidit that the recipe's classes are from."""
    return ["--trust", yaml.safe_dump(play.trusted, default_flow_style=True).strip()] if play.trusted else []


def averages(play: Play) -> bool:
    """Whether the recipe keeps an average of the weights."""
    return any(isinstance(callback, EMA) for callback in play.callbacks)
