"""What a recipe writes: its checkpoints, and a cache of its data, in bytes before any is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import Namespace

from lidit.callbacks.checkpoints import Checkpoints
from lidit.data.cache import KINDS
from lidit.data.index import ShardIndex, expand
from lidit.data.mix import names_in
from lidit.module import TextToImage
from lidit.plan.costs import Counts
from lidit.plan.memory import FLOAT32, GB, Plan
from lidit.plan.text import amount

STORED = 2  # bytes of a number in a cache: bfloat16, as `lidit prep precompute` writes it by default
PLACE = 16  # bytes that a cache holds of a caption beside its features: where it begins, twice
MILLION = 1_000_000


@dataclass(frozen=True)
class Saved:
    """A recipe's checkpoints.

    Args:
        weights: bytes of the weights, and of what is saved with them.
        optimizer: bytes of the optimizer's states.
        average: bytes of the averaged weights.
        ranks: how many of them write.
        nodes: on how many nodes they are.
        keep: how many checkpoints stay.
    """

    weights: int
    optimizer: int
    average: int
    ranks: int
    nodes: int
    keep: int

    @property
    def total(self) -> int:
        """Bytes of a checkpoint."""
        return self.weights + self.optimizer + self.average

    def seconds(self, disk: float) -> float:
        """Seconds to write a checkpoint, at `disk` bytes a second of each node."""
        return self.total / self.nodes / disk


def saved(given: Namespace, plan: Plan, counts: Counts) -> Saved:
    """The checkpoints of a recipe; all numbers in them are float32.

    Sharded, every rank writes its part: of several copies of a share, one, spread evenly. Otherwise rank 0 writes all.
    """
    callbacks = [each for each in given.trainer.callbacks or [] if isinstance(each, Checkpoints)]
    spread = plan.copies is not None
    return Saved(
        weights=(plan.parameters + counts.buffers) * FLOAT32,
        optimizer=plan.momenta * FLOAT32,
        average=plan.parameters * plan.ema * FLOAT32,
        ranks=plan.gpus if spread else 1,
        nodes=given.trainer.num_nodes if spread else 1,
        keep=(callbacks or [Checkpoints()])[0].keep,
    )


def cached(given: Namespace, model: TextToImage, counts: Counts) -> dict[str, int]:
    """Bytes of a sample in a cache of latents and features, as `lidit/data/cache.py` stores them without padding.

    All captions are taken to have the length that is planned for. Both kinds are stored where training mixes them.
    """
    kinds = len(KINDS) if 0 < given.data.dense_probability < 1 else 1
    found = {f"latents of {model.vae.name}": counts.latent * STORED}
    for number, (llm, tokens) in enumerate(zip(model.llms, counts.tokens, strict=True), 1):
        found[f"features of LLM {number}, {llm.name}"] = kinds * (tokens * llm.width * STORED + PLACE)
    return found


def samples(given: Namespace) -> int | None:
    """How many samples the recipe's data has: as asked, or as the shards' indices say; None: it is not here.

    Raises:
        ValueError: a shard cannot be read.
    """
    if given.samples is not None:
        return given.samples
    names = names_in(given.data.train)
    if not all(Path(name).is_dir() or all(Path(tar).is_file() for tar in expand(name)) for name in map(str, names)):
        return None
    return len(ShardIndex(names))


def lines(given: Namespace, model: TextToImage, plan: Plan, counts: Counts) -> Iterator[str]:
    """What is printed of checkpoints and caches."""
    found = saved(given, plan, counts)
    all_, weights, optimizer, average, each, kept = (
        amount(size / GB)
        for size in (
            *(found.total, found.weights, found.optimizer, found.average),
            *(found.total / found.ranks, found.keep * found.total),
        )
    )
    who = f"{each} GB by each of {found.ranks} ranks" if found.ranks > 1 else "by rank 0"
    yield f"A checkpoint: {all_} GB in float32 (weights {weights}, optimizer {optimizer}, EMA {average}), {who}"
    nodes = f"each of {found.nodes} nodes" if found.nodes > 1 else "its node"
    yield (
        f"It takes {amount(found.seconds(given.disk * GB))} s where {nodes} writes {given.disk:g} GB a second (--disk)."
        f" The {found.keep} that are kept take {kept} GB, and one more while it is written"
    )
    number = samples(given)
    said = "a million samples (data.train is not on this machine; --samples says how many there are)"
    yield f"A cache in bfloat16, of {said if number is None else f'{number:,} samples'}:"
    for name, size in cached(given, model, counts).items():
        yield f"  {name}: {amount(size / 1e3)} KB a sample, {amount(size * (number or MILLION) / GB)} GB"
