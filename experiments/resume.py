"""Does a run that is killed and resumed equal a run that is not? Compares their losses step by step.

One recipe is trained several times on the same shards: without interruption; killed (kill -9) at moments drawn from a
seed and each time resumed from its newest checkpoint; and, from the uninterrupted run's checkpoint halfway, with other
numbers of ranks and workers. Validation always uses the same noise, so its loss depends on the weights alone.

    lidit prep shard --out data/resume/train --count 20000
    lidit prep shard --out data/resume/val --count 256 --seed 1 --held true
    python -m experiments.resume --shards data/resume/train --val data/resume/val --out experiments/results/resume.json
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from experiments.cards import versions
from lidit.disk.folder import METRICS, checkpoint_name, checkpoints_in

EVERY = 10  # steps between checkpoints, validations and rows of the table
RANKS_AND_WORKERS = ((1, 2), (2, 0), (2, 1))


@dataclass
class Recipe:
    """What all the runs share.

    Args:
        shards: folder of the shards to train on.
        val: folder of the shards to validate on.
        steps: number of training steps.
        batch_size: samples in a step of all ranks together.
    """

    shards: str
    val: str
    steps: int
    batch_size: int

    def command(self, folder: Path, start: Path | None, ranks: int = 1, workers: int = 0) -> list[str]:
        """The command line that trains into a folder, from the beginning or from a checkpoint."""
        recipe = files("experiments") / "configs" / "demo.yaml"
        saving = {"folder": str(folder), "every_n_steps": EVERY, "keep": self.steps}
        trainer = {
            "accelerator": "cpu",
            "devices": ranks,
            "strategy": "ddp" if ranks > 1 else "auto",
            "max_steps": self.steps,
            "val_check_interval": EVERY,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": True,
            "enable_progress_bar": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(folder / f"log-{time.time_ns()}"), "flush_logs_every_n_steps": 1},
            },
            "callbacks": [
                {"class_path": "lidit.callbacks.ema.EMA", "init_args": {"decay": 0.99}},
                {"class_path": "lidit.callbacks.checkpoints.Checkpoints", "init_args": saving},
            ],
        }
        data = {"train": self.shards, "val": self.val, "cache": None, "batch_size": self.batch_size}
        settings = {f"trainer.{k}": v for k, v in trainer.items()} | {f"data.{k}": v for k, v in data.items()}
        settings |= {"data.num_workers": workers}
        given = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
        resumed = [f"--ckpt_path={start}"] if start else []
        return [sys.executable, "-m", "lidit", "fit", "--config", str(recipe), *given, *resumed]


def measure(
    shards: str, val: str, out: str, steps: int = 60, batch_size: int = 64, kills: int = 3, seed: int = 0
) -> None:
    """Train, kill, resume, compare; print the table and write it.

    Args:
        shards: folder of the shards to train on.
        val: folder of the shards to validate on.
        out: JSON file to write.
        steps: number of training steps, a multiple of 20.
        batch_size: samples in a step of all ranks together.
        kills: how many times the second run is killed.
        seed: seed of the moments at which it is killed.
    """
    recipe = Recipe(str(Path(shards).resolve()), str(Path(val).resolve()), steps, batch_size)
    with tempfile.TemporaryDirectory(prefix="lidit-resume-") as name:
        folder = Path(name)
        train(recipe, folder / "whole")
        runs = {"uninterrupted": history(folder / "whole")}
        killed_at = kill_and_resume(recipe, folder / "killed", kills, seed)
        runs[f"killed at {', '.join(map(str, killed_at))}"] = history(folder / "killed")
        half = folder / "whole" / checkpoint_name(steps // 2)
        for ranks, workers in RANKS_AND_WORKERS:
            place = folder / f"{ranks}-{workers}"
            train(recipe, place, half, ranks, workers)
            runs[f"from {steps // 2}, ranks {ranks}, workers {workers}"] = history(place, ranks)
    settings = {"steps": steps, "batch_size": batch_size, "kills": kills, "seed": seed, "recipe": "demo.yaml"}
    found = {"versions": versions("torch", "lightning"), "settings": settings, "runs": runs}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(found, indent=1) + "\n")
    print(table(runs))


def train(recipe: Recipe, folder: Path, start: Path | None = None, ranks: int = 1, workers: int = 0) -> None:
    """Train to the end.

    Raises:
        CalledProcessError: the training failed.
    """
    folder.mkdir(parents=True)
    subprocess.run(recipe.command(folder, start, ranks, workers), check=True)


def kill_and_resume(recipe: Recipe, folder: Path, kills: int, seed: int) -> list[int]:
    """Kill a run several times, each time some steps after its start, then let it end; return the steps it reached."""
    rng, reached = np.random.default_rng(seed), []
    folder.mkdir(parents=True)
    span = recipe.steps // (kills + 1)
    for kill in range(kills):
        process = subprocess.Popen(recipe.command(folder, newest(folder)))
        target = kill * span + int(rng.integers(span // 2, span))
        while process.poll() is None and last_step(folder) < target:
            time.sleep(0.05)
        process.kill()
        process.wait()
        reached.append(last_step(folder) + 1)
    subprocess.run(recipe.command(folder, newest(folder)), check=True)
    return reached


def newest(folder: Path) -> Path | None:
    """The checkpoint of the latest step."""
    return next(iter(checkpoints_in(folder)), None)


def last_step(folder: Path) -> int:
    """The latest step that a run has logged; -1 before the first."""
    return max((int(row["step"]) for row in logged(folder)), default=-1)


def logged(folder: Path) -> Iterator[dict[str, str]]:
    """The rows of all its logs, in the order they were begun; a line that a kill left unfinished is none."""
    for path in sorted(folder.rglob(METRICS)):
        with path.open() as file:
            yield from (row for row in csv.DictReader(file) if None not in row.values())


def history(folder: Path, ranks: int = 1) -> dict[str, dict[int, float]]:
    """Losses by step number; of a step that was trained twice, the last loss counts.

    With several ranks there are only validation losses: in training each rank logs the loss of its own share.
    """
    rows = list(logged(folder))
    return {
        column: {int(row["step"]): float(row[column]) for row in rows if row.get(column)}
        for column in (("train/loss", "val/loss") if ranks == 1 else ("val/loss",))
    }


def table(runs: dict[str, dict[str, dict[int, float]]]) -> str:
    """The validation losses as Markdown, and how far each run's losses are from the uninterrupted one's."""
    whole = runs["uninterrupted"]
    lines = [f"| steps | {' | '.join(runs)} |", "|---|" + "---|" * len(runs)]
    for step in whole["val/loss"]:
        losses = (run["val/loss"].get(step) for run in runs.values())
        lines.append(f"| {step + 1} | {' | '.join('' if loss is None else f'{loss:.7f}' for loss in losses)} |")
    for column in ("val/loss", "train/loss"):
        far = [largest_difference(run.get(column, {}), whole[column]) for run in runs.values()]
        lines.append(f"| largest difference of {column} | {' | '.join(far)} |")
    return "\n".join(lines)


def largest_difference(losses: dict[int, float], others: dict[int, float]) -> str:
    """The largest difference between two runs at the same step; empty if the first has no losses."""
    return f"{max(abs(loss - others[step]) for step, loss in losses.items()):.1g}" if losses else ""


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(measure, as_positional=False)
