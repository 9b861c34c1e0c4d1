"""The run that nothing interrupts, and what it must have left behind."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator
from dataclasses import replace

from lidit.callbacks.checkpoints import Checkpoints
from lidit.callbacks.samples import FixedPrompts
from lidit.disk.folder import CHECKPOINTS, METRICS, checkpoints_in, starts
from lidit.rehearsal.play import Failed
from lidit.rehearsal.shared import FAILED, SKIPPED, Play, Verdict, timed
from lidit.rehearsal.small import DRAW, SAVE, STEPS
from lidit.rehearsal.witness import BATCH, TRAINED, VALIDATED, VALIDATING, losses, notes

FIRST, ACCUMULATE, VALIDATE, DRAWS, CHECKPOINT = "first steps", "accumulate", "validate", "draw", "checkpoint"


def whole_run(play: Play) -> Iterator[Verdict]:
    """The run that nothing interrupts: its steps, its validation, its pictures and its checkpoints."""
    names, begun, error = [FIRST, ACCUMULATE, VALIDATE, DRAWS, CHECKPOINT], time.monotonic(), ""
    try:
        play.fit("whole", "whole")
    except Failed as failed:
        error = str(failed)
    seconds, failed_at = time.monotonic() - begun, stage_of(play) if error else ""
    checks = [first_steps, accumulated, validated, drawn, saved]
    for name, check in zip(names, checks, strict=True):
        if name == failed_at:
            yield Verdict(name, FAILED, seconds, error)
        elif error and names.index(name) > names.index(failed_at):
            yield Verdict(name, SKIPPED, 0.0, f"not reached: {failed_at} failed")
        else:
            verdict = timed(name, lambda check=check: check(play))
            yield replace(verdict, seconds=seconds) if name == FIRST else verdict


def stage_of(play: Play) -> str:
    """In which stage a run ended too early, by what its ranks noted last."""
    ranks = notes(play.notes("whole"))
    if not ranks:
        return FIRST
    last = min((rank[-1] for rank in ranks), key=lambda note: note["step"])
    if last["what"] in (VALIDATING, VALIDATED):
        return VALIDATE if last["what"] == VALIDATING else FIRST
    if last["what"] == TRAINED or last["what"] != BATCH:
        return CHECKPOINT
    if last["step"] and last["step"] % DRAW == 0 and draws(play):
        return DRAWS
    if last["step"] == SAVE:
        return CHECKPOINT
    return FIRST if last["step"] != 0 or play.passes == 1 else ACCUMULATE


def draws(play: Play) -> bool:
    """Whether the recipe has a callback that draws."""
    return any(isinstance(callback, FixedPrompts) for callback in play.callbacks)


def first_steps(play: Play) -> str:
    """All steps were taken, with finite losses."""
    found = losses(play.notes("whole"))
    if not found or not all(math.isfinite(loss) for loss in found):
        raise Failed(f"losses are {found}")
    return f"{play.ranks.all} ranks, {len(found)} batches, loss {found[0]:.4f} to {found[-1]:.4f}"


def accumulated(play: Play) -> str:
    """A step took as many batches as the recipe accumulates."""
    if play.passes == 1:
        return "- the recipe accumulates nothing"
    found = len(losses(play.notes("whole")))
    if found != STEPS * play.passes:
        raise Failed(f"{STEPS} steps took {found} batches, not {STEPS * play.passes}")
    return f"{play.passes} batches a step"


def validated(play: Play) -> str:
    """Validation ran, and its loss was logged."""
    if not play.recipe["data"]["val"] or play.recipe["trainer"]["limit_val_batches"] == 0:
        return "- the recipe does not validate"
    found = column(play, "whole", "val/loss")
    if not found or not all(map(math.isfinite, found)):
        raise Failed(f"val/loss in the log: {found}")
    return f"val/loss {found[-1]:.4f}"


def drawn(play: Play) -> str:
    """Pictures were written and scored."""
    if not draws(play):
        return "- no callback draws"
    pictures = list(play.run("whole").rglob("step-*.png"))
    scores = [name for name in header(play, "whole") if "_score/" in name]
    wanted = sum(type(callback).__name__.endswith("ScoreCallback") for callback in play.callbacks)
    if len({name.partition("/")[0] for name in scores}) < wanted:
        raise Failed(f"{wanted} callbacks score, and the log has {scores}")
    return f"{len(pictures)} pictures; {', '.join(scores) or 'no scores'}"


def saved(play: Play) -> str:
    """The newest checkpoint is the last step's."""
    if not any(isinstance(callback, Checkpoints) for callback in play.callbacks):
        return "- the recipe has no Checkpoints; --run saves"
    found = checkpoints_in(play.run("whole") / CHECKPOINTS)
    if not found or f"{STEPS:08d}" not in found[0].name:
        raise Failed(f"checkpoints: {[path.name for path in found]}")
    return f"{', '.join(path.name for path in reversed(found))}, {'sharded' if found[0].is_dir() else 'one file each'}"


def column(play: Play, run: str, name: str) -> list[float]:
    """What a run logged under a name."""
    return [float(row[name]) for row in rows(play, run) if row.get(name)]


def header(play: Play, run: str) -> list[str]:
    """The names of all that a run logged."""
    return list(next(iter(rows(play, run)), {}))


def rows(play: Play, run: str) -> list[dict[str, str]]:
    """The log of a run."""
    files = [start / METRICS for start in starts(play.run(run)) if (start / METRICS).is_file()]
    if not files:
        return []
    with files[-1].open(newline="") as file:
        return list(csv.DictReader(file))
