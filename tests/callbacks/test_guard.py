"""A gradient that is not finite changes nothing, is counted and named, and stops the run only when it stays."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision

from lidit.callbacks.ema import EMA
from lidit.callbacks.guard import Guard

GUARD = {"class_path": "lidit.callbacks.guard.Guard"}
AVERAGE = {"class_path": "lidit.callbacks.ema.EMA"}


class Witness(Callback):
    """Copies weights, optimizer state and average after every batch; may spoil gradients as backward ends."""

    def __init__(self, spoilt: tuple[int, ...] = (), value: float = torch.inf) -> None:
        self.spoilt, self.value = spoilt, value
        self.seen: list[list[torch.Tensor]] = []

    def on_after_backward(self, trainer: Trainer, pl_module: torch.nn.Module) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx in self.spoilt:
            next(pl_module.backbone.parameters()).grad.view(-1)[0] = self.value

    def on_train_batch_end(self, trainer: Trainer, pl_module: torch.nn.Module, *_: object) -> None:
        states = [t for state in trainer.optimizers[0].state_dict()["state"].values() for t in state.values()]
        averages = [t for c in trainer.callbacks if isinstance(c, EMA) for t in c.average.values()]
        self.seen.append(copy.deepcopy([p.detach() for p in pl_module.parameters()] + states + averages))


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def one(trainer: Trainer, kind: type) -> Callback:
    (callback,) = [c for c in trainer.callbacks if isinstance(c, kind)]
    return callback


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_exactly_the_bad_step_is_skipped_bitwise(
    built: Callable, loader: Callable, logged: Callable, clip: float | None, value: float
) -> None:
    cli = built(AVERAGE, GUARD, max_steps=5, gradient_clip_val=clip)
    witness = Witness((2,), value)
    cli.trainer.callbacks.append(witness)
    cli.trainer.fit(cli.model, loader(5))
    changed = [not same(a, b) for a, b in zip(witness.seen, witness.seen[1:], strict=False)]
    assert changed == [True, False, True, True]
    assert all(t.isfinite().all() for t in witness.seen[-1])
    assert one(cli.trainer, EMA).steps == 4
    assert one(cli.trainer, Guard).skipped == 1
    assert list(logged("guard/skipped").values()) == [0, 0, 1, 1, 1]


def test_without_the_guard_a_clipped_infinite_gradient_ruins_the_weights(built: Callable, loader: Callable) -> None:
    cli = built(max_steps=3, gradient_clip_val=1.0)
    cli.trainer.callbacks.append(Witness((1,)))
    cli.trainer.fit(cli.model, loader(3))
    assert any(p.isnan().any() for p in cli.model.parameters())


def test_a_bad_first_step_leaves_the_optimizer_without_state(built: Callable, loader: Callable) -> None:
    cli = built(GUARD, max_steps=1, gradient_clip_val=1.0)
    cli.model.configure_model()
    before = [p.detach().clone() for p in cli.model.parameters()]
    cli.trainer.fit(cli.model, loader(1, bad=(0,)))
    assert same([p.detach() for p in cli.model.parameters()], before)
    assert not cli.trainer.optimizers[0].state


def test_a_healthy_run_is_bitwise_the_same_with_and_without_the_guard(built: Callable, loader: Callable) -> None:
    ends = []
    for callbacks in ([GUARD], []):
        cli = built(*callbacks, max_steps=3, gradient_clip_val=0.1)
        cli.trainer.fit(cli.model, loader(3))
        ends.append([p.detach() for p in cli.model.parameters()])
    assert same(*ends)


def test_the_samples_of_a_skipped_step_are_named(
    built: Callable, loader: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    cli = built(GUARD, max_steps=3, accumulate_grad_batches=2)
    with caplog.at_level(logging.WARNING, "lidit"):
        cli.trainer.fit(cli.model, loader(6, bad=(2,)))
    (record,) = [r for r in caplog.records if r.name == "lidit.callbacks.guard"]
    assert record.getMessage() == (
        "step 1, rank 0: skipped, since the gradient's norm is nan; samples: 2-0, 2-1, 3-0, 3-1"
    )


def test_bad_steps_in_a_row_stop_the_run_and_scattered_ones_do_not(built: Callable, loader: Callable) -> None:
    patient = {**GUARD, "init_args": {"max_in_a_row": 3}}
    scattered = built(patient, max_steps=8)
    scattered.trainer.fit(scattered.model, loader(8, bad=(0, 1, 3, 4, 6, 7)))
    assert one(scattered.trainer, Guard).skipped == 6
    stopped = built(patient, max_steps=8)
    with pytest.raises(ValueError, match="not finite in 3 steps in a row"):
        stopped.trainer.fit(stopped.model, loader(8, bad=(2, 3, 4, 5)))
    assert stopped.trainer.global_step == 4
    assert all(p.isfinite().all() for p in stopped.model.parameters())


def test_the_count_goes_on_after_a_resume(built: Callable, loader: Callable, tmp_path: Path) -> None:
    first = built(GUARD, max_steps=2, enable_checkpointing=True)
    first.trainer.fit(first.model, loader(2, bad=(0,)))
    first.trainer.save_checkpoint(tmp_path / "first.ckpt")
    second = built(GUARD, max_steps=4, enable_checkpointing=True)
    second.trainer.fit(second.model, loader(4, bad=(0,)), ckpt_path=str(tmp_path / "first.ckpt"), weights_only=True)
    assert one(second.trainer, Guard).skipped == 2


def test_float16_is_refused() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, plugins=[MixedPrecision("16-mixed", "cpu")])
    with pytest.raises(ValueError, match="use bf16-mixed"):
        Guard().setup(trainer, LightningModule(), "fit")


def test_a_patience_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Guard(0)
