"""How many floating point operations a forward pass takes, counted by torch while the model runs without memory.

Any backbone and prompt encoder are counted, since they are run: weights, latents and features are torch's fake tensors,
which have a shape and no values. Masks and the places of captions are real, so an encoder may cut its text by them.

A multiplication and an addition are two operations; only matrix products, convolutions and attention count (norms,
activations and residuals are far below one per cent). Padding counts like tokens, since it is computed like them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lidit.models.chat import Split
from lidit.models.contracts import Text
from lidit.models.llm import FrozenLLM

FORWARD_AND_BACKWARD = 3  # operations of both over those of the forward pass
INSTRUCTION, TEMPLATE = 40, 15  # tokens before a caption, about: of both, and of a chat template alone
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}  # of features
T = TypeVar("T")


def counted(run: Callable[[], T]) -> tuple[T, int]:
    """What a function gives, and its operations."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # attention as matrix products
        found = run()
    return found, counter.get_total_flops()


@dataclass(frozen=True)
class FeatureSizes:
    """Of a batch of features of one LLM.

    Args:
        tokens: instruction and padding included.
        caption: the last of them, which are the longest caption's.
        width: channels.
        dtype: of the channels.
    """

    tokens: int
    caption: int
    width: int
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Sizes:
    """Of a batch.

    Args:
        latent: b c h w.
        features: of each LLM.
    """

    latent: tuple[int, int, int, int]
    features: tuple[FeatureSizes, ...]


class Operations(NamedTuple):
    """Of a forward pass of both parts."""

    backbone: int
    encoder: int


class Read(NamedTuple):
    """Operations of reading a caption: by itself; in a batch, of what goes before all captions, and of each caption."""

    alone: int
    before: int
    each: int


class DryRun:
    """A backbone and a prompt encoder that run without memory.

    The encoder is in evaluation mode: in training, whitening chooses tokens by values. A part that holds a frozen model
    outside the module tree has a method `hold_unread`, which makes that model of its sizes alone.

    Args:
        build: makes them, such as `TextToImage.build`.

    Raises:
        ValueError: here or in a run: a part cannot do without values.
    """

    def __init__(self, build: Callable[[], tuple[nn.Module, nn.Module]]):
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with without_values("the model", "built"), self.mode:
            self.backbone, self.encoder = build()
            for part in (self.backbone, self.encoder):
                if hasattr(part, "hold_unread"):
                    part.hold_unread()
        self.encoder.eval()
        self._counts: dict[Sizes, Operations] = {}

    def __call__(self, sizes: Sizes) -> Tensor:
        """A prediction."""
        return self._predict(sizes, self._read(sizes))

    def operations(self, sizes: Sizes) -> Operations:
        """Of a forward pass; for equal sizes they are counted once."""
        if sizes not in self._counts:
            with torch.no_grad():
                text, encoder = counted(lambda: self._read(sizes))
                _, backbone = counted(lambda: self._predict(sizes, text))
            self._counts[sizes] = Operations(backbone, encoder)
        return self._counts[sizes]

    def _read(self, sizes: Sizes) -> Text:
        b = sizes.latent[0]
        features = [
            (
                self._empty(b, each.tokens, each.width, dtype=each.dtype),
                torch.ones(b, each.tokens, dtype=torch.bool),
                torch.full((b,), each.tokens - each.caption),
            )
            for each in sizes.features
        ]
        with without_values(_name(self.encoder), "run"):
            return self.encoder(features, self._empty(b))

    def _predict(self, sizes: Sizes, text: Text) -> Tensor:
        with without_values(_name(self.backbone), "run"):
            return self.backbone(self._empty(*sizes.latent), self._empty(sizes.latent[0]), text)

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        with self.mode:
            return torch.empty(shape, dtype=dtype)


class Reading:
    """A frozen LLM that reads captions, without its weights.

    Args:
        llm: which.
        tokens: of a caption.
    """

    def __init__(self, llm: FrozenLLM, tokens: int):
        self.llm = llm
        self.before = INSTRUCTION if llm.prompts.instruction else TEMPLATE if llm.prompts.template == "chat" else 0
        self.splits = [Split([0] * self.before + [row] * tokens, self.before, 0) for row in (1, 2)]
        ids, _, start = llm._pad(self.splits[:1])
        length = ids.shape[1]
        self.features = FeatureSizes(length, length - int(start), llm.width, DTYPES[llm.dtype])

    def operations(self) -> Read:
        """Of reading the instruction and captions.

        Raises:
            ValueError: the LLM cannot do without values.
        """
        model = self.llm.skeleton()
        with without_values(self.llm.name, "run"), FakeTensorMode(allow_non_fake_inputs=True):
            model = model.to_empty(device="cpu")
        shared = self.llm._shared(self.splits)
        alone = self._run(model, 1, 0)
        if not shared:
            return Read(alone, 0, alone)
        one, two = (self._run(model, rows, shared) for rows in (1, 2))
        return Read(alone, 2 * one - two, two - one)

    def _run(self, model: Any, rows: int, shared: int) -> int:
        ids, mask, _ = self.llm._pad(self.splits[:rows])
        with without_values(self.llm.name, "run"), torch.no_grad():
            return counted(lambda: self.llm._states(model, ids, mask, shared))[1]


@contextmanager
def without_values(name: str, done: str) -> Iterator[None]:
    """Say which part it is that torch refuses to build or run."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name} cannot be {done} without values, so its operations cannot be counted: {reason}"
        ) from error


def _name(part: nn.Module) -> str:
    return f"{type(part).__module__}.{type(part).__qualname__}"
