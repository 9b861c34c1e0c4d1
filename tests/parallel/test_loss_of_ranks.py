"""The logged loss of training, and the norm of its gradient, are those of all ranks."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

pytestmark = pytest.mark.slow


class Told(Callback):
    """Each rank writes the losses and times of every sample that it trained on."""

    def __init__(self, folder: str):
        self.folder, self.seen = Path(folder), []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: object) -> None:
        self.seen.append(torch.stack([outputs["losses"], outputs["times"]], 1))
        torch.save(torch.stack(self.seen), self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_the_logged_loss_is_of_the_samples_of_both_ranks_and_of_every_pass(
    strategy: str, recipe: Callable[..., Path], fit: Callable[..., dict], tmp_path: Path
) -> None:
    told = {"class_path": f"{__name__}.Told", "init_args": {"folder": str(tmp_path)}}
    settings = {"max_steps": 4, "accumulate_grad_batches": 2, "log_every_n_steps": 2, "strategy": strategy}
    given = {f"trainer__{key}": value for key, value in settings.items()}
    fit(recipe("both", trainer__callbacks=[told], **given), 2)
    seen = torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)], 1)  # passes, samples, loss and time
    assert seen.shape == (8, 8, 2)
    (metrics,) = (tmp_path / "logs").rglob("metrics.csv")
    rows = list(csv.DictReader(metrics.open()))
    for step, passes in ((1, seen[:4]), (3, seen[4:])):
        losses, times = passes.flatten(0, 1).unbind(1)
        thirds = {"low": times < 1 / 3, "middle": (times >= 1 / 3) & (times < 2 / 3), "high": times >= 2 / 3}
        expected = {"train/loss": losses.mean().item()}
        expected |= {f"train/loss_{name}": losses[of].mean().item() for name, of in thirds.items() if of.any()}
        logged = {
            k: float(v) for row in rows if row["step"] == str(step) for k, v in row.items() if "train/loss" in k and v
        }
        assert logged == pytest.approx(expected, rel=1e-5)


def test_the_logged_norm_of_the_gradient_is_that_of_one_process(
    recipe: Callable[..., Path], fit: Callable[..., dict], tmp_path: Path
) -> None:
    guard = {"class_path": "lidit.callbacks.guard.Guard"}
    strategies = {"one": ("auto", 1), "ddp": ("ddp", 2), "sharded": ("sharded", 2)}
    hsdp = {"class_path": "lidit.strategy.Sharded", "init_args": {"replicate": 2}}
    norms = {}
    for name, (strategy, ranks) in {**strategies, "copies": (hsdp, 2)}.items():
        given = {"trainer__max_steps": 3, "trainer__log_every_n_steps": 1, "trainer__strategy": strategy}
        logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / name)}}
        fit(recipe(name, trainer__callbacks=[guard], trainer__logger=logger, **given), ranks)
        (metrics,) = (tmp_path / name).rglob("metrics.csv")
        rows = list(csv.DictReader(metrics.open()))
        norms[name] = [float(row["train/gradient_norm"]) for row in rows if row["train/gradient_norm"]]
    assert len(norms["one"]) == 3
    assert min(norms["one"]) > 0
    for name in ("ddp", "sharded", "copies"):
        assert norms[name] == pytest.approx(norms["one"], rel=1e-4), name
