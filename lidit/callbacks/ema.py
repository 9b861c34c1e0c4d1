"""Exponential moving average of the trained weights, saved, resumed, and used for validation and sampling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


class EMA(Callback):
    """Keep `ema = d ema + (1 - d) weights`, updated once per optimizer step before any checkpoint is written.

    The decay warms up as d = min(decay, (1 + n) / (10 + n)) in the n-th step, so that the first weights are forgotten
    soon. A step that left no gradient (`Guard` skipped it) is not followed and not counted. Where weights are sharded,
    each rank averages its share, without communication.

    Args:
        decay: the limit of d, in [0, 1).

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
        self._global_step = 0  # the trainer's, when last looked at; counts skipped steps too
        self._swapped = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the weights, or go on from a checkpoint's average.

        Raises:
            ValueError: the checkpoint's average is of another model.
        """
        weights = dict(pl_module.named_parameters())
        if self.average and self.average.keys() != weights.keys():
            differ = sorted(self.average.keys() ^ weights.keys())[:3]
            raise ValueError(f"the checkpoint's EMA is of another model ({', '.join(differ)} ...); start a new run")
        self.begin(pl_module)

    def begin(self, pl_module: LightningModule) -> None:
        """Own an average where the weights are, sharded as they are: a checkpoint's, or else the weights'."""
        weights = dict(pl_module.named_parameters())
        source = self.average or weights
        self.average = {name: source[name].detach().to(p.device, copy=True) for name, p in weights.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Know where a resumed run stands; without an average yet, begin from the weights it goes on with."""
        self._global_step = trainer.global_step
        if not self.steps:
            for name, parameter in pl_module.named_parameters():
                local(self.average[name]).copy_(local(parameter.detach()))

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        """Follow the weights, once per optimizer step."""
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
        """Validate the average."""
        if self.average:
            self._swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train on with the weights."""
        if self._swapped:
            self._swap(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test the average."""
        self.on_validation_start(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the weights as they were."""
        self.on_validation_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the weights in place when validation is interrupted."""
        if self._swapped:
            self._swap(pl_module)

    @contextmanager
    def swapped(self, pl_module: LightningModule) -> Iterator[None]:
        """The module with averaged weights, inside a `with` block; during validation it has them already."""
        if self._swapped:
            yield
            return
        self._swap(pl_module)
        try:
            yield
        finally:
            self._swap(pl_module)

    @torch.no_grad()
    def _swap(self, pl_module: LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            weight, average = local(parameter.detach()), local(self.average[name])
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        self._swapped = not self._swapped

    def state_dict(self) -> dict:
        """The average and how many steps it has followed."""
        return {"decay": self.decay, "steps": self.steps, "average": self.average}

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from a checkpoint; the decay in the config counts."""
        self.steps = state_dict["steps"]
        for name, average in state_dict["average"].items():
            self.average[name] = _as(self.average[name], average) if name in self.average else average


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor, with the same memory; all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _as(now: Tensor, loaded: Tensor) -> Tensor:
    """A loaded tensor, sharded if the present one is: a file has whole tensors."""
    if isinstance(now, DTensor) and not isinstance(loaded, DTensor):
        return distribute_tensor(loaded.to(now.device), now.device_mesh, now.placements)
    return loaded
