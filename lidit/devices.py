"""Where a trained model draws, and in which precision: the user's choice, the training's, and what the machine has."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from lidit.jobs.ranks import on_node

log = logging.getLogger(__name__)

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Machine:
    """What the choice depends on besides the model.

    Args:
        gpus: number of GPUs that torch sees.
        bfloat16: they compute in bfloat16 themselves; those before NVIDIA's Ampere only emulate it, slowly.
        local: this process's number among those of its machine; None: it is alone.
    """

    gpus: int = 0
    bfloat16: bool = True
    local: int | None = None


@dataclass(frozen=True)
class Compute:
    """Where a model draws, and how.

    Args:
        device: of the model.
        dtype: of matrix products and convolutions; weights and the picture on its way stay in float32.
        note: why it is this precision, where the user ought to know.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    note: str = ""

    def prepare(self) -> None:
        """On a GPU, let float32 products use TF32, in this process; and say what the user ought to know."""
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        if self.note:
            log.warning(self.note)


def name_of(dtype: torch.dtype) -> str:
    """A precision's name, such as float32."""
    return str(dtype).removeprefix("torch.")


def this_machine() -> Machine:
    """The machine that this process runs on."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Machine(gpus, bool(gpus) and torch.cuda.is_bf16_supported(including_emulation=False), on_node())


def chosen(device: str, dtype: Precision, trained: str | None, machine: Machine) -> Compute:
    """Where and in which precision a model draws.

    On a GPU that is the precision it was trained in; on a CPU float32, since few CPUs have units for bfloat16.

    Args:
        device: auto (a GPU if there is one), cpu, cuda, or cuda:N.
        dtype: auto, or a precision that is taken as it is.
        trained: the trainer's precision, such as bf16-mixed; None: it was not recorded.
        machine: what there is.

    Raises:
        ValueError: there is no such device.
    """
    where = chosen_device(device, machine)
    if dtype != "auto":
        return Compute(where, getattr(torch, dtype))
    if where.type == "cpu":
        return Compute(where)
    if trained is None:
        return Compute(where, note=_in_float32("the model does not record in which precision it was trained"))
    if trained.startswith("bf16"):
        if machine.bfloat16:
            return Compute(where, torch.bfloat16)
        return Compute(where, note=_in_float32(f"the model was trained in {trained}, which this GPU only emulates"))
    known = trained.startswith(("32", "64"))
    return Compute(where, note="" if known else _in_float32(f"the model was trained in {trained}"))


def _in_float32(why: str) -> str:
    return f"{why}: it draws in float32; say --dtype bfloat16 for the other"


def chosen_device(asked: str, machine: Machine) -> torch.device:
    """The device by its name; the processes of a machine take one GPU each, in turn.

    Raises:
        ValueError: the name is none, or there is no such GPU.
    """
    if asked == "cpu" or (asked == "auto" and not machine.gpus):
        return torch.device("cpu")
    kind, colon, number = asked.partition(":")
    if asked != "auto" and (kind != "cuda" or bool(colon) != number.isdecimal()):
        raise ValueError(f"--device {asked} is none that lidit draws on; say auto, cpu, cuda, or cuda:1 for the second")
    if not machine.gpus:
        raise ValueError(f"--device {asked}: torch sees no GPU here; say --device cpu, or see what `lidit doctor` says")
    index = int(number) if colon else (machine.local or 0) % machine.gpus
    if index >= machine.gpus:
        there = "cuda:0 alone" if machine.gpus == 1 else f"cuda:0 to cuda:{machine.gpus - 1}"
        raise ValueError(f"--device {asked}: there is no such GPU; torch sees {there}")
    return torch.device("cuda", index)


def computing(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """A context in which matrix products are computed in a precision; float32 leaves things as they are around it."""
    if dtype == torch.float32:
        return nullcontext()
    # Casts of weights are not kept: at 10B they would take 21 GB beside weights and LLMs.
    return torch.autocast(device.type, dtype, cache_enabled=False)
