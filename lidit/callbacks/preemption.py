"""A run that is told to stop (time limit, preemption, `kill`) saves after the step it is in, and goes on later."""

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

WARNING = "SIGUSR1"  # `lidit launch slurm` asks Slurm for it before the time limit

log = logging.getLogger(__name__)


class Preempted(SystemExit):
    """The run has saved and leaves, with an exit code that is not 0: Slurm takes 0 for the end and never requeues.

    Args:
        code: of the process.
        state: of the run from now on.
    """

    def __init__(self, code: int, state: str):
        super().__init__(code)
        self.state = state


class Preemption(Checkpoint):  # Lightning calls such callbacks last: what a step changes has then been changed
    """At each step boundary the ranks agree whether one of them was signalled; if so, they save and leave together.

    Under Slurm, SIGUSR1 lets rank 0 requeue the job; after SIGTERM alone Slurm ends it, and requeues it if it was
    preempted. Saving is left to the run's `Checkpoints`, which does nothing if the step has been saved already. A
    signal during validation is seen after the next step.

    Args:
        every_n_steps: optimizer steps between two questions; each is a tiny all-reduce.
        linger: seconds to wait for Slurm's SIGKILL after SIGTERM; longer than the cluster's grace time.

    Raises:
        ValueError: a number is too small.
    """

    def __init__(self, every_n_steps: int = 1, linger: float = 600.0):
        if every_n_steps < 1 or linger < 0:
            raise ValueError(f"Preemption needs every_n_steps >= 1 and linger >= 0, not {every_n_steps} and {linger}")
        self.every_n_steps, self.linger = every_n_steps, linger
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See that there is something to save with, and that signals are only remembered.

        Raises:
            ValueError: there are no `Checkpoints`.
        """
        if not any(isinstance(callback, Checkpoints) for callback in trainer.callbacks):
            raise ValueError("Preemption saves with lidit.callbacks.checkpoints.Checkpoints: add it to the callbacks")

        # Lightning's handler of SIGTERM broadcasts, in the middle of whatever the ranks are doing: ours stays instead
        replace_signal_handlers(trainer, signals.keep)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        """Ask after each optimizer step; not in the middle of an accumulated gradient, nor after the last step."""
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
        state = trainer.strategy.broadcast(state)  # nobody leaves before: Slurm would end the job, not yet requeued
        # Lightning's own launcher kills what it started, and itself, where a child ends with another code than 0
        own = launched_by_lightning(trainer)
        raise Preempted(0 if own and not trainer.is_global_zero else STOPPED_CODE, state)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Where Slurm ends the job itself, wait for that: who leaves earlier has failed, and is not requeued."""
        if isinstance(exception, Preempted) and exception.state == STOPPED and slurm.job_id():
            time.sleep(self.linger)


def end_job(path: Path, warned: bool) -> str:
    """On rank 0: requeue the Slurm job, if this is one and it is not ended by others; say how the run goes on.

    Args:
        path: of what was saved.
        warned: Slurm's warning came, before the time limit or preemption. Without it Slurm itself ends the job: it is
            preempted, and Slurm requeues it; or cancelled, and must not come back.

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
