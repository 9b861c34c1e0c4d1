"""How often a training step waits for the device: each wait keeps the device idle until the next work reaches it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import lidit
from lidit.data.datamodule import Batch
from lidit.models.prompt_encoder import FeatureNorm

EMA, GUARD = ({"class_path": f"lidit.callbacks.{name}"} for name in ("ema.EMA", "guard.Guard"))
SPEED = {"class_path": "lidit.callbacks.throughput.Throughput"}
PACKAGE = f"{Path(lidit.__file__).parent}/"  # its whole path: a clone's folder is called lidit, too
ASKING = (PACKAGE, "/lightning/", "/transformers/", "/diffusers/", "/torch/optim/")  # parts of paths
READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique")


class Waits(TorchDispatchMode):
    """Notes where an operation's result, or its shape, is needed by the processor.

    A scalar that PyTorch's optimizers read is none: their counts of steps are on the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Iterable, args: tuple = (), kwargs: dict | None = None) -> object:
        name = func._schema.name.partition("::")[2]
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in READS or by_mask:
            places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()]
            asked = [place for place in places if any(part in place for part in ASKING)][-1]
            if "/torch/optim/" not in asked:
                self.found.append(f"{name}: {asked}")
        return func(*args, **(kwargs or {}))


class ThirdStep(Callback):
    """Watches one step, from the start of its batch to the start of the next, which is not a step that logs."""

    def __init__(self) -> None:
        self.waits = Waits()

    def on_train_batch_start(self, trainer: object, model: object, batch: Batch, number: int) -> None:
        if number == 2:
            self.waits.__enter__()
        if number == 3:
            self.waits.__exit__(None, None, None)


@pytest.mark.parametrize(("callbacks", "most"), [([EMA, SPEED], 0), ([EMA, SPEED, GUARD], 1)], ids=["", "guard"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_step_waits_for_the_device_once_for_the_guard_and_else_never(
    callbacks: list[dict], most: int, cached: bool, built: Callable, loader: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FeatureNorm, "BATCHES", 1)  # whitening has measured, and seen so, before the third step
    settings = {"log_every_n_steps": 50, "enable_progress_bar": True, "gradient_clip_val": 1.0}
    cli, watch, batches = built(*callbacks, max_steps=5, whiten=True, **settings), ThirdStep(), loader(5).dataset
    if cached:
        for batch in batches:
            batch.features = [tuple(features) for features in cli.model.encode_prompts(batch.prompt)]
            batch.longest = [int((mask.sum(1) - start).max()) for _, mask, start in batch.features]
    cli.trainer.callbacks.insert(0, watch)
    cli.trainer.fit(cli.model, DataLoader(batches, batch_size=None, collate_fn=loader(5).collate_fn))
    print(watch.waits.found)
    assert len(watch.waits.found) == most
    assert all("guard" in place for place in watch.waits.found)
