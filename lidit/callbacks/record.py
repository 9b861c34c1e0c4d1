"""Writes a run's state for `lidit runs`: each rank when it starts or fails, and rank 0 every few seconds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed import DistError

from lidit.callbacks.preemption import Preempted
from lidit.jobs import slurm, state

LOST = ("gloo", "nccl", "connection reset", "connection closed", "broken pipe")  # in errors about a lost rank


class Record(Callback):
    """Write `state/rank-N.json` in the run's folder.

    Args:
        folder: the run's folder.
        every_seconds: seconds between two writes during training.
    """

    def __init__(self, folder: str, every_seconds: float = 5.0):
        self.folder, self.every_seconds = Path(folder), every_seconds
        self._now: state.State | None = None
        self._loss: Any = None  # a tensor, read only for a write, since reading waits for the device

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write that this rank has started."""
        self._write(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._write(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: object) -> None:
        """Write the step from time to time."""
        self._loss = outputs["loss"]
        if trainer.is_global_zero and time.time() - self._now.updated >= self.every_seconds:
            self._write(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, state=state.FINISHED)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write why this rank ends."""
        if isinstance(exception, Preempted):
            self._write(trainer, state=exception.state)
        elif isinstance(exception, KeyboardInterrupt):
            self._write(trainer, state=state.STOPPED, error="interrupted")
        else:
            self._write(trainer, state=state.FAILED, error=in_a_line(exception), echo=lost_another(exception))

    def _write(self, trainer: Trainer, **changes: object) -> None:
        if self._now is None:
            self._now = state.State(trainer.global_rank, state.start_name(), job=slurm.job_id())
        loss = None if self._loss is None or "echo" in changes else float(self._loss)  # a broken device cannot give it
        loss = self._now.loss if loss is None else loss
        self._now = self._now.now(step=trainer.global_step, max_steps=trainer.max_steps, loss=loss, **changes)
        state.write(self.folder, self._now)


def in_a_line(exception: BaseException) -> str:
    """An exception in one line: its first line, since PyTorch's errors go on with a stack of C++."""
    lines = str(exception).strip().splitlines()
    return f"{type(exception).__name__}: {lines[0].strip() if lines else 'without a message'}"


def lost_another(exception: BaseException) -> bool:
    """Whether a rank failed because another rank did."""
    said = str(exception).lower()
    if "eaddrinuse" in said:  # this rank could not even listen for the others
        return False
    return isinstance(exception, DistError) or (isinstance(exception, RuntimeError) and any(w in said for w in LOST))
