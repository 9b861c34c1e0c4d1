"""What a recipe costs: operations of a step, and the memory of a GPU by what fills it.

Weights, gradients, the optimizer and EMA are counted by the sharding plan; activations are what autograd would keep,
found by running the recipe's own classes on tensors without memory. For GPUs this is an estimate from above: their
attention keeps less than a CPU's. Buffers of NCCL and the allocator's gaps are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil

import torch
from diffusers.models import AutoencoderKL
from jsonargparse import Namespace
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lidit.activations import INSTRUCTION, forward, kept_by_recomputing
from lidit.callbacks.ema import EMA
from lidit.callbacks.throughput import FORWARD_AND_BACKWARD
from lidit.data.cache import has_features, has_latents
from lidit.models.flops import backbone_flops, prompt_encoder_flops
from lidit.models.lidit import LIDiT
from lidit.models.prompt_encoder import PromptEncoder
from lidit.models.vae import FrozenVAE
from lidit.module import TextToImage, freeze
from lidit.optimizers import is_muons
from lidit.parallel import choose, units
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
        vae: bytes of the VAE; 0 where latents are cached.
        kept: by n where every n-th block is recomputed (0: none), bytes that autograd keeps whatever the number of
            images, which are casts of weights, and bytes of each image.
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
    vae: int
    kept: dict[int, tuple[int, int]] = field(repr=False)
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
        for every in (2, 1) if self.every == 0 else (1,) if self.every > 1 else ():
            yield f"{RECOMPUTE} {every}", replace(self, every=every)
        for times in (2, 4, 8, 16, 32, 64):
            copies = 1 if self.copies is None else self.copies
            yield f"{times * self.gpus} GPUs, {NAME}", replace(self, gpus=times * self.gpus, copies=copies)


def planned(given: Namespace, model: TextToImage) -> Plan:
    """Build a recipe's model without memory, and measure it.

    Args:
        given: the recipe, its classes instantiated, with `pixels`, `tokens` and `gpu_memory`.
        model: the recipe's.

    Raises:
        ValueError: its parts are not LI-DiT's, or pictures are none that the VAE and the backbone take.
    """
    bf16 = "bf16" in str(given.trainer.precision)
    tokens = captions(given, model)
    side, rest = divmod(given.pixels, model.vae.factor)
    with FakeTensorMode():
        backbone, encoder = model.build()
        if not isinstance(backbone, LIDiT) or not isinstance(encoder, PromptEncoder):
            names = f"{type(backbone).__name__} and {type(encoder).__name__}"
            raise ValueError(f"`lidit plan` counts LIDiT with PromptEncoder; the recipe names {names}")
        if side < 1 or rest or side % backbone.patch:
            raise ValueError(f"--pixels {given.pixels} is no multiple of {model.vae.factor * backbone.patch}")
        parts = nn.ModuleDict({"backbone": backbone, "prompt_encoder": encoder})
        freeze(parts, model.trained)
        run = partial(forward, backbone, encoder, model.llms, tokens, side, bf16)
        kept = kept_by_recomputing(backbone, encoder, run, {0, 1, 2, given.parallel.checkpoint_every})
    trained = {name: p for name, p in parts.named_parameters() if p.requires_grad}
    muon = model.optimizer == "muon"
    uncached = {what: to_do_without(given, has) for what, has in (("features", has_features), ("latents", has_latents))}
    loaded = model.llms if uncached["features"] else []
    length = [INSTRUCTION + n for n in tokens]
    text = sum(length if encoder.truncate == "never" else tokens)
    learns = any(p.requires_grad for p in encoder.parameters())
    flops = passes(backbone, learns) * backbone_flops(backbone, (side // backbone.patch) ** 2, text)
    flops += passes(encoder, False) * prompt_encoder_flops(encoder, length, tokens)
    if not has_features(given.data.cache):
        flops += sum(llm_flops(llm.skeleton(), n) for llm, n in zip(model.llms, length, strict=True))
    weights, gpus = size(parts), ranks(given.trainer)
    ema = any(isinstance(callback, EMA) for callback in given.trainer.callbacks or [])
    strategy, whole = given.trainer.strategy, sum(llm.nbytes for llm in loaded if not llm.sharded)
    if strategy == "auto" and gpus > 1:
        strategy, _ = choose(weights, ema, int(given.gpu_memory * GB), whole)  # as `lidit fit` does
    return Plan(
        parameters=weights,
        trained=sum(p.numel() for p in trained.values()),
        momenta=sum(p.numel() * (1 if muon and is_muons(name, p) else 2) for name, p in trained.items()),
        ema=ema,
        llms=sum(llm.nbytes for llm in loaded),
        spread=sum(llm.nbytes for llm in loaded if llm.sharded),
        vae=vae_bytes(model.vae) if uncached["latents"] else 0,
        kept=kept,
        gathered=2 * max(map(size, units(backbone, encoder)[:-2])) * (2 if bf16 else 4),
        flops=flops,
        images=given.data.batch_size,
        every=given.parallel.checkpoint_every,
        gpus=gpus,
        copies=strategy.replicate if isinstance(strategy, Sharded) else 1 if strategy == NAME else None,
        unread=f"{CACHE}, {', '.join(uncached['features'])}",
    )


def captions(given: Namespace, model: TextToImage) -> list[int]:
    """For each LLM, tokens of a caption."""
    return [min(given.tokens or llm.prompts.max_tokens, llm.prompts.max_tokens) for llm in model.llms]


def passes(part: nn.Module, upstream: bool) -> int:
    """Forward passes that a training step of a part costs as much as; one that is partly trained counts as a whole."""
    if any(p.requires_grad for p in part.parameters()):
        return FORWARD_AND_BACKWARD
    return 2 if upstream else 1  # what comes before it asks for gradients of its input


def llm_flops(llm: nn.Module, n: int) -> int:
    """Operations of an LLM that reads n tokens: matrix products and attention; embeddings are looked up."""
    config = llm.config
    products = size(llm) - size(llm.get_input_embeddings())
    return 2 * products * n + 4 * n * n * config.hidden_size * config.num_hidden_layers


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
