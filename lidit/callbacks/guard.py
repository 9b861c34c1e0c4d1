"""Survives a bad batch: a gradient that is not finite is thrown away, and many in a row stop the run."""

from __future__ import annotations

import logging
import math

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lidit.data.datamodule import Batch

log = logging.getLogger(__name__)


class Guard(Callback):
    """Skip the optimizer step whose gradient norm is not finite, count it as `guard/skipped`, and name its samples.

    The norm of each step's gradient, before clipping, is logged as `train/gradient_norm`.

    A skipped step leaves weights and optimizer state bitwise as they were: gradients are set to None before clipping,
    and an optimizer passes over parameters without a gradient. The step still counts for the trainer and the learning
    rate. The ranks agree: one bad gradient on any rank skips the step on all. The check waits for the device, once.

    Args:
        max_in_a_row: number of steps skipped one after the other that stops the run.

    Raises:
        ValueError: max_in_a_row is below 1.
    """

    def __init__(self, max_in_a_row: int = 10):
        if max_in_a_row < 1:
            raise ValueError(f"max_in_a_row of Guard is {max_in_a_row}; it must be at least 1")
        self.max_in_a_row = max_in_a_row
        self.skipped = 0  # steps, since the run's first start
        self._in_a_row = 0
        self._keys: list[str] = []  # keys of the samples in the gradient

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse float16.

        Raises:
            ValueError: precision is 16-mixed, whose scaler finds its scale by letting gradients overflow.
        """
        if trainer.precision == "16-mixed":
            raise ValueError("Guard does not work with precision 16-mixed, whose scaler skips steps; use bf16-mixed")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Remember the samples of all batches of an accumulated gradient."""
        self._keys += batch.key

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Throw away a gradient that is not finite; Lightning clips and steps after this.

        Raises:
            ValueError: too many steps in a row were skipped.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        own = _local_norm(parameters)
        squares = float(trainer.strategy.reduce(own.double().square(), reduce_op="sum"))  # waits
        keys, self._keys = self._keys, []
        if math.isfinite(squares):
            self._in_a_row = 0
            norm = math.sqrt(squares / _times_counted(parameters, trainer.world_size))
        else:
            norm = squares
            self._skip(parameters, f"step {trainer.global_step}, rank {trainer.global_rank}", own.item(), keys)
        # on the CPU: a number would be copied to the device
        logged = {"train/gradient_norm": torch.tensor(norm), "guard/skipped": torch.tensor(float(self.skipped))}
        pl_module.log_dict(logged)

    def _skip(self, parameters: list[torch.nn.Parameter], where: str, norm: float, keys: list[str]) -> None:
        for parameter in parameters:
            parameter.grad = None
        self.skipped += 1
        self._in_a_row += 1
        log.warning("%s: skipped, since the gradient's norm is %s; samples: %s", where, norm, ", ".join(keys))
        if self._in_a_row == self.max_in_a_row:
            raise ValueError(
                f"the gradient was not finite in {self._in_a_row} steps in a row; the weights are those from before. "
                "Resume from the last checkpoint with a lower learning rate, and look at the samples named above"
            )

    def state_dict(self) -> dict:
        """How many steps have been skipped."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on counting from a checkpoint."""
        self.skipped = state_dict["skipped"]


def _local_norm(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """Norm of the gradients; of sharded gradients, only this rank's shards."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm([g.to_local() if isinstance(g, DTensor) else g for g in gradients])


def _times_counted(parameters: list[torch.nn.Parameter], world: int) -> int:
    """In how many ranks' sums a gradient is: in all of DDP's, in one of each copy's where weights are sharded."""
    grad = next((p.grad for p in parameters if p.grad is not None), None)
    if not isinstance(grad, DTensor):
        return world
    return grad.device_mesh.size(0) if grad.device_mesh.ndim > 1 else 1
