"""What every rank holds while gradients are accumulated, and what it draws with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing import ProcessRaisedException

pytestmark = pytest.mark.slow
DRAWING = {
    "class_path": "lidit.callbacks.samples.Samples",
    "init_args": {"prompts": ["a red circle"], "every_n_steps": 1, "steps": 2},
}


class Gradients(Callback):
    """Writes how many numbers of gradients rank 0 holds after a pass that is not the last of its step."""

    def __init__(self, file: str):
        self.file = file

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == 0 and trainer.is_global_zero:
            groups = [m._get_fsdp_state()._fsdp_param_group for m in pl_module.modules() if isinstance(m, FSDPModule)]
            params = [param for group in groups if group is not None for param in group.fsdp_params]
            whole = [p.unsharded_accumulated_grad for p in params if p.unsharded_accumulated_grad is not None]
            shares = [p.grad.to_local() for p in pl_module.parameters() if p.grad is not None]
            partial = [group._partial_reduce_output for group in groups if group is not None]
            found = {
                "parameters": sum(p.numel() for p in pl_module.parameters()),
                "whole": sum(grad.numel() for grad in whole),
                "shares": sum(grad.numel() for grad in shares),
                "waiting": sum(grad.numel() for grad in partial if grad is not None),
            }
            torch.save(found, self.file)


@pytest.mark.parametrize(("replicate", "ranks"), [(1, 2), (2, 4)])
def test_accumulated_gradients_are_held_as_shares(
    replicate: int, ranks: int, recipe: Callable[..., Path], fit: Callable[..., dict], tmp_path: Path
) -> None:
    strategy = {"class_path": "lidit.strategy.Sharded", "init_args": {"replicate": replicate}}
    seen = {"class_path": f"{__name__}.Gradients", "init_args": {"file": str(tmp_path / "gradients.pt")}}
    accumulating = {"trainer__max_steps": 2, "trainer__accumulate_grad_batches": 2}
    sharded = recipe("sharded", **accumulating, trainer__strategy=strategy, trainer__callbacks=[seen])
    losses = fit(sharded, ranks)["losses"]
    held = torch.load(tmp_path / "gradients.pt", weights_only=True)
    print(held)
    share = held["parameters"] / (ranks // replicate)
    assert held["whole"] == 0
    assert share <= held["shares"] + held["waiting"] < 1.1 * share + 100  # a share is rounded up
    alone = fit(recipe("alone", **accumulating), 1)["losses"]
    assert losses == pytest.approx(alone, abs=2e-5)


def test_a_sharded_run_in_bf16_mixed_draws_while_it_trains(
    recipe: Callable[..., Path], fit: Callable[..., dict], tmp_path: Path
) -> None:
    half = {"trainer__precision": "bf16-mixed", "trainer__max_steps": 2, "trainer__strategy": "sharded"}
    scoring = {
        "class_path": "lidit.callbacks.scores.CLIPScoreCallback",
        "init_args": {"pretrained": "bundled:clip", "prompt_sets": {"few": ["a red circle", "a star"]}, "steps": 2},
    }
    fit(recipe("half", **half, trainer__callbacks=[DRAWING, scoring]), 2)
    assert [path.name for path in sorted(tmp_path.rglob("samples/*.png"))] == ["step-000001.png", "step-000002.png"]


class Broken(Callback):
    """Makes the backbone fail when it is drawn with."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.backbone.blocks[1].register_forward_pre_hook(self.fail)

    @staticmethod
    def fail(block: torch.nn.Module, inputs: object) -> None:
        if not block.training:
            raise RuntimeError("the drawing's own error")


def test_the_error_of_a_drawing_is_its_own(recipe: Callable[..., Path], fit: Callable[..., dict]) -> None:
    broken = {"class_path": f"{__name__}.Broken"}
    failing = recipe("failing", trainer__strategy="sharded", trainer__callbacks=[broken, DRAWING])
    with pytest.raises(ProcessRaisedException, match=r"RuntimeError: the drawing's own error\n*$"):
        fit(failing, 2)
