"""What a recipe costs: its operations, and what the memory of a GPU depends on (`memory.py`).

Weights, gradients, the optimizer and EMA are counted by the sharding plan; operations, what autograd saves, and what
encoding takes are found by running the recipe's own classes on tensors without memory. For GPUs activations are an
estimate from above: their attention saves less than a CPU's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from jsonargparse import Namespace
from torch import autocast, bfloat16, nn

from lidit.callbacks.ema import EMA
from lidit.data.cache import has_features, has_latents
from lidit.models.vae import FrozenVAE
from lidit.module import TextToImage, freeze
from lidit.parallel import choose, precise, units
from lidit.plan.activations import saved_by_recomputing
from lidit.plan.encoding import Encoding, encoding, noise
from lidit.plan.memory import CACHE, GB, Part, Plan
from lidit.plan.operations import FORWARD_AND_BACKWARD, DryRun, Operations, Read, Reading, Sizes
from lidit.strategy import NAME, Sharded, to_do_without
from lidit.training.optimizers import hidden_matrices


@dataclass(frozen=True)
class Counts:
    """What is counted of a model, whatever it is trained on and however it is spread.

    Args:
        parameters: of prompt encoder and backbone.
        buffers: numbers that a checkpoint holds beside them.
        trained: parameters that get gradients.
        momenta: numbers that the optimizer keeps.
        unit: parameters of the largest unit that is gathered.
        precise: those of them that are float32 in every precision.
        held: bytes of frozen models within backbone and prompt encoder.
        saved: what autograd saves, as `Plan` has it.
        operations: of an image, forward and backward.
        reads: operations of each LLM's reading.
        tokens: of each LLM's reading, with what goes before a caption.
        encoding: of a picture.
        noise: bytes that the objective holds of an image.
        latent: numbers of a latent.
    """

    parameters: int
    buffers: int
    trained: int
    momenta: int
    unit: int
    precise: int
    held: int
    saved: dict[int, tuple[int, int]]
    operations: Operations
    reads: tuple[Read, ...]
    tokens: tuple[int, ...]
    encoding: Encoding
    noise: int
    latent: int


def count(given: Namespace, model: TextToImage) -> Counts:
    """Build a recipe's model without memory, run it so, and measure it.

    Args:
        given: the recipe, its classes instantiated, with `pixels` and `tokens`.
        model: the recipe's.

    Raises:
        ValueError: a part cannot do without values, or pictures are none that the VAE and the backbone take.
    """
    readings = [Reading(llm, tokens) for llm, tokens in zip(model.llms, captions(given, model), strict=True)]
    dry_run = DryRun(model.build)
    backbone, encoder = dry_run.backbone, dry_run.encoder
    parts = nn.ModuleDict({"backbone": backbone, "prompt_encoder": encoder})
    freeze(parts, model.trained)
    side = latent_side(given.pixels, model.vae, backbone)
    latent = (model.vae.channels, side, side)
    sizes = Sizes((1, *latent), tuple(reading.features for reading in readings))
    with autocast("cpu", bfloat16, enabled=is_bf16(given)):
        saved = saved_by_recomputing(dry_run, sizes, given.parallel.checkpoint_every)
        forward = dry_run.operations(sizes)
    largest = max(shares(backbone, encoder))
    kept = sum(tensor.numel() for tensor in parts.state_dict().values())
    return Counts(
        parameters=size(parts),
        buffers=kept - size(parts),
        trained=sum(p.numel() for p in parts.parameters() if p.requires_grad),
        momenta=momenta(parts, model.optimizer),
        unit=largest.parameters,
        precise=largest.precise,
        held=held(backbone) + held(encoder),
        saved=saved,
        operations=Operations(
            forward.backbone * passes(backbone, is_trained(encoder)), forward.encoder * passes(encoder, False)
        ),
        reads=tuple(reading.operations() for reading in readings),
        tokens=tuple(reading.features.tokens for reading in readings),
        encoding=encoding(model.vae, given.pixels),
        noise=noise(model.objective, latent),
        latent=latent[0] * side * side,
    )


def planned(given: Namespace, model: TextToImage, counts: Counts | None = None) -> Plan:
    """A recipe's plan.

    Args:
        given: the recipe, its classes instantiated, with `pixels`, `tokens` and `gpu_memory`.
        model: the recipe's.
        counts: of such a model; None: they are taken here.

    Raises:
        ValueError: see `count`.
    """
    counts = counts or count(given, model)
    others = loaded(given, model, counts.encoding.weights)
    ema = any(isinstance(callback, EMA) for callback in given.trainer.callbacks or [])
    encodes = not has_latents(given.data.cache)
    return Plan(
        parameters=counts.parameters,
        trained=counts.trained,
        momenta=counts.momenta,
        ema=ema,
        llms=others.llms,
        spread=others.spread,
        others=others.vae + counts.held,
        saved=counts.saved,
        unit=counts.unit,
        precise=counts.precise,
        width=2 if is_bf16(given) else 4,
        encoding=counts.encoding.peak if encodes else 0,
        noise=counts.noise,
        parts=by_part(given, model, counts),
        images=given.data.batch_size,
        every=given.parallel.checkpoint_every,
        gpus=ranks(given.trainer),
        copies=copies(given, counts.parameters, ema, others.llms - others.spread),
        unread=others.unread,
    )


def by_part(given: Namespace, model: TextToImage, counts: Counts) -> dict[str, Part]:
    """The operations of each part; of LLMs and VAE 0 where a cache holds what they give."""
    backbone, encoder = counts.operations
    parts = {"backbone": Part(backbone), "prompt encoder": Part(encoder)}
    cached = has_features(given.data.cache)
    for number, (llm, read) in enumerate(zip(model.llms, counts.reads, strict=True), 1):
        if cached:
            part = Part(0)
        elif llm.sharded and ranks(given.trainer) > 1:  # the ranks run it equally often, so nothing is shared
            part = Part(read.alone)
        else:
            part = Part(read.each, read.before)
        parts[f"LLM {number}, {llm.name}"] = part
    return parts | {f"VAE, {model.vae.name}": Part(0 if has_latents(given.data.cache) else counts.encoding.operations)}


class Loaded(NamedTuple):
    """Bytes of the frozen models that a run reads, of LLMs also of those that are spread; what lets it do without."""

    llms: int
    spread: int
    vae: int
    unread: str


def loaded(given: Namespace, model: TextToImage, vae: int) -> Loaded:
    """The frozen models of a recipe that are not cached; `vae`: bytes of the VAE."""
    features, latents = to_do_without(given, has_features), to_do_without(given, has_latents)
    llms = [(llm.nbytes, llm.sharded) for llm in model.llms] if features else []
    return Loaded(
        llms=sum(n for n, _ in llms),
        spread=sum(n for n, sharded in llms if sharded),
        vae=vae if latents else 0,
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


class Share(NamedTuple):
    """Parameters of a unit that FSDP2 gathers, and those of them that it gathers in float32 in every precision."""

    parameters: int
    precise: int


def shares(backbone: nn.Module, encoder: nn.Module) -> list[Share]:
    """Of each unit, without those of the units within it."""
    counts, seen = [], set()
    for unit in units(backbone, encoder):
        own = [p for p in unit.parameters() if p not in seen]
        seen.update(own)
        exact = {p for part in precise(unit) for p in part.parameters()}
        counts.append(Share(sum(p.numel() for p in own), sum(p.numel() for p in own if p in exact)))
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


def is_bf16(given: Namespace) -> bool:
    """Whether passes compute in bfloat16."""
    return "bf16" in str(given.trainer.precision)
