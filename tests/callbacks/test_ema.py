"""The average of the weights: its formula, its place in checkpoints, and when it is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lidit.callbacks.ema import EMA

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Walk(LightningModule):
    """Weights that wander in a way that depends on the step alone; remembers them, and what validation saw."""

    def __init__(self, fail_in_validation: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
        self.path: list[list[torch.Tensor]] = []
        self.validated: list[list[torch.Tensor]] = []
        self.fail_in_validation = fail_in_validation

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return (self.net(torch.arange(3.0)) - self.global_step % 5).square().sum()

    def on_train_batch_end(self, *_: object) -> None:
        self.path.append(weights(self))

    def validation_step(self, batch: torch.Tensor, _: int) -> None:
        self.validated.append(weights(self))
        if self.fail_in_validation:
            raise InterruptedError

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def fit(ema: EMA, steps: int, folder: Path, model: Walk | None = None, **settings: object) -> Walk:
    """Train to `steps`, from the folder's checkpoint where there is one; 20 batches are an epoch."""
    model = model or Walk()
    save = ModelCheckpoint(folder, every_n_train_steps=steps, save_last="link")
    trainer = Trainer(**QUIET | {"max_steps": steps, "default_root_dir": folder, "callbacks": [save, ema]} | settings)
    resume = "last" if list(folder.glob("*.ckpt")) else None
    trainer.fit(model, DataLoader(torch.zeros(20), 1), DataLoader(torch.zeros(1)), ckpt_path=resume, weights_only=True)
    return model


@pytest.mark.parametrize("decay", [0.3, 0.9999])
def test_the_average_is_the_closed_form(tmp_path: Path, decay: float) -> None:
    ema, start = EMA(decay), weights(Walk())
    path = [start, *fit(ema, 12, tmp_path).path]
    decays = [min(decay, (1 + n) / (10 + n)) for n in range(1, 13)]
    kept = [torch.tensor(decays[n:], dtype=torch.float64).prod() for n in range(13)]  # of what came in in step n
    shares = [kept[0]] + [(1 - d) * k for d, k in zip(decays, kept[1:], strict=True)]
    for i, average in enumerate(ema.average.values()):
        closed = sum(share * step[i].double() for share, step in zip(shares, path, strict=True))
        assert torch.allclose(average.double(), closed, rtol=0, atol=2e-6)
    assert ema.steps == 12


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_average_is_bitwise_that_of_an_uninterrupted_run(tmp_path: Path, accumulate: int) -> None:
    whole, rest, settings = EMA(0.9), EMA(0.9), {"accumulate_grad_batches": accumulate}
    fit(whole, 10, tmp_path / "whole", **settings)
    fit(EMA(0.9), 5, tmp_path / "parts", **settings)
    model = fit(rest, 10, tmp_path / "parts", **settings)
    assert len(model.path) == 5 * accumulate
    assert rest.steps == whole.steps == 10
    assert same(list(rest.average.values()), list(whole.average.values()))


def test_the_checkpoint_of_a_step_holds_the_average_of_that_step(tmp_path: Path) -> None:
    ema = EMA(0.9)
    fit(ema, 6, tmp_path)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["EMA"]
    assert set(state) == {"decay", "steps", "average"}
    assert state["steps"] == 6
    assert same(list(state["average"].values()), list(ema.average.values()))


def test_accumulated_gradients_are_one_step(tmp_path: Path) -> None:
    ema = EMA(0.9)
    fit(ema, 4, tmp_path, accumulate_grad_batches=3)
    assert ema.steps == 4


def test_validation_sees_the_average_and_training_goes_on_with_the_weights(tmp_path: Path) -> None:
    ema = EMA(0.9)
    averages = []

    class Witness(Callback):
        def on_train_batch_end(self, *_: object) -> None:
            averages.append([p.clone() for p in ema.average.values()])

    model = fit(ema, 4, tmp_path, callbacks=[ema, Witness()], val_check_interval=1, num_sanity_val_steps=0)
    undisturbed = fit(EMA(0.9), 4, tmp_path / "undisturbed", limit_val_batches=0)
    assert len(model.validated) == 4
    assert all(same(seen, average) for seen, average in zip(model.validated, averages, strict=True))
    assert not same(model.validated[-1], model.path[-1])
    assert all(same(a, b) for a, b in zip(model.path, undisturbed.path, strict=True))


def test_a_failing_validation_leaves_the_weights_in_place(tmp_path: Path) -> None:
    ema, model = EMA(0.9), Walk(fail_in_validation=True)
    with pytest.raises(InterruptedError):
        fit(ema, 4, tmp_path, model, val_check_interval=3, num_sanity_val_steps=0)
    assert same(model.validated[0], list(ema.average.values()))
    assert same(weights(model), model.path[-1])


def test_a_checkpoint_is_validated_by_its_average(tmp_path: Path) -> None:
    ema, model = EMA(0.9), Walk()
    fit(ema, 4, tmp_path, limit_val_batches=0)
    again = Trainer(callbacks=[EMA(0.9)], **QUIET)
    again.validate(model, DataLoader(torch.zeros(1)), str(tmp_path / "last.ckpt"), verbose=False, weights_only=True)
    assert same(model.validated[0], list(ema.average.values()))


def test_swapped_gives_the_weights_back_after_an_error_and_changes_nothing_where_they_are_swapped(
    tmp_path: Path,
) -> None:
    ema = EMA(0.9)
    model = fit(ema, 4, tmp_path)
    before, average = weights(model), [p.clone() for p in ema.average.values()]

    def fail() -> None:
        with ema.swapped(model), ema.swapped(model):
            assert same(weights(model), average)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail()
    assert same(weights(model), before)
    assert same(list(ema.average.values()), average)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    ema = EMA(0.9)
    ema.load_state_dict({"decay": 0.9, "steps": 3, "average": {"other": torch.zeros(1)}})
    with pytest.raises(ValueError, match="EMA is another model's"):
        fit(ema, 1, tmp_path)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_zero_to_one_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must be in"):
        EMA(decay)


def test_a_checkpoint_mentions_no_frozen_model(built: Callable, loader: Callable, tmp_path: Path) -> None:
    save = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": str(tmp_path), "every_n_train_steps": 2, "save_last": "link"},
    }
    cli = built({"class_path": "lidit.callbacks.ema.EMA"}, save, max_steps=2, enable_checkpointing=True)
    cli.trainer.fit(cli.model, loader(2))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    trained = {name for name, _ in cli.model.named_parameters()}
    assert checkpoint["callbacks"]["EMA"]["average"].keys() == checkpoint["state_dict"].keys() == trained
    assert {name.split(".")[0] for name in trained} == {"backbone", "prompt_encoder"}
    held = sum(p.numel() for p in cli.model.parameters())
    assert (tmp_path / "last.ckpt").stat().st_size < 4 * 4 * held + 200_000  # weights, average and two of Adam's
