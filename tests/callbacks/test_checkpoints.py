"""Checkpoints come after steps and after minutes, whichever is first."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
from lightning.pytorch import LightningModule, Trainer

from lidit.callbacks import checkpoints
from lidit.callbacks.checkpoints import Checkpoints


class Clocked:
    """Steps of a trainer of one rank that take so many seconds, by a clock of its own."""

    def __init__(self, callback: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.saved = 0.0, []
        self.trainer = Mock(spec=Trainer, global_step=0)
        self.trainer.strategy.broadcast = Mock(side_effect=lambda value: value)
        self.callback: Any = callback
        monkeypatch.setattr(checkpoints, "monotonic", lambda: self.now)
        monkeypatch.setattr(callback, "save", self.save)
        callback.on_train_start(self.trainer, Mock(spec=LightningModule))

    @property
    def asked(self) -> int:
        return self.trainer.strategy.broadcast.call_count

    def save(self, trainer: Trainer) -> None:
        if trainer.global_step in (0, *self.saved):  # saved already, as the real one sees
            return
        self.saved.append(trainer.global_step)
        self.callback._since, self.callback._next = (trainer.global_step, self.now), -1

    def run(self, steps: int, seconds: float, passes: int = 1) -> None:
        for i in range(steps * passes):
            self.now += seconds / passes
            self.trainer.global_step += (i + 1) % passes == 0
            self.callback.on_train_batch_end(self.trainer, Mock(spec=LightningModule))


def test_minutes_are_kept_though_the_ranks_agree_once_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Clocked(Checkpoints(every_n_steps=10_000, every_n_minutes=10.0), monkeypatch)
    trainer.run(600, seconds=5.0)
    assert trainer.saved == [120, 240, 360, 480, 600]
    assert trainer.asked == 5


def test_steps_count_as_well_and_begin_the_minutes_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Clocked(Checkpoints(every_n_steps=100, every_n_minutes=10.0), monkeypatch)
    trainer.run(250, seconds=5.0)
    assert trainer.saved == [100, 200]


def test_passes_of_a_step_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Clocked(Checkpoints(every_n_steps=10_000, every_n_minutes=1.0), monkeypatch)
    trainer.run(40, seconds=4, passes=4)
    assert trainer.saved == [15, 30]


def test_without_minutes_nothing_is_agreed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Clocked(Checkpoints(every_n_steps=50), monkeypatch)
    trainer.run(100, seconds=1000)
    assert trainer.saved == [50, 100]
    assert trainer.asked == 0


def test_minutes_of_none_are_refused() -> None:
    with pytest.raises(ValueError, match="every_n_minutes of Checkpoints is 0.0; it must be above 0"):
        Checkpoints(every_n_minutes=0.0)
