"""How long a recipe trains on how many GPUs, and what that costs, from its operations and a stated utilisation."""

from __future__ import annotations

from collections.abc import Iterator

from jsonargparse import Namespace

from lidit.plan.memory import Plan
from lidit.plan.text import amount

PEAK = 989.0  # TFLOP/s of an NVIDIA H100 SXM: dense bfloat16, from its data sheet
UTILISATION = 0.4
HOUR = 3600


def step_flops(given: Namespace, plan: Plan) -> float:
    """Operations of an optimizer step, over all its passes; recomputing is not counted."""
    return plan.flops * plan.images * given.trainer.accumulate_grad_batches


def gpu_hours(given: Namespace, plan: Plan) -> float:
    """Of the whole training; frozen models are taken to run at the same utilisation."""
    return given.trainer.max_steps * step_flops(given, plan) / (given.peak * 1e12 * given.utilisation) / HOUR


def lines(given: Namespace, plan: Plan) -> Iterator[str]:
    """What is printed of time and price."""
    assumed = f"{given.utilisation:.0%} (--utilisation) of {given.peak:g} TFLOP/s a GPU (--peak)"
    batch = plan.images * given.trainer.accumulate_grad_batches
    step = step_flops(given, plan) / (plan.gpus * given.peak * 1e12 * given.utilisation)
    yield f"At {assumed}, a step of {batch} images on {plan.gpus} GPUs takes {amount(step)} s"
    if given.trainer.max_steps < 1:
        yield "trainer.max_steps is open, so there is no end to count to"
        return
    hours = gpu_hours(given, plan)
    yield (
        f"All {given.trainer.max_steps:,} steps: {amount(hours)} GPU-hours, {amount(hours / 24)} GPU-days, which are "
        f"{amount(hours / 24 / plan.gpus)} days; validation, pictures, checkpoints and stops not counted"
    )
    if given.price is not None:
        yield f"At {given.price:g} a GPU-hour (--price): {amount(hours * given.price)}"
