"""What Lightning keeps to itself and we need. Each test says what goes wrong for a user when it changes."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import ModelParallelStrategy

from lidit.lightning_private import (
    batches_done,
    has_trainer,
    launched_by_lightning,
    logs_now,
    replace_signal_handlers,
    replaces_samplers,
    share,
    snapshot,
)


def trainer(folder: Path, *callbacks: Callback, **settings: object) -> Trainer:
    """One of four steps, on the CPU."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    small = {"accelerator": "cpu", "limit_val_batches": 0, "max_steps": 4}
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **quiet | small | settings)


class Fails(Callback):
    """An error before the second step."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if batch_idx == 1:
            raise ValueError("on the way")


def test_a_batch_that_was_interrupted_is_not_counted_as_done(tmp_path: Path) -> None:
    """`fit_loop.epoch_loop.batch_progress.total.processed`; else a resumed run shows other samples and other noise."""
    stopped = trainer(tmp_path, Fails())
    assert batches_done(stopped) == 0
    with pytest.raises(ValueError, match="on the way"):
        stopped.fit(BoringModel())
    assert batches_done(stopped) == 1


def test_a_resumed_run_counts_the_batches_of_the_one_before(tmp_path: Path) -> None:
    """The same counter in a checkpoint; else a resumed run begins its samples and its noise anew."""
    first = trainer(tmp_path)
    first.fit(BoringModel())
    torch.save(snapshot(first), tmp_path / "a.ckpt")
    again = trainer(tmp_path, max_steps=6)
    again.fit(BoringModel(), ckpt_path=tmp_path / "a.ckpt", weights_only=False)
    assert (batches_done(first), batches_done(again)) == (4, 6)


def test_a_snapshot_holds_all_that_a_run_goes_on_from(tmp_path: Path) -> None:
    """`_checkpoint_connector.dump_checkpoint`; else `Checkpoints` writes nothing that can be resumed."""
    done = trainer(tmp_path)
    done.fit(BoringModel())
    assert {"state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks"} <= snapshot(done).keys()
    assert snapshot(done)["global_step"] == 4


class Turns(Callback):
    """Writes after each batch whether its step is one that is logged."""

    def __init__(self) -> None:
        self.found: list[bool] = []

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        self.found.append(logs_now(trainer))


def test_it_is_known_after_which_batch_lightning_logs(tmp_path: Path) -> None:
    """`_should_accumulate`, `should_update_logs`; else `train/loss` is of another interval than it says."""
    turns = Turns()
    trainer(tmp_path, turns, log_every_n_steps=2, accumulate_grad_batches=2, max_epochs=-1).fit(BoringModel())
    assert turns.found == [False, False, False, True] * 2


def test_ranks_and_their_number_are_known_before_training(tmp_path: Path) -> None:
    """`distributed_sampler_kwargs`; else all ranks train on the same samples and noise."""
    assert share(trainer(tmp_path)) == (0, 1)
    assert share(trainer(tmp_path, devices=2, strategy="ddp")) == (0, 2)


def test_it_is_known_whether_lightning_would_split_the_data_again(tmp_path: Path) -> None:
    """`_accelerator_connector.use_distributed_sampler`; else each rank trains on a share of its share."""
    assert replaces_samplers(trainer(tmp_path))
    assert not replaces_samplers(trainer(tmp_path, use_distributed_sampler=False))


class Asked(Callback):
    """Who handles SIGTERM while it trains."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        replace_signal_handlers(trainer, lambda: None)

    def on_train_batch_end(self, *args: object) -> None:
        self.handler = signal.getsignal(signal.SIGTERM)


def test_handlers_of_signals_stay_as_they_are_while_it_trains(tmp_path: Path) -> None:
    """`_signal_connector.register_signal_handlers`; else a job that is to be preempted hangs until it is killed."""

    def ours(number: int, frame: FrameType | None) -> None:
        pass

    before, asked = signal.signal(signal.SIGTERM, ours), Asked()
    try:
        trainer(tmp_path, asked).fit(BoringModel())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert asked.handler is ours


def test_a_lightning_that_sets_handlers_otherwise_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = trainer(tmp_path)
    monkeypatch.delattr(type(changed._signal_connector), "register_signal_handlers")
    with pytest.raises(AttributeError, match="register_signal_handlers"):
        replace_signal_handlers(changed, lambda: None)


def test_who_started_the_ranks_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`_accelerator_connector.cluster_environment`; else a run that was told to stop ends with the wrong exit code."""
    assert launched_by_lightning(trainer(tmp_path))
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    assert not launched_by_lightning(trainer(tmp_path))


def test_a_model_knows_whether_it_is_trained(tmp_path: Path) -> None:
    """`LightningModule._trainer`; else LLMs are read by all ranks of a machine at once, or drawing alone fails."""
    model = BoringModel()
    assert not has_trainer(model)
    trainer(tmp_path).fit(model)
    assert has_trainer(model)


def test_what_our_subclasses_override_is_there() -> None:
    """Else a model that is sharded over several machines does not start (strategy.py), or `lidit plan` trains."""
    assert "_data_parallel_size" in vars(ModelParallelStrategy())
    assert callable(LightningCLI._run_subcommand)
