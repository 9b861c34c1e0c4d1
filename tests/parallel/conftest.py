"""Runs of `lidit fit` on one or two processes of this machine, over gloo, and what each of them ended with."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lidit.callbacks.ema import EMA
from lidit.fit import run

PATIENCE = 600  # seconds until processes are said to hang


class Witness(Callback):
    """Writes what training ended with: losses by step, weights, their average, which modules were sharded."""

    def __init__(self, file: str):
        self.file, self.losses, self.validated = file, {}, {}
        self._batch: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: object) -> None:
        self._batch.append(trainer.strategy.reduce(outputs["loss"].detach()).item())
        if len(self._batch) == trainer.accumulate_grad_batches:
            self.losses[trainer.global_step] = sum(self._batch) / len(self._batch)
            self._batch = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated[trainer.global_step] = trainer.callback_metrics["val/loss"].item()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (ema,) = [c for c in trainer.callbacks if isinstance(c, EMA)]
        facts = {
            "losses": self.losses,
            "validated": self.validated,
            "weights": {name: whole(p) for name, p in pl_module.state_dict().items()},
            "average": {name: whole(p) for name, p in ema.average.items()},
            "share": sum(share(p).numel() for p in pl_module.parameters()),
            "llms": [sum(share(p).numel() for p in llm._model.parameters()) for llm in pl_module.llms],
            "sharded": [name for name, part in pl_module.named_modules() if isinstance(part, FSDPModule)],
        }
        if trainer.is_global_zero:
            torch.save(facts, self.file)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def share(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.fixture
def recipe(tiny_recipe: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny recipe under a name, with 20 steps, no checkpoints, and changes by the path of their keys."""

    def write(name: str, **changes: Any) -> Path:
        content = yaml.safe_load(tiny_recipe.read_text())
        witness = {"class_path": f"{__name__}.Witness", "init_args": {"file": str(tmp_path / f"{name}.pt")}}
        content["trainer"]["callbacks"] = [content["trainer"]["callbacks"][0], witness]
        content["trainer"] |= {"max_steps": 20, "val_check_interval": 10}
        content["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path / "logs")  # not among the other tests'
        content["model"]["learning_rate"] = 1e-3
        content["data"]["batch_size"] = 8
        for place, value in changes.items():
            section, _, key = place.partition("__")
            if key == "callbacks":
                content[section][key] += value
            else:
                content.setdefault(section, {})[key] = value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def rank_process(rank: int, ranks: int, port: int, argv: list[str]) -> None:
    settings = {
        "LOCAL_RANK": rank,
        "NODE_RANK": 0,
        "WORLD_SIZE": ranks,
        "MASTER_PORT": port,
        "MASTER_ADDR": "127.0.0.1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, str(value))
        torch.set_num_threads(1)
        run("fit", argv)


def start(recipe: Path, ranks: int, *argv: str) -> torch.multiprocessing.ProcessContext:
    """Begins to train by a recipe, in processes of this machine; forked, since imports take longer than training."""
    port = 20_000 + time.monotonic_ns() % 10_000
    command = ["--config", str(recipe), "--trainer.devices", str(ranks), *argv]
    return torch.multiprocessing.start_processes(
        rank_process, (ranks, port, command), ranks, join=False, start_method="fork"
    )


@pytest.fixture
def fit() -> Callable[..., dict]:
    """Trains by a recipe on some ranks, and gives what the witness wrote; raises what a rank raised."""

    def train(recipe: Path, ranks: int, *argv: str) -> dict:
        processes = start(recipe, ranks, *argv)
        deadline = time.monotonic() + PATIENCE
        while not processes.join(timeout=1):
            if time.monotonic() > deadline:
                for process in processes.processes:
                    process.kill()
                pytest.fail("the processes hang")
        return torch.load(recipe.with_suffix(".pt"), weights_only=True)

    return train


@pytest.fixture
def begin() -> Callable[..., torch.multiprocessing.ProcessContext]:
    """Begins to train by a recipe on some ranks, and does not wait."""
    return start
