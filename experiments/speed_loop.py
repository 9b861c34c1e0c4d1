"""What Lightning, callbacks, logging and data add to a training step of the miniature's recipe.

`lidit fit` trains the recipe with everything that it names; a loop written by hand runs the bare step (loss, backward
pass, clipping, optimizer) on batches that are already in memory. Both run in turn, for several rounds in one process,
and are compared within each round.

    python -m experiments.speed_loop run --out experiments/results/speed_loop.json
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.utils import clip_grad_norm_

from data_prep.precompute import precompute
from data_prep.shard import shard
from experiments.cards import versions
from experiments.speed_data import machine
from lidit import fit
from lidit.training.optimizers import adamw, muon

TO_REACH = 0.05  # the overhead to reach, as a share of the bare step


class Clock(Callback):
    """Measures the seconds of each step, including the wait for its batch."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        """Note the time at which a step ended."""
        self.ends.append(time.perf_counter())

    def seconds(self, warmup: int) -> float:
        """Mean seconds of a step, without the first `warmup` steps."""
        return (self.ends[-1] - self.ends[warmup]) / (len(self.ends) - 1 - warmup)


class Timed(fit.RecipeCLI):
    """`lidit fit` with a clock among its callbacks."""

    def before_fit(self) -> None:
        super().before_fit()
        self.clock = Clock()
        self.trainer.callbacks.append(self.clock)


def run(
    out: str,
    config: str = "experiments/configs/mini.yaml",
    rounds: int = 3,
    steps: int = 16,
    warmup: int = 4,
    options: list[str] = [],  # noqa: B006
) -> None:
    """Time both loops, print the overhead and write it as JSON.

    Args:
        out: JSON file to write.
        config: the recipe.
        rounds: how many times both loops are timed in turn.
        steps: timed steps of each loop in a round, after the warm-up.
        warmup: steps before them that are not timed.
        options: further words for `lidit fit`.
    """
    settings, at_start = dict(locals()), machine()
    torch.set_num_threads(1)
    measured = []
    with tempfile.TemporaryDirectory(prefix="lidit-speed-") as name:
        folder = Path(name)
        words = recipe(folder, config, steps + warmup + 1) + options
        for i in range(rounds):
            whole = fit.run("fit", [*words, "--run", str(folder / f"run-{i}")], Timed).clock.seconds(warmup)
            measured.append({"whole": whole, "bare": bare(words, steps, warmup)})
            print(f"round {i}: {measured[-1]['whole']:.3f} s a step, bare {measured[-1]['bare']:.3f} s", flush=True)
    overheads = [each["whole"] / each["bare"] - 1 for each in measured]
    found = {"machine": at_start, "versions": versions("torch", "lightning"), "settings": settings, "rounds": measured}
    found |= {"overhead": statistics.median(overheads), "least": min(overheads), "most": max(overheads)}
    found["reached"] = {f"at most {TO_REACH:.0%}": found["overhead"] <= TO_REACH}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(found, indent=1) + "\n")
    print(f"overhead {found['overhead']:.1%} ({found['least']:.1%} to {found['most']:.1%})")


def recipe(folder: Path, config: str, steps: int) -> list[str]:
    """Words for `lidit fit`: the recipe on newly made shards, without what happens once in a thousand steps."""
    shards, latents = str(folder / "shards"), str(folder / "latents")
    shard(shards, count=1024, workers=1)
    precompute(shards, latents, "bundled:vae")
    words = ["--config", config, "--data.train", shards, "--data.cache", latents]
    words += ["--data.val", "null", "--data.val_cache", "null"]
    words += ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]  # the bare loop runs there
    return words + ["--trainer.max_steps", str(steps), "--trainer.enable_progress_bar", "false"]


def bare(words: list[str], steps: int, warmup: int) -> float:
    """Mean seconds of a step in the loop written by hand."""
    given, model, data = fit.read_recipe(words)
    clip = given.trainer.gradient_clip_val
    data.setup("fit")
    model.configure_model()
    make = {"adamw": adamw, "muon": muon}[model.optimizer]
    optimizer = make(model, model.learning_rate, model.betas, model.weight_decay)
    batches = [batch.signed() for batch in islice(data.train_dataloader(), steps + warmup)]
    for i, batch in enumerate(batches):
        if i == warmup:
            start = time.perf_counter()
        loss, _ = model.loss(batch)
        optimizer.zero_grad()
        loss.mean().backward()
        if clip is not None:
            clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return (time.perf_counter() - start) / steps


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli({"run": run}, as_positional=False)
