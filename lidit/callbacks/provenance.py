"""Writes with what a run was trained and how long it took: the facts that a table stores with its results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from time import monotonic

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lidit.disk.folder import RECORD
from lidit.disk.whole import write_text

PACKAGES = ("torch", "lightning", "transformers", "diffusers")


class Provenance(Callback):
    """Write `record.json` to the folder of `--run`: commit, versions, machine, steps, time, trained weights.

    Seconds are wall time from the first batch to the last, without start-up; the seconds of several starts are added.

    Args:
        every_n_steps: optimizer steps between two writes, so that a run that is stopped loses little.

    Raises:
        ValueError: every_n_steps is below 1.
    """

    def __init__(self, every_n_steps: int = 100):
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps of Provenance is {every_n_steps}; it must be at least 1")
        self.every_n_steps, self._before, self._start = every_n_steps, 0.0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the seconds of earlier starts, if this start resumes from them."""
        path = Path(trainer.default_root_dir) / RECORD
        earlier = json.loads(path.read_text()) if trainer.global_step and path.is_file() else {}
        self._before, self._start = earlier.get("seconds", 0.0), monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self.write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write(trainer)

    def write(self, trainer: Trainer) -> None:
        """Write the file, whole or not at all."""
        if not trainer.is_global_zero:
            return
        facts = {
            "commit": commit(),
            "versions": {package: version(package) for package in PACKAGES},
            "machine": machine(trainer.world_size),
            "steps": trainer.global_step,
            "seconds": (seconds := round(self._before + monotonic() - self._start, 1)),
            "milliseconds_per_step": round(1000 * seconds / max(1, trainer.global_step), 1),
            "parameters": sum(p.numel() for p in trainer.lightning_module.parameters() if p.requires_grad),
            "once_per_prompt": int(trainer.lightning_module.prompt_encoder.timeless),
        }
        write_text(Path(trainer.default_root_dir) / RECORD, json.dumps(facts, indent=2) + "\n")


def machine(ranks: int) -> str:
    """The kind of machine: the number of ranks, and the accelerator or the number of cores."""
    if torch.cuda.is_available():
        return f"{ranks} x {torch.cuda.get_device_name()}"
    return f"{ranks} x CPU, {platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def commit() -> str | None:
    """The commit of lidit's source, with `-dirty` if files were changed; None outside a git repository."""
    describe = ["describe", "--always", "--exclude=*", "--abbrev=40", "--dirty"]
    command = ["git", "-C", str(Path(__file__).parent), *describe]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
