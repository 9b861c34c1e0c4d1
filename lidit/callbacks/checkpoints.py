"""Saves checkpoints so that none is ever half written: under a temporary name, which is then renamed."""

from __future__ import annotations

import os
from pathlib import Path
from time import monotonic

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.distributed.checkpoint import CheckpointException

from lidit.disk.folder import CHECKPOINTS, LATEST, checkpoint_name, checkpoints_in
from lidit.disk.whole import partial, remove
from lidit.lightning_private import snapshot

PACE = 10  # steps that are timed to foresee when `every_n_minutes` are over


class Checkpoints(Checkpoint):
    """Save everything that a run needs to resume, every n steps or minutes and at the end; remove old checkpoints.

    A checkpoint `step-00001000.ckpt` is a file, or with sharded weights a folder, and `latest` links to the newest.
    Every checkpoint is whole, however the process ends. If writing fails, earlier ones stay, and every rank ends.

    Args:
        every_n_steps: optimizer steps between checkpoints.
        keep: number of the newest checkpoints that stay; at least 1.
        every_n_minutes: save after about so many minutes, too, but after 10 steps at the earliest; none: by steps
            alone. Rank 0 foresees the step from the time of the last ones, so that the ranks agree once a checkpoint.
        folder: folder of the checkpoints; by default `checkpoints` in the run's folder, or without one in the log's.

    Raises:
        ValueError: a number is below 1.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        keep: int = 3,
        folder: str | None = None,
        every_n_minutes: float | None = None,
    ):
        for what, value in {"every_n_steps": every_n_steps, "keep": keep}.items():
            if value < 1:
                raise ValueError(f"{what} of Checkpoints is {value}; it must be at least 1")
        if every_n_minutes is not None and every_n_minutes <= 0:
            raise ValueError(
                f"every_n_minutes of Checkpoints is {every_n_minutes}; it must be above 0, or null for none"
            )
        self.every_n_steps, self.keep, self.folder, self.every_n_minutes = every_n_steps, keep, folder, every_n_minutes
        self._saved = -1  # step of the last checkpoint
        self._since = (0, 0.0)  # the step, and the time, after the last checkpoint
        self._next = -1  # the step that every_n_minutes asks for, once it is foreseen

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder, and remove the unfinished files of an earlier start."""
        self.folder = trainer.strategy.broadcast(
            self.folder or str(Path(trainer.log_dir or trainer.default_root_dir) / CHECKPOINTS)
        )
        if trainer.is_global_zero and stage == "fit":
            for left in Path(self.folder).glob(".*.part*"):
                remove(left)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved = trainer.global_step  # a resumed run has this checkpoint
        self._since, self._next = (trainer.global_step, monotonic()), -1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        """Save after every n-th optimizer step, and when the minutes are over."""
        step = trainer.global_step
        if self.every_n_minutes and self._next < 0 and step == self._since[0] + PACE:
            self._next = trainer.strategy.broadcast(self._foreseen(step))
        if step % self.every_n_steps == 0 or step == self._next:
            self.save(trainer)

    def _foreseen(self, step: int) -> int:
        """The step after which the minutes will be over, if steps take as long as those since the last checkpoint."""
        begun, then = self._since
        spent = monotonic() - then
        return step + max(1, round((self.every_n_minutes * 60 - spent) * (step - begun) / spent))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: Trainer) -> Path:
        """Save this step unless it is saved already, and return the path. All ranks call it, between two steps.

        Raises:
            OSError: this rank or another could not write the checkpoint.
        """
        step = trainer.global_step
        path = Path(self.folder) / checkpoint_name(step)
        if step == self._saved:
            return path
        temporary = partial(path)  # the same on all ranks
        problem = self._write(trainer, temporary)
        if not trainer.strategy.reduce_boolean_decision(not problem):
            if trainer.is_global_zero:
                remove(temporary)
            raise OSError(
                f"{path} could not be written ({problem or 'another rank says why'}); earlier checkpoints are as they "
                "were: make room, then resume from the latest"
            )
        if trainer.is_global_zero:
            self._publish(temporary, path)
        trainer.strategy.barrier()
        self._saved = step
        self._since, self._next = (step, monotonic()), -1
        return path

    @staticmethod
    def _write(trainer: Trainer, path: Path) -> str:
        """Write a checkpoint, and return the error, if any, since the other ranks must hear of it."""
        checkpoint = snapshot(trainer)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not isinstance(trainer.strategy, (DDPStrategy, SingleDeviceStrategy)):
                trainer.strategy.save_checkpoint(checkpoint, path)
            elif trainer.is_global_zero:  # Lightning makes a copy in memory and one in the temporary folder
                torch.save(checkpoint, path)
        except (OSError, RuntimeError, CheckpointException) as error:  # PyTorch's writer raises a RuntimeError
            return " ".join(str(error).split())[-500:]
        return ""

    def _publish(self, temporary: Path, path: Path) -> None:
        """Give a checkpoint its name, point `latest` to it, and remove the oldest checkpoints."""
        if path.exists():  # an earlier start saved this step, but this one did not resume from it
            remove(path)
        os.replace(temporary, path)
        link = partial(path.with_name(LATEST))
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        os.replace(link, path.with_name(LATEST))
        for old in checkpoints_in(path.parent)[self.keep :]:
            remove(old)
