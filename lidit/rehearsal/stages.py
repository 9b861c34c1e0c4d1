"""The stages of a rehearsal: each plays commands of lidit on the small recipe, and looks at what they left behind."""

from __future__ import annotations

import csv
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from lidit.callbacks.checkpoints import Checkpoints
from lidit.callbacks.ema import EMA
from lidit.callbacks.samples import FixedPrompts
from lidit.disk.folder import CHECKPOINTS, METRICS, checkpoints_in, starts
from lidit.jobs.state import STOPPED_CODE
from lidit.rehearsal.data import with_drawn_data
from lidit.rehearsal.play import Failed, Player
from lidit.rehearsal.small import DRAW, SAVE, STEPS, STOP, Ranks
from lidit.rehearsal.witness import BATCH, TRAINED, VALIDATED, VALIDATING, losses, notes

PASSED, FAILED, SKIPPED = "passed", "FAILED", "-"
SAME, NEAR, NEAR_BF16 = 1e-6, 1e-3, 5e-3  # relative differences of losses: same CPU ranks; others; those in bfloat16
BENCHMARK = ("scenes-attributes", "--count_per_task", "1")
CSV_LOGGER = "lightning.pytorch.loggers.CSVLogger"
NEXT = 2  # steps of the next stage, on pictures of twice the side
FIRST, ACCUMULATE, VALIDATE, DRAWS, CHECKPOINT = "first steps", "accumulate", "validate", "draw", "checkpoint"


@dataclass(frozen=True)
class Verdict:
    """What came of a stage.

    Args:
        stage: its name.
        verdict: passed, failed, or not played.
        seconds: it took.
        said: in a line, what was seen, or what failed where.
    """

    stage: str
    verdict: str
    seconds: float
    said: str


@dataclass(frozen=True)
class Play:
    """What the stages share.

    Args:
        player: plays commands.
        folder: everything is written into it.
        recipe: small, with tiny models and drawn data.
        ranks: processes that it is played with.
        sizes: of the pictures, width and height.
        url: of a server of the folder `data`.
        trusted: modules besides lidit that the recipe names.
        over: a file of settings that the user lays over the small recipe.
        callbacks: of the recipe.
    """

    player: Player
    folder: Path
    recipe: dict[str, Any]
    ranks: Ranks
    sizes: list[tuple[int, int]]
    url: str
    trusted: list[str]
    over: str | None = None
    callbacks: list[Any] = field(default_factory=list)

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.folder / "runs" / name

    def fit(
        self, name: str, run: str, *more: str, stop_at: int = 0, ranks: Ranks | None = None, expected: int = 0
    ) -> None:
        """Train by the recipe, with a witness among its callbacks.

        Args:
            name: of the logs.
            run: name of the run.
            more: words on the command line.
            stop_at: the step after which the last rank is told to stop.
            ranks: processes, by default the recipe's.
            expected: exit code.
        """
        ranks = ranks or self.ranks
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(on(with_witness(self.recipe, self.notes(run), stop_at), ranks), sort_keys=False))
        over = ["--config", self.over] if self.over else []
        self.player(
            name, ["fit", "--config", str(path), *over, "--run", str(self.run(run)), *more], ranks.all, expected
        )

    def notes(self, run: str) -> Path:
        """Where the ranks of a run note what they do."""
        return self.folder / "notes" / run

    @property
    def passes(self) -> int:
        """Batches of an optimizer step."""
        return self.recipe["trainer"]["accumulate_grad_batches"]


def with_witness(recipe: dict[str, Any], folder: Path, stop_at: int) -> dict[str, Any]:
    """The recipe with a witness before all other callbacks, and with a log that can be read."""
    arguments = {"folder": str(folder), "stop_at": stop_at}
    witness = {"class_path": "lidit.rehearsal.witness.Witness", "init_args": arguments}
    trainer, csv_logger = recipe["trainer"], {"class_path": CSV_LOGGER, "init_args": {"save_dir": "runs"}}
    loggers = trainer["logger"] if isinstance(trainer["logger"], list) else [trainer["logger"]]
    named = [logger for logger in loggers if isinstance(logger, dict)]
    with_csv = named if any(logger["class_path"] == CSV_LOGGER for logger in named) else [*named, csv_logger]
    return recipe | {"trainer": trainer | {"callbacks": [witness, *(trainer["callbacks"] or [])], "logger": with_csv}}


def on(recipe: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The recipe on so many processes."""
    trainer = recipe["trainer"] | {"devices": ranks.all}
    strategy = trainer["strategy"]
    if isinstance(strategy, dict) and "replicate" in strategy.get("init_args", {}):
        trainer["strategy"] = strategy | {"init_args": strategy["init_args"] | {"replicate": ranks.copies}}
    return recipe | {"trainer": trainer}


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


def timed(name: str, stage: Callable[[], str]) -> Verdict:
    """Play a stage."""
    begun = time.monotonic()
    try:
        said = stage()
    except Failed as error:
        return Verdict(name, FAILED, time.monotonic() - begun, str(error))
    return Verdict(name, SKIPPED if said.startswith("-") else PASSED, time.monotonic() - begun, said.lstrip("- "))


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


def resumed(play: Play) -> str:
    """Told to stop by a signal on one rank, a run saves, and the same command goes on to the end."""
    play.fit("stopped", "stopped", "--resume", "auto", stop_at=STOP, expected=STOPPED_CODE)
    shutil.copytree(play.run("stopped"), play.run("elsewhere"), symlinks=True)
    shutil.copytree(play.notes("stopped"), play.folder / "notes" / "before")
    play.fit("resumed", "stopped", "--resume", "auto")
    return f"stopped after step {STOP} with exit code {STOPPED_CODE}, went on to {STEPS}"


def same_losses(play: Play) -> str:
    """The losses of the run that was stopped are those of the one that was not."""
    allowed = near(play) if play.recipe["trainer"]["accelerator"] == "gpu" else SAME  # a GPU adds in any order
    return compared(losses(play.notes("whole")), losses(play.notes("stopped")), allowed)


def near(play: Play) -> float:
    """How far losses may be apart that were added up in another order."""
    return NEAR_BF16 if "bf16" in str(play.recipe["trainer"]["precision"]) else NEAR


def other_ranks(play: Play) -> str:
    """Half as many ranks go on, or two where there was one."""
    ranks = Ranks(1, play.ranks.all // 2) if play.ranks.all > 1 else Ranks(2, 1)
    if play.recipe["trainer"]["accelerator"] == "gpu" and ranks.all > torch.cuda.device_count():
        return "- there is one GPU"
    play.fit("other", "elsewhere", "--resume", "auto", ranks=ranks)
    rest = losses(play.notes("elsewhere"))
    said = compared(losses(play.notes("whole"))[STOP * play.passes :], rest, near(play))
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


def averages(play: Play) -> bool:
    """Whether the recipe keeps an average of the weights."""
    return any(isinstance(callback, EMA) for callback in play.callbacks)


def trust(play: Play) -> list[str]:
    """The option that names the modules besides lidit that the recipe's classes are from."""
    return ["--trust", yaml.safe_dump(play.trusted, default_flow_style=True).strip()] if play.trusted else []


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
