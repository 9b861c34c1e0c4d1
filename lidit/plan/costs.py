"""What a recipe costs: operations of a step, and the memory of a GPU by what fills it.

Weights, gradients, the optimizer and EMA are counted by the sharding plan; operations and what autograd saves are found
by running the recipe's own classes on tensors without memory. For GPUs activations are an estimate from above: their
attention saves less than a CPU's. Buffers of NCCL and the allocator's gaps are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, NamedTuple

import torch
from diffusers.models import AutoencoderKL
from jsonargparse import Namespace
from torch import nn

from lidit.callbacks.ema import EMA
from lidit.data.cache import has_features, has_latents
from lidit.models.vae import FrozenVAE
from lidit.module import TextToImage, freeze
from lidit.optimizers import hidden_matrices
from lidit.parallel import choose, units
from lidit.plan.activations import saved_by_recomputing
from lidit.plan.operations import FORWARD_AND_BACKWARD, DryRun, Reading, Sizes
from lidit.strategy import NAME, Sharded, to_do_without

GB = 1e9
FLOAT32 = 4  # bytes of each weight, gradient and what the optimizer and the average keep
CACHE = "cache features: `lidit prep precompute`"
RECOMPUTE = "--parallel.checkpoint_every"


@dataclass(frozen=True)
class Plan:
    """What a recipe's memory and time depend on.

    Args:
        parameters: of prompt encoder and backbone.
        trained: those of them that get gradients.
        momenta: what the optimizer keeps, in numbers: two of a trained parameter, one where Muon trains it.
        ema: an average of the weights is kept.
        llms: bytes of the frozen LLMs that are read; none where features are cached.
        spread: bytes of those that are spread over the GPUs.
        others: bytes of the VAE, 0 where latents are cached, and of a frozen model in backbone or prompt encoder.
        saved: by n where every n-th block is recomputed (0: none), bytes that autograd saves whatever the number of
            images, which are casts of weights, and bytes of each image; 0 alone where there are no blocks.
        gathered: bytes of the two largest units that FSDP2 gathers.
        flops: operations of an image, forward and backward; reading its caption included where it is not cached.
        images: of a batch, over all GPUs.
        every: the recipe's n.
        gpus: of the recipe.
        copies: of the model over them; None: each GPU holds it whole.
        unread: what lets the run do without the LLMs.
    """

    parameters: int
    trained: int
    momenta: int
    ema: bool
    llms: int
    spread: int
    others: int
    saved: dict[int, tuple[int, int]] = field(repr=False)
    gathered: int
    flops: int
    images: int
    every: int
    gpus: int
    copies: int | None
    unread: str = CACHE

    def memory(self) -> dict[str, float]:
        """Bytes of one GPU, by what fills them."""
        shares = 1 if self.copies is None else self.gpus / self.copies
        counts = {"weights": self.parameters, "gradients": self.trained, "optimizer": self.momenta}
        counts |= {"EMA": self.parameters * self.ema}
        states = {name: count * FLOAT32 / shares for name, count in counts.items()}
        frozen = self.llms - self.spread + self.spread / self.gpus + self.others
        fixed, image = self.saved[self.every]
        gathered = fixed if shares == 1 else self.gathered
        return {**states, "frozen": frozen, "gathered": gathered, "activations": image * self.pass_size}

    @property
    def pass_size(self) -> int:
        """Images of a GPU in one pass."""
        return ceil(self.images / self.gpus)

    @property
    def further(self) -> list[int]:
        """The n with which more is recomputed than now, what costs least time first."""
        return [n for n in (2, 1) if n in self.saved and (self.every == 0 or n < self.every)]

    @property
    def total(self) -> float:
        """Bytes of one GPU."""
        return sum(self.memory().values())

    def cheaper(self) -> Iterator[tuple[str, Plan]]:
        """What would take less memory, what costs least time first: the switch, and the plan with it."""
        if self.llms:
            yield self.unread, replace(self, llms=0, spread=0)
        if self.copies is None and self.gpus > 1:
            yield f"--trainer.strategy {NAME}", replace(self, copies=1)
        if self.copies and self.copies > 1:
            yield "strategy.replicate 1", replace(self, copies=1)
        n = 2
        while self.pass_size >= n:
            yield (
                f"--trainer.accumulate_grad_batches {n}x, data.batch_size 1/{n}",
                replace(self, images=self.images // n),
            )
            n *= 2
        for every in self.further:
            yield f"{RECOMPUTE} {every}", replace(self, every=every)
        for times in (2, 4, 8, 16, 32, 64):
            copies = 1 if self.copies is None else self.copies
            yield f"{times * self.gpus} GPUs, {NAME}", replace(self, gpus=times * self.gpus, copies=copies)


def planned(given: Namespace, model: TextToImage) -> Plan:
    """Build a recipe's model without memory, run it so, and measure it.

    Args:
        given: the recipe, its classes instantiated, with `pixels`, `tokens` and `gpu_memory`.
        model: the recipe's.

    Raises:
        ValueError: a part cannot do without values, or pictures are none that the VAE and the backbone take.
    """
    bf16 = "bf16" in str(given.trainer.precision)
    readings = [Reading(llm, tokens) for llm, tokens in zip(model.llms, captions(given, model), strict=True)]
    dry_run = DryRun(model.build)
    backbone, encoder = dry_run.backbone, dry_run.encoder
    parts = nn.ModuleDict({"backbone": backbone, "prompt_encoder": encoder})
    freeze(parts, model.trained)
    side = latent_side(given.pixels, model.vae, backbone)
    sizes = Sizes((1, model.vae.channels, side, side), tuple(reading.features for reading in readings))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        saved = saved_by_recomputing(dry_run, sizes, given.parallel.checkpoint_every)
        forward = dry_run.operations(sizes)
    flops = forward.backbone * passes(backbone, is_trained(encoder)) + forward.encoder * passes(encoder, False)
    if not has_features(given.data.cache):
        flops += sum(reading.operations() for reading in readings)
    others = loaded(given, model)
    ema = any(isinstance(callback, EMA) for callback in given.trainer.callbacks or [])
    return Plan(
        parameters=size(parts),
        trained=sum(p.numel() for p in parts.parameters() if p.requires_grad),
        momenta=momenta(parts, model.optimizer),
        ema=ema,
        llms=others.llms,
        spread=others.spread,
        others=others.vae + held(backbone) + held(encoder),
        saved=saved,
        gathered=2 * max(shares(backbone, encoder)) * (2 if bf16 else 4),
        flops=flops,
        images=given.data.batch_size,
        every=given.parallel.checkpoint_every,
        gpus=ranks(given.trainer),
        copies=copies(given, size(parts), ema, others.llms - others.spread),
        unread=others.unread,
    )


class Loaded(NamedTuple):
    """Bytes of the frozen models that a run reads, of LLMs also of those that are spread; what lets it do without."""

    llms: int
    spread: int
    vae: int
    unread: str


def loaded(given: Namespace, model: TextToImage) -> Loaded:
    """The frozen models of a recipe that are not cached."""
    features, latents = to_do_without(given, has_features), to_do_without(given, has_latents)
    llms = [(llm.nbytes, llm.sharded) for llm in model.llms] if features else []
    return Loaded(
        llms=sum(n for n, _ in llms),
        spread=sum(n for n, sharded in llms if sharded),
        vae=vae_bytes(model.vae) if latents else 0,
        unread=f"{CACHE}, {', '.join(features)}",
    )


def held(part: nn.Module) -> int:
    """Bytes of frozen models that a part keeps outside its module tree."""
    models = [value for value in vars(part).values() if isinstance(value, nn.Module)]
    return sum(p.numel() * p.itemsize for model in models for p in model.parameters())


def latent_side(pixels: int, vae: FrozenVAE, backbone: Any) -> int:
    """The side of the latent of a picture.

    Raises:
        ValueError: the VAE or the backbone does not take such pictures.
    """
    side, rest = divmod(pixels, vae.factor)
    if side < 1 or rest or side % backbone.patch:
        raise ValueError(f"--pixels {pixels} is no multiple of {vae.factor * backbone.patch}")
    return side


def copies(given: Namespace, parameters: int, ema: bool, whole: int) -> int | None:
    """Copies of the model over the GPUs, as `lidit fit` lays it out; None: each holds it whole.

    Args:
        given: the recipe.
        parameters: of the model.
        ema: an average of them is kept.
        whole: bytes of the frozen models that each GPU holds.
    """
    strategy = given.trainer.strategy
    if strategy == "auto" and ranks(given.trainer) > 1:
        strategy, _ = choose(parameters, ema, int(given.gpu_memory * GB), whole)
    return strategy.replicate if isinstance(strategy, Sharded) else 1 if strategy == NAME else None


def momenta(parts: nn.Module, optimizer: str) -> int:
    """Numbers that an optimizer keeps: two of a trained parameter, one where Muon trains it."""
    hidden = hidden_matrices(parts) if optimizer == "muon" else {}
    return sum(p.numel() * (1 if p in hidden else 2) for p in parts.parameters() if p.requires_grad)


def shares(backbone: nn.Module, encoder: nn.Module) -> list[int]:
    """Parameters of each unit that FSDP2 gathers, without those of the units within it."""
    counts, seen = [], set()
    for unit in units(backbone, encoder):
        own = [p for p in unit.parameters() if p not in seen]
        seen.update(own)
        counts.append(sum(p.numel() for p in own))
    return counts


def captions(given: Namespace, model: TextToImage) -> list[int]:
    """For each LLM, tokens of a caption."""
    return [min(given.tokens or llm.prompts.max_tokens, llm.prompts.max_tokens) for llm in model.llms]


def passes(part: nn.Module, upstream: bool) -> int:
    """Forward passes that a training step of a part costs as much as; one that is partly trained counts as a whole."""
    if is_trained(part):
        return FORWARD_AND_BACKWARD
    return 2 if upstream else 1  # what comes before it asks for gradients of its input


def is_trained(part: nn.Module) -> bool:
    """Whether any of it gets gradients."""
    return any(p.requires_grad for p in part.parameters())


def size(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def ranks(trainer: Namespace) -> int:
    """GPUs of a recipe; 1 where it leaves that to the machine."""
    devices = trainer.devices
    each = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdecimal() else 1
    return max(1, each) * trainer.num_nodes


def vae_bytes(vae: FrozenVAE) -> int:
    """Bytes of a VAE's weights, from its config alone."""
    with torch.device("meta"):
        return size(AutoencoderKL.from_config(vae.config)) * getattr(torch, vae.dtype).itemsize
