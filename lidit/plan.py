"""`lidit plan`: what a recipe costs, counted before anything is read, allocated or submitted.

Weights, gradients, AdamW and EMA are counted by the sharding plan; activations are what autograd would keep, found by
running the recipe's own classes on tensors without memory. For GPUs this is an estimate from above: their attention
keeps less than a CPU's. Buffers of NCCL and the allocator's gaps are not counted; a tenth of the memory is theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil
from typing import Any

import torch
from diffusers.models import AutoencoderKL
from jsonargparse import ArgumentParser, Namespace
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lidit import fit
from lidit.activations import INSTRUCTION, forward, kept_by_recomputing
from lidit.callbacks.ema import EMA
from lidit.callbacks.throughput import FORWARD_AND_BACKWARD
from lidit.data.cache import has_features, has_latents
from lidit.models.flops import backbone_flops, prompt_encoder_flops
from lidit.models.lidit import LIDiT
from lidit.models.prompt_encoder import PromptEncoder
from lidit.models.vae import FrozenVAE
from lidit.module import TextToImage, freeze
from lidit.parallel import BYTES_PER_PARAMETER, choose, units
from lidit.strategy import NAME, Sharded

GB = 1e9
ROOM = 0.9  # of a GPU's memory that may be filled
CACHE = "cache features: `lidit prep precompute`, data.cache"
RECOMPUTE = "--parallel.checkpoint_every"


class RecipeAlone(fit.RecipeCLI):
    """The command line of `lidit fit`, up to the point where something would be trained."""

    def add_arguments_to_parser(self, parser: ArgumentParser) -> None:
        """What is asked beside the recipe."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--gpus", type=list[int], default=[1, 8, 64], help="Numbers of GPUs to plan for.")
        parser.add_argument("--gpu_memory", type=float, default=80.0, help="Of a GPU, in GB.")
        parser.add_argument("--pixels", type=int, default=256, help="Side of a picture.")
        parser.add_argument("--tokens", type=int | None, default=None, help="Of a caption, at most max_tokens.")

    def instantiate_trainer(self, **kwargs: Any) -> None:  # pyrefly: ignore[bad-override]
        """None: the GPUs that the recipe asks for need not be here."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Train nothing."""


@dataclass(frozen=True)
class Plan:
    """What a recipe's memory and time depend on.

    Args:
        parameters: of prompt encoder and backbone.
        trained: those of them that get gradients.
        ema: an average of the weights is kept.
        llms: bytes of the frozen LLMs that are read; none where features are cached.
        spread: bytes of those that are spread over the GPUs.
        vae: bytes of the VAE; 0 where latents are cached.
        kept: by n where every n-th block is recomputed (0: none), bytes that autograd keeps whatever the number of
            images, which are casts of weights, and bytes of each image.
        gathered: bytes of the two largest units that FSDP2 gathers.
        flops: operations of an image, forward and backward; reading its caption included where it is not cached.
        images: of a batch, over all GPUs.
        every: the recipe's n.
        gpus: of the recipe.
        copies: of the model over them; None: each GPU holds it whole.
    """

    parameters: int
    trained: int
    ema: bool
    llms: int
    spread: int
    vae: int
    kept: dict[int, tuple[int, int]] = field(repr=False)
    gathered: int
    flops: int
    images: int
    every: int
    gpus: int
    copies: int | None

    def memory(self) -> dict[str, float]:
        """Bytes of one GPU, by what fills them."""
        shares = 1 if self.copies is None else self.gpus / self.copies
        counts = {"weights": self.parameters, "gradients": self.trained, "AdamW": self.trained}
        counts |= {"EMA": self.parameters * self.ema}
        states = {name: count * BYTES_PER_PARAMETER[name] / shares for name, count in counts.items()}
        frozen = self.llms - self.spread + self.spread / self.gpus + self.vae
        fixed, image = self.kept[self.every]
        gathered = fixed if shares == 1 else self.gathered
        return {**states, "frozen": frozen, "gathered": gathered, "activations": image * self.pass_size}

    @property
    def pass_size(self) -> int:
        """Images of a GPU in one pass."""
        return ceil(self.images / self.gpus)

    @property
    def total(self) -> float:
        """Bytes of one GPU."""
        return sum(self.memory().values())

    def cheaper(self) -> Iterator[tuple[str, Plan]]:
        """What would take less memory, what costs least time first: the switch, and the plan with it."""
        if self.llms:
            yield CACHE, replace(self, llms=0, spread=0)
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
        for every in (2, 1) if self.every == 0 else (1,) if self.every > 1 else ():
            yield f"{RECOMPUTE} {every}", replace(self, every=every)
        for times in (2, 4, 8, 16, 32, 64):
            copies = 1 if self.copies is None else self.copies
            yield f"{times * self.gpus} GPUs, {NAME}", replace(self, gpus=times * self.gpus, copies=copies)


def main(argv: list[str]) -> None:
    """Print the parameters, operations and memory of a recipe, and the cheapest switch where it does not fit.

    Raises:
        ArgumentError: the recipe is not understood.
        ValueError: it is not of LI-DiT's parts, or a number makes no sense.
    """
    given, model = read(argv)
    if min(given.gpus, default=0) < 1 or given.gpu_memory <= 0:
        raise ValueError(f"--gpus {given.gpus} of --gpu_memory {given.gpu_memory:g} are none to plan for")
    if given.tokens is not None and given.tokens < 1:
        raise ValueError(f"--tokens {given.tokens}: a caption has at least one")
    plan = planned(given, model)
    print(f"For pictures of {given.pixels} x {given.pixels} and captions of {given.tokens or 'max_tokens'} tokens")
    print(f"{plan.parameters / 1e6:,.1f}M parameters, {plan.trained / 1e6:,.1f}M of them trained")
    batch = plan.flops * plan.images / 1e12
    print(f"Forward and backward: {plan.flops / 1e9:,.4g} GFLOP an image, {batch:,.4g} TFLOP a batch of {plan.images}")
    if given.data.cache and not (has_features(given.data.cache) or has_latents(given.data.cache)):
        print("data.cache is not there yet, so the frozen models are counted as loaded")
    print()
    show(plan, given.gpus)
    print(verdict(plan, given.gpu_memory * GB))


def read(argv: list[str]) -> tuple[Namespace, TextToImage]:
    """The recipe of a command line, its classes instantiated, and its model, not built."""
    recipe = fit.run("fit", argv, RecipeAlone)
    return recipe.config_init.fit, recipe.model


def show(plan: Plan, gpus: list[int]) -> None:
    """Print the memory of a GPU in GB for numbers of them, the weights spread over all, then for the recipe itself."""
    spread = [replace(plan, gpus=n, copies=1) for n in gpus]
    columns = ["GPUs", "images", *plan.memory(), "all", "all, recomputing every block"]
    rows = []
    for each, name in [*((p, str(p.gpus)) for p in spread), (plan, f"recipe: {plan.gpus}")]:
        memory = [*each.memory().values(), each.total, replace(each, every=1).total]
        rows.append([name, str(each.pass_size), *(f"{part / GB:.2f}" for part in memory)])
    print(f"GB of a GPU; the recipe {describe(plan)}")
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in [columns, *rows]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def describe(plan: Plan) -> str:
    """How a recipe lays its weights out, and what it recomputes."""
    held = "holds them whole on each GPU" if plan.copies is None else f"spreads {plan.copies} copies over its GPUs"
    recomputed = f"every block in {plan.every}" if plan.every else "nothing"
    return f"{held} and recomputes {recomputed}"


def verdict(plan: Plan, memory: float) -> str:
    """Whether a recipe fits into GPUs of so many bytes, and what costs least time of what would make it fit."""
    budget = f"{ROOM:.0%} of {memory / GB:.0f} GB"
    if plan.total <= ROOM * memory:
        return f"It fits: {plan.total / GB:.1f} GB are within {budget}."
    said = f"It does not fit: {plan.total / GB:.1f} GB are above {budget}"
    switches = enough(plan, ROOM * memory)
    if not switches:
        return f"{said}. Nothing that the plan knows makes it fit; choose a smaller model."
    if len(switches) == 1:
        return f"{said}. The cheapest switch: {switches[0]}."
    return f"{said}, with any one switch. Together: {'; '.join(switches)}."


def enough(plan: Plan, budget: float) -> list[str]:
    """What makes a plan that does not fit fit: one switch, or another after caching and recomputing; none: nothing."""
    taken: list[str] = []
    while True:
        if found := next((switch for switch, other in plan.cheaper() if other.total <= budget), None):
            return [*taken, found]
        if plan.llms:
            taken, plan = [*taken, CACHE], replace(plan, llms=0, spread=0)
        elif plan.every != 1:
            taken, plan = [*taken, f"{RECOMPUTE} 1"], replace(plan, every=1)
        else:
            return []


def planned(given: Namespace, model: TextToImage) -> Plan:
    """Build a recipe's model without memory, and measure it.

    Args:
        given: the recipe, its classes instantiated, with `pixels`, `tokens` and `gpu_memory`.
        model: the recipe's.

    Raises:
        ValueError: its parts are not LI-DiT's, or pictures are none that the VAE and the backbone take.
    """
    bf16 = "bf16" in str(given.trainer.precision)
    tokens = [min(given.tokens or llm.prompts.max_tokens, llm.prompts.max_tokens) for llm in model.llms]
    side, rest = divmod(given.pixels, model.vae.factor)
    with FakeTensorMode():
        backbone, encoder = model.build()
        if not isinstance(backbone, LIDiT) or not isinstance(encoder, PromptEncoder):
            names = f"{type(backbone).__name__} and {type(encoder).__name__}"
            raise ValueError(f"`lidit plan` counts LIDiT with PromptEncoder; the recipe names {names}")
        if rest or side % backbone.patch:
            raise ValueError(f"--pixels {given.pixels} is no multiple of {model.vae.factor * backbone.patch}")
        run = partial(forward, backbone, encoder, model.llms, tokens, side, bf16)
        kept = kept_by_recomputing(backbone, encoder, run, {0, 1, 2, given.parallel.checkpoint_every})
    parts = nn.ModuleDict({"backbone": backbone, "prompt_encoder": encoder})
    freeze(parts, model.trained)
    loaded = [] if has_features(given.data.cache) else model.llms
    length = [INSTRUCTION + n for n in tokens]
    text = sum(length if encoder.truncate == "never" else tokens)
    flops = FORWARD_AND_BACKWARD * backbone_flops(backbone, (side // backbone.patch) ** 2, text)
    flops += FORWARD_AND_BACKWARD * prompt_encoder_flops(encoder, length, tokens)
    if loaded:
        flops += sum(2 * size(llm.skeleton()) * n for llm, n in zip(loaded, length, strict=True))
    weights, gpus = size(parts), ranks(given.trainer)
    ema = any(isinstance(callback, EMA) for callback in given.trainer.callbacks or [])
    strategy, whole = given.trainer.strategy, sum(llm.nbytes for llm in loaded if not llm.sharded)
    if strategy == "auto" and gpus > 1:
        strategy, _ = choose(weights, ema, int(given.gpu_memory * GB), whole)  # as `lidit fit` does
    return Plan(
        parameters=weights,
        trained=sum(p.numel() for p in parts.parameters() if p.requires_grad),
        ema=ema,
        llms=sum(llm.nbytes for llm in loaded),
        spread=sum(llm.nbytes for llm in loaded if llm.sharded),
        vae=0 if has_latents(given.data.cache) else vae_bytes(model.vae),
        kept=kept,
        gathered=2 * max(map(size, units(backbone, encoder)[:-2])) * (2 if bf16 else 4),
        flops=flops,
        images=given.data.batch_size,
        every=given.parallel.checkpoint_every,
        gpus=gpus,
        copies=strategy.replicate if isinstance(strategy, Sharded) else 1 if strategy == NAME else None,
    )


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
