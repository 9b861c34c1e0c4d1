"""What a GPU holds while a recipe trains, and what would make it hold less."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import ceil

from lidit.strategy import NAME

GB = 1e9
FLOAT32 = 4  # bytes of each weight, gradient and what the optimizer and the average keep
CACHE = "cache features: `lidit prep precompute`"
RECOMPUTE = "--parallel.checkpoint_every"


@dataclass(frozen=True)
class Part:
    """Operations of a part of the model.

    Args:
        image: of each image, forward and, where it is trained, backward.
        batch: of each pass of a GPU, whatever its images: what all captions begin with is read once.
    """

    image: int
    batch: int = 0


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
        unit: parameters of the largest unit that FSDP2 gathers.
        precise: those of them that it gathers in float32.
        width: bytes of each other gathered number.
        encoding: the most bytes at one time that the VAE takes to encode a picture; 0 where latents are cached.
        noise: bytes of latent, noise and noisy latent, of each image of a GPU's pass.
        parts: operations by part, frozen ones included; 0 of what is cached.
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
    unit: int
    precise: int
    width: int
    encoding: int
    noise: int
    parts: dict[str, Part] = field(repr=False)
    images: int
    every: int
    gpus: int
    copies: int | None
    unread: str = CACHE

    def memory(self) -> dict[str, float]:
        """Bytes of one GPU when it holds most, by what fills them."""
        shares = 1.0 if self.copies is None else self.gpus / self.copies
        counts = {"weights": self.parameters, "gradients": self.trained, "optimizer": self.momenta}
        counts |= {"EMA": self.parameters * self.ema}
        states = {name: count * FLOAT32 / shares for name, count in counts.items()}
        frozen = self.llms - self.spread + self.spread / self.gpus + self.others
        fixed, image = self.saved[self.every]
        step = {
            "gathered": fixed if shares == 1 else 2 * self.whole_unit,
            "reduced": self.reduced(shares),
            "noise": self.noise * self.pass_size,
            "activations": image * self.pass_size,
        }
        before = max(0, self.encoding * self.pass_size - sum(step.values()))
        return {**states, "frozen": frozen, **step, "encoding": before}

    @property
    def whole_unit(self) -> int:
        """Bytes of the largest unit once it is gathered."""
        return self.precise * FLOAT32 + (self.unit - self.precise) * self.width

    def reduced(self, shares: float) -> float:
        """Bytes of gradients on their way to the other GPUs.

        FSDP2: the largest unit's, whole, in the type of the pass, and in float32 as they are sent. DDP: all of them
        once more, in the buckets that it sends.
        """
        if shares > 1:
            return float(self.whole_unit + self.unit * FLOAT32)
        return float(self.trained * FLOAT32) if self.gpus > 1 else 0.0

    @property
    def flops(self) -> float:
        """Operations of an image, forward and backward, frozen models that run included."""
        return sum(self.operations().values())

    def operations(self) -> dict[str, float]:
        """Operations of an image, by part."""
        return {name: part.image + part.batch / self.pass_size for name, part in self.parts.items()}

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
