"""The loss that training logs: of all samples of an interval, by their noise, also after a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch.utils.data import DataLoader

from lidit.training.train_loss import BINS, NAME, TrainLoss


class Told(Checkpoint):  # which Lightning calls last
    """Keeps the losses and times of every sample, and saves after a batch."""

    def __init__(self, file: Path, save_after: int = -1):
        self.file, self.save_after = file, save_after
        self.losses: list[torch.Tensor] = []
        self.times: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, model: object, outputs: dict, batch: object, number: int) -> None:
        self.losses.append(outputs["losses"])
        self.times.append(outputs["times"])
        if number == self.save_after:
            trainer.save_checkpoint(self.file)


def counted(losses: torch.Tensor, times: torch.Tensor) -> dict[str, float]:
    """The means by hand."""
    means = {NAME: losses.mean().item()}
    for i, name in enumerate(BINS):
        inside = [loss.item() for loss, t in zip(losses, times, strict=True) if i / 3 <= t < (i + 1) / 3]
        if inside:
            means[f"{NAME}_{name}"] = sum(inside) / len(inside)
    return means


def found(logged: Callable, step: int) -> dict[str, float]:
    names = [NAME, *(f"{NAME}_{name}" for name in BINS)]
    return {name: of_step[step] for name in names if step in (of_step := logged(name))}


@pytest.mark.parametrize("passes", [1, 2])
def test_the_mean_is_of_all_samples_since_the_last_log(
    passes: int, built: Callable, loader: Callable, logged: Callable, tmp_path: Path
) -> None:
    cli, told = built(max_steps=6, log_every_n_steps=3, accumulate_grad_batches=passes), Told(tmp_path / "a.ckpt")
    cli.trainer.callbacks.append(told)
    cli.trainer.fit(cli.model, loader(6 * passes))
    assert list(logged(NAME)) == [2, 5]
    for step, batches in ((2, slice(0, 3 * passes)), (5, slice(3 * passes, None))):
        expected = counted(torch.cat(told.losses[batches]), torch.cat(told.times[batches]))
        assert found(logged, step) == pytest.approx(expected, rel=1e-5)
    assert cli.trainer.progress_bar_metrics[NAME] == pytest.approx(logged(NAME)[5])


def test_a_resumed_run_goes_on_in_its_interval(
    built: Callable, loader: Callable, logged: Callable, tmp_path: Path
) -> None:
    cli, told = built(max_steps=6, log_every_n_steps=3, enable_checkpointing=True), Told(tmp_path / "a.ckpt", 3)
    cli.trainer.callbacks.append(told)
    batches, as_it_is = loader(1).dataset * 6, loader(1).collate_fn  # all alike, since this loader begins anew
    cli.trainer.fit(cli.model, DataLoader(batches, batch_size=None, collate_fn=as_it_is))
    whole = logged(NAME)
    (tmp_path / "lightning_logs").rename(tmp_path.parent / f"{tmp_path.name}-whole")
    again = built(max_steps=6, log_every_n_steps=3, enable_checkpointing=True)
    shown = DataLoader(batches, batch_size=None, collate_fn=as_it_is)
    again.trainer.fit(again.model, shown, ckpt_path=str(tmp_path / "a.ckpt"), weights_only=True)
    assert logged(NAME) == {5: whole[5]}


def test_a_bin_without_samples_is_not_logged_and_a_bad_loss_spoils_its_own_bin() -> None:
    meter = TrainLoss()
    meter.add(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.2]))
    meter.add(torch.tensor([5.0, torch.nan]), torch.tensor([0.3, 1.0]))
    losses, counts = meter.sums.tolist()
    assert counts == [3, 0, 1]
    assert losses[:2] == [9, 0]
    assert losses[2] != losses[2]


def test_saving_between_two_logs_leaves_the_sums_as_they_were() -> None:
    callback, checkpoint, trainer = TrainLoss(), {}, Mock(spec=Trainer)
    trainer.strategy.root_device = torch.device("cpu")
    trainer.strategy.reduce = lambda tensor, reduce_op: tensor.mul_(2)  # two ranks alike, in place as Lightning does
    callback.add(torch.tensor([1.0, 3.0]), torch.tensor([0.1, 0.9]))
    before = callback.sums.clone()
    callback.on_save_checkpoint(trainer, Mock(spec=LightningModule), checkpoint)
    assert torch.equal(callback.sums, before)
    assert checkpoint[NAME] == (2 * before).tolist()


def test_a_training_step_of_one_s_own_is_told_what_it_must_give() -> None:
    with pytest.raises(ValueError, match=r"must give loss, losses \(b\) and times \(b\) in a dict"):
        TrainLoss().on_train_batch_end(Mock(spec=Trainer), Mock(spec=LightningModule), {"loss": torch.tensor(1.0)})
