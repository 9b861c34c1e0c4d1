"""Lets a run that is asked to stop (time limit, preemption, `kill`) save after its step, to be resumed later."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lidit.callbacks.checkpoints import Checkpoints
from lidit.jobs import signals, slurm
from lidit.jobs.state import REQUEUED, STOPPED, STOPPED_CODE, UNQUEUED
from lidit.lightning_private import launched_by_lightning, replace_signal_handlers

WARNING = "SIGUSR1"  # `lidit launch slurm` asks Slurm for this signal before the time limit

log = logging.getLogger(__name__)


class Preempted(SystemExit):
    """The run has saved and exits, with a code that is not 0, since Slurm never requeues a job that ends with 0.

    Args:
        code: exit code of the process.
        state: the run's state from now on.
    """

    def __init__(self, code: int, state: str):
        super().__init__(code)
        self.state = state


class Preemption(Checkpoint):  # Lightning calls Checkpoint callbacks last, after everything else in a step
    """At each step boundary the ranks agree whether one of them got a signal; if so, they save and exit together.

    Under Slurm, rank 0 requeues the job on SIGUSR1. On SIGTERM alone Slurm itself ends the job, and requeues it if it
    was preempted. The run's `Checkpoints` saves, and does nothing if the step is saved already. A signal during
    validation is acted on after the next step.

    Args:
        every_n_steps: optimizer steps between two agreements; each is a tiny all-reduce.
        linger: seconds to wait for Slurm's SIGKILL after SIGTERM; more than the cluster's grace time.

    Raises:
        ValueError: a number is too small.
    """

    def __init__(self, every_n_steps: int = 1, linger: float = 600.0):
        if every_n_steps < 1 or linger < 0:
            raise ValueError(f"Preemption needs every_n_steps >= 1 and linger >= 0, not {every_n_steps} and {linger}")
        self.every_n_steps, self.linger = every_n_steps, linger
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the run saves checkpoints, and make signals be remembered only.

        Raises:
            ValueError: the run has no `Checkpoints`.
        """
        if not any(isinstance(callback, Checkpoints) for callback in trainer.callbacks):
            raise ValueError("Preemption saves with lidit.callbacks.checkpoints.Checkpoints: add it to the callbacks")

        # Lightning's handler of SIGTERM broadcasts at once, whatever the ranks are doing; ours stays in its place
        replace_signal_handlers(trainer, signals.keep)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        """Agree after an optimizer step, but not during an accumulated gradient, nor after the last step."""
        step = trainer.global_step
        if step == self._step or step % self.every_n_steps or step == trainer.max_steps:
            return
        self._step = step
        if trainer.strategy.reduce_boolean_decision(bool(signals.received()), all=False):
            self._leave(trainer)

    def _leave(self, trainer: Trainer) -> None:
        (checkpoints,) = [callback for callback in trainer.callbacks if isinstance(callback, Checkpoints)]
        path = checkpoints.save(trainer)
        warned = trainer.strategy.reduce_boolean_decision(WARNING in signals.received(), all=False)
        state = end_job(path, warned) if trainer.is_global_zero else ""
        state = trainer.strategy.broadcast(state)  # no rank exits before: Slurm would end the job
        # if a child ends with another code than 0, Lightning's own launcher kills all that it started, and itself
        own = launched_by_lightning(trainer)
        raise Preempted(0 if own and not trainer.is_global_zero else STOPPED_CODE, state)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """If Slurm ends the job itself, wait for that: if a rank exits earlier, the job counts as failed."""
        if isinstance(exception, Preempted) and exception.state == STOPPED and slurm.job_id():
            time.sleep(self.linger)


def end_job(path: Path, warned: bool) -> str:
    """On rank 0, requeue the Slurm job unless Slurm itself ends it, and log how the run goes on.

    Args:
        path: path of the checkpoint.
        warned: Slurm sent its warning, before the time limit or preemption. Without a warning Slurm itself ends the
            job: it was preempted, and Slurm requeues it, or it was cancelled, and must not start again.

    Returns:
        The run's state.
    """
    job = slurm.job_id()
    told = f"told to stop ({signals.received()[0] if signals.received() else 'on another rank'}): saved {path}"
    if job is None:
        log.warning("%s; go on with the same command and --resume auto", told)
        return STOPPED
    if not warned:
        log.warning("%s; Slurm ends job %s, and starts it again if it was preempted", told, job)
        return STOPPED
    try:
        slurm.requeue(job)
    except ValueError as error:
        log.warning("%s; job %s could not be requeued from here: %s", told, job, error)
        return UNQUEUED
    log.warning("%s; job %s is requeued", told, job)
    return REQUEUED
