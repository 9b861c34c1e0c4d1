"""A run that is told to stop (time limit, preemption, `kill`) saves after the step it is in, and goes on later."""

from __future__ import annotations

import logging

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import LightningEnvironment

from lidit import signals, slurm
from lidit.callbacks.checkpoints import Checkpoints
from lidit.state import STOPPED_CODE

log = logging.getLogger(__name__)


class Preempted(SystemExit):
    """The run has saved and leaves, with an exit code that is not 0: Slurm takes 0 for the end and never requeues.

    Args:
        code: of the process.
        requeued: Slurm will start the job again.
    """

    def __init__(self, code: int, requeued: bool):
        super().__init__(code)
        self.requeued = requeued


class Preemption(Checkpoint):  # Lightning calls such callbacks last: what a step changes has then been changed
    """At each step boundary the ranks agree whether one of them was signalled; if so, they save and leave together.

    Under Slurm, rank 0 requeues the job first. Saving is left to the run's `Checkpoints`, which does nothing if the
    step has been saved already. A signal during validation is seen after the next step.

    Args:
        every_n_steps: optimizer steps between two questions; each is a tiny all-reduce.

    Raises:
        ValueError: every_n_steps is below 1.
    """

    def __init__(self, every_n_steps: int = 1):
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps of Preemption is {every_n_steps}; it must be at least 1")
        self.every_n_steps = every_n_steps
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See that there is something to save with.

        Raises:
            ValueError: there are no `Checkpoints`.
        """
        if not any(isinstance(callback, Checkpoints) for callback in trainer.callbacks):
            raise ValueError("Preemption saves with lidit.callbacks.checkpoints.Checkpoints: add it to the callbacks")

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        signals.keep()  # Lightning has just put its own handler there

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        signals.keep()
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        """Ask after each optimizer step; not in the middle of an accumulated gradient, nor after the last step."""
        step = trainer.global_step
        if step == self._step or step % self.every_n_steps or step == trainer.max_steps:
            return
        self._step = step
        if trainer.strategy.reduce_boolean_decision(signals.received() is not None, all=False):
            self._leave(trainer)

    def _leave(self, trainer: Trainer) -> None:
        (checkpoints,) = [callback for callback in trainer.callbacks if isinstance(callback, Checkpoints)]
        path = checkpoints.save(trainer)
        what = requeue() if trainer.is_global_zero else None
        what = trainer.strategy.broadcast(what)  # nobody leaves earlier: Slurm would end the job before it is requeued
        if trainer.is_global_zero:
            log.warning("told to stop (%s): saved %s; %s", signals.received() or "on another rank", path, what[1])
        # Lightning's own launcher kills what it started, and itself, where a child ends with another code than 0
        own = isinstance(trainer._accelerator_connector.cluster_environment, LightningEnvironment)
        child = own and not trainer.is_global_zero
        raise Preempted(0 if child else STOPPED_CODE, what[0])


def requeue() -> tuple[bool, str]:
    """Requeue the Slurm job, if this is one; whether that was done, and how the run goes on."""
    job = slurm.job_id()
    again = "go on with the same command and --resume auto"
    if job is None:
        return False, again
    try:
        slurm.requeue(job)
    except ValueError as error:
        return False, f"job {job} could not be requeued ({error}); {again}, or submit the job's script again"
    return True, f"job {job} is requeued"
