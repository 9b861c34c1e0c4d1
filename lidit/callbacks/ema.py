"""Exponential moving average (EMA) of the trained weights: saved, resumed, used in validation and sampling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from lidit.parallel import reshard


class EMA(Callback):
    """Average the weights, `ema = d ema + (1 - d) weights`, once per optimizer step, before a checkpoint is written.

    The decay warms up as d = min(decay, (1 + n) / (10 + n)) in the n-th step, so that the first weights are forgotten
    soon. A step without gradients (`Guard` skipped it) changes nothing and is not counted. If weights are sharded, each
    rank averages its share, without communication.

    Args:
        decay: limit of d, in [0, 1).

    Raises:
        ValueError: the decay is outside [0, 1).
    """

    state_key = "EMA"

    def __init__(self, decay: float = 0.9999):
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay must be in [0, 1), not {decay}")
        self.decay = decay
        self.steps = 0
        self.average: dict[str, Tensor] = {}
        self._global_step = 0  # the trainer's step at the last call; counts skipped steps, too
        self._swapped = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the average from the weights, or from a checkpoint's average.

        Raises:
            ValueError: the checkpoint's average belongs to another model.
        """
        weights = dict(pl_module.named_parameters())
        if self.average and self.average.keys() != weights.keys():
            differ = sorted(self.average.keys() ^ weights.keys())[:3]
            raise ValueError(f"the checkpoint's EMA is another model's ({', '.join(differ)} ...); start a new run")
        self.begin(pl_module)

    def begin(self, pl_module: LightningModule) -> None:
        """Copy the checkpoint's average, or else the weights, to the devices and shards of the weights."""
        weights = dict(pl_module.named_parameters())
        source = self.average or weights
        self.average = {name: source[name].detach().to(p.device, copy=True) for name, p in weights.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn a resumed run's step. Without an average yet, start from the weights that the run resumes with."""
        self._global_step = trainer.global_step
        if not self.steps:
            for name, parameter in pl_module.named_parameters():
                local(self.average[name]).copy_(local(parameter.detach()))

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        """Update the average, once per optimizer step."""
        if trainer.global_step == self._global_step:
            return  # gradients are being accumulated
        self._global_step = trainer.global_step
        if all(p.grad is None for p in pl_module.parameters()):
            return  # the step was skipped
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        weights = [local(p.detach()) for p in pl_module.parameters()]
        torch._foreach_lerp_([local(average) for average in self.average.values()], weights, 1 - decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate with the averaged weights."""
        if self.average:
            self._swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train on with the trained weights."""
        if self._swapped:
            self._swap(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test with the averaged weights."""
        self.on_validation_start(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the trained weights back."""
        self.on_validation_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the trained weights back when validation is interrupted."""
        if self._swapped:
            self._swap_back(pl_module)

    @contextmanager
    def swapped(self, pl_module: LightningModule) -> Iterator[None]:
        """Give the module the averaged weights inside a `with` block; during validation it already has them."""
        if self._swapped:
            yield
            return
        self._swap(pl_module)
        try:
            yield
        finally:
            self._swap_back(pl_module)

    def _swap_back(self, pl_module: LightningModule) -> None:
        """Swap again, also after a forward pass that failed half-way: its weights may still be gathered."""
        reshard(pl_module)
        self._swap(pl_module)

    @torch.no_grad()
    def _swap(self, pl_module: LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            weight, average = local(parameter.detach()), local(self.average[name])
            trained = weight.clone()
            weight.copy_(average)
            average.copy_(trained)
        self._swapped = not self._swapped

    def state_dict(self) -> dict:
        """The average, and the number of steps that it has averaged."""
        return {"decay": self.decay, "steps": self.steps, "average": self.average}

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from a checkpoint, with the decay of the recipe."""
        self.steps = state_dict["steps"]
        for name, average in state_dict["average"].items():
            self.average[name] = _as(self.average[name], average) if name in self.average else average


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a sharded tensor, or the whole of another, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _as(now: Tensor, loaded: Tensor) -> Tensor:
    """A loaded tensor, sharded as the present tensor is, since a file has whole tensors."""
    if isinstance(now, DTensor) and not isinstance(loaded, DTensor):
        return distribute_tensor(loaded.to(now.device), now.device_mesh, now.placements)
    return loaded
