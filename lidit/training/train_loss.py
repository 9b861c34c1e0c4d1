"""Logs the loss of training: the mean over samples, steps and ranks since the last log, and by the samples' noise."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lidit.lightning_private import logs_now

NAME = "train/loss"
BINS = ("low", "middle", "high")  # thirds of the times in [0, 1], from data to noise


class TrainLoss(Callback):
    """Log `train/loss` every `trainer.log_every_n_steps` steps: the mean over all samples of all ranks since the last.

    Beside it are the means of the samples in each third of the times: `train/loss_low`, `_middle` and `_high` noise.
    Sums are kept on the device, and nothing waits for it between two logs. A resumed run goes on in its interval. A
    loss that is not a number makes the means so that it is in.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # (2, bins): this rank's losses since the last log, and how many there were

    def add(self, loss: Float[Tensor, " b"], t: Float[Tensor, " b"]) -> None:
        """Add the losses of samples at their times."""
        bins = len(BINS)
        of_bin = (t * bins).long().clamp(max=bins - 1)[:, None] == torch.arange(bins, device=t.device)
        losses = torch.where(of_bin, loss.detach().float()[:, None], 0.0)
        sums = torch.stack([losses.sum(0), of_bin.float().sum(0)])
        self.sums = sums if self.sums is None else self.sums.to(sums.device) + sums

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: dict[str, Tensor], *args: object
    ) -> None:
        """Add a batch, and log the means where it is time.

        Raises:
            ValueError: a training step of one's own does not give the losses and times of the samples.
        """
        if not isinstance(outputs, dict) or not {"losses", "times"} <= outputs.keys():
            raise ValueError(
                f"the training step of {type(pl_module).__name__} must give loss, losses (b) and times (b) in a dict, "
                "as TextToImage.training_step does"
            )
        self.add(outputs["losses"], outputs["times"])
        if not logs_now(trainer):
            return
        (losses, counts), self.sums = self._over_ranks(trainer), None
        mean = torch.tensor(sum(losses) / sum(counts))  # on the CPU, so that a progress bar shows it without waiting
        pl_module.log(NAME, mean, prog_bar=True)
        bins = {f"{NAME}_{name}": loss / n for name, loss, n in zip(BINS, losses, counts, strict=True) if n}
        for logger in trainer.loggers:  # by itself: Lightning would log an earlier mean for a bin without a sample
            logger.log_metrics(bins, trainer.global_step - 1)  # the number under which Lightning logs this step

    def _over_ranks(self, trainer: Trainer) -> list[list[float]]:
        own = self.sums.to(trainer.strategy.root_device, copy=True)  # Lightning's reduce writes into what it is given
        return trainer.strategy.reduce(own, reduce_op="sum").tolist()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the sums of all ranks; all of them call this."""
        checkpoint[NAME] = None if self.sums is None else self._over_ranks(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with the sums, on one rank; the others have none yet."""
        saved = checkpoint.get(NAME)
        self.sums = torch.tensor(saved) * trainer.is_global_zero if saved else None
