"""All callbacks on two processes: the ranks agree, one of them writes, and numbers are of both."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor

from lidit.callbacks.ema import EMA
from lidit.callbacks.guard import Guard

CALLBACKS = [
    {"class_path": "lidit.callbacks.guard.Guard"},
    {"class_path": "lidit.callbacks.throughput.Throughput", "init_args": {"every_n_steps": 3, "warmup_batches": 1}},
    {
        "class_path": "lidit.callbacks.samples.Samples",
        "init_args": {"prompts": ["a red circle"], "every_n_steps": 4, "size": "16x16", "steps": 1},
    },
]
AVERAGE = {"class_path": "lidit.callbacks.ema.EMA", "init_args": {"decay": 0.9}}
STRATEGIES = {
    "ddp": "ddp",
    "sharded": {"class_path": "lidit.strategy.Sharded"},
}


class SpoilSecondRank(Callback):
    """After the exchange of gradients, one rank's alone is infinite, in the second batch."""

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_rank == 1 and trainer.fit_loop.epoch_loop.batch_idx == 1:
            gradient = pl_module.backbone.blocks[0].mlp[0].weight.grad
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).view(-1)[0] = torch.inf


def train_rank(rank: int, port: int, kind: str, folder: Path, built: Callable, loader: Callable) -> None:
    with pytest.MonkeyPatch.context() as patch:
        settings = {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": port}
        for name, value in (settings | {"MASTER_ADDR": "127.0.0.1"}).items():
            patch.setenv(name, str(value))
        torch.set_num_threads(1)
        cli = built(
            AVERAGE, *CALLBACKS, strategy=STRATEGIES[kind], devices=2, max_steps=6, use_distributed_sampler=False
        )
        cli.trainer.callbacks.append(SpoilSecondRank())
        cli.trainer.fit(cli.model, loader(6, bad=(3,) if rank == 1 else ()))  # the exchange spoils both ranks
        save_what_remains(cli.trainer, cli.model, folder / f"{rank}.pt")


def save_what_remains(trainer: Trainer, model: LightningModule, file: Path) -> None:
    (guard,) = [c for c in trainer.callbacks if isinstance(c, Guard)]
    averages = [t for c in trainer.callbacks if isinstance(c, EMA) for t in c.average.values()]
    tensors = [p.detach() for p in (*model.parameters(), *averages)]
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in tensors]
    torch.save({"weights": whole, "skipped": guard.skipped}, file)


@pytest.mark.slow
@pytest.mark.one_of_each
@pytest.mark.parametrize("kind", STRATEGIES)
def test_two_processes_agree_on_what_is_skipped_and_one_writes(
    built: Callable, loader: Callable, logged: Callable, tmp_path: Path, kind: str
) -> None:
    arguments = (29_500 + time.monotonic_ns() % 2000, kind, tmp_path, built, loader)
    processes = torch.multiprocessing.start_processes(train_rank, arguments, 2, join=False, start_method="fork")
    deadline = time.monotonic() + 600
    while not processes.join(timeout=1):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail("two processes hang")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["skipped"] == second["skipped"] == 2
    assert all(
        torch.equal(a, b) and a.isfinite().all() for a, b in zip(first["weights"], second["weights"], strict=True)
    )
    assert sorted(p.name for p in tmp_path.rglob("samples/*")) == ["step-000004.png", "step-000006.png"]
    assert list(logged("guard/skipped").values()) == [0, 1, 1, 2, 2, 2]
    images, seconds = logged("throughput/images_per_second"), logged("throughput/seconds_per_step")
    assert list(images) == [3, 6]
    assert all(images[step] * seconds[step] == pytest.approx(4) for step in images)  # two images on each of two ranks
