"""What Lightning keeps to itself and we need, each in a function: an upgrade of Lightning is checked in one place.

`tests/test_lightning_private.py` says of each what goes wrong when Lightning changes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment


def batches_done(trainer: Trainer) -> int:
    """Batches trained on since the start of the run, over all its starts; one that an exception interrupted is none."""
    return trainer.fit_loop.epoch_loop.batch_progress.total.processed


def logs_now(trainer: Trainer) -> bool:
    """Whether Lightning writes to the loggers after this batch, which then ends an optimizer step that is logged."""
    return not trainer.fit_loop._should_accumulate() and trainer._logger_connector.should_update_logs


def share(trainer: Trainer) -> tuple[int, int]:
    """The number of this rank, and how many ranks share a global batch; those of a tensor-parallel group are one."""
    ranks = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
    return ranks["rank"], ranks["num_replicas"]


def replaces_samplers(trainer: Trainer) -> bool:
    """Whether Lightning would split what a loader shows among the ranks once more."""
    return trainer._accelerator_connector.use_distributed_sampler


def has_trainer(module: LightningModule) -> bool:
    """Whether a trainer is at work with this model; `module.trainer` raises an error where there is none."""
    return module._trainer is not None


def snapshot(trainer: Trainer) -> dict[str, Any]:
    """Everything that Lightning would put into a checkpoint."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def replace_signal_handlers(trainer: Trainer, register: Callable[[], None]) -> None:
    """Let the trainer call this when training starts, instead of setting handlers of its own.

    Raises:
        AttributeError: this version of Lightning sets its handlers in another way.
    """
    connector = trainer._signal_connector
    _ = connector.register_signal_handlers  # to assign to a name that nobody calls would change nothing, silently
    connector.register_signal_handlers = register


def launched_by_lightning(trainer: Trainer) -> bool:
    """Whether Lightning itself has started the other ranks, rather than torchrun or Slurm."""
    return isinstance(trainer._accelerator_connector.cluster_environment, LightningEnvironment)
