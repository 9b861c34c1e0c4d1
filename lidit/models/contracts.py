"""The contracts between the parts of a text-to-image model: what each part is given, and what it must have.

```
frozen LLM      prompts: list[str]                    -> Features
prompt encoder  (list of Features, t (b))             -> Text
backbone        (x_t (b c h w), t (b), Text)          -> prediction (b c h w)
objective       loss(predict: (x_t, t) -> ., x0)      -> loss of each sample (b), t (b)
```

A recipe names a class of your own by its import path. The class must keep the contract; it needs no base class but
`torch.nn.Module`, if it is trained. Letters: b batch, l tokens, e an LLM's width, d the width the backbone reads,
c h w latent. Times t are in [0, 1], from data to noise.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Features = tuple[Float[Tensor, "b _ _"], Bool[Tensor, "b _"], Int[Tensor, " b"]]
"""One LLM's features of a batch: tokens (b l e), which of them are valid (b l), and where each caption starts (b)."""


class Measured(tuple):
    """`Features` that also say how long their longest caption is, so that nobody waits for the device to learn it."""

    longest: int | None = None

    @classmethod
    def of(cls, features: Features, longest: int) -> Measured:
        """The features with that number of tokens, of the caption that has most."""
        measured = cls(features)
        measured.longest = longest
        return measured


def longest_caption(features: Features) -> int | None:
    """The number of tokens of the longest caption, if it is known without asking the device."""
    return features.longest if isinstance(features, Measured) else None


KeysValues = list[tuple[Tensor, Tensor]]
"""For each block of a backbone, the keys and the values that its cross-attention computes from a text."""


class Text(NamedTuple):
    """What a backbone reads: tokens, which of them are valid, and one vector of the whole text for modulation."""

    tokens: Float[Tensor, "b l d"]
    mask: Bool[Tensor, "b l"]
    pooled: Float[Tensor, "b _"]


def is_caption(mask: Bool[Tensor, "b l"], prompt_start: Int[Tensor, " b"]) -> Bool[Tensor, "b l"]:
    """Which tokens are the caption's: the valid ones from its first token on; template and instruction come before."""
    return mask & (torch.arange(mask.shape[1], device=mask.device) >= prompt_start[:, None])


class Encoder(Protocol):
    """A prompt encoder. Its class is called with `(llm_widths: list[int], width: int)`, the backbone's width last."""

    timeless: bool
    """Whether the text is the same at every time; sampling then computes it once per prompt."""
    units: Iterable[nn.Module]
    """Submodules whose weights FSDP2 gathers together, inner ones first; the encoder gathers the other weights."""

    def __call__(self, features: list[Features], t: Tensor) -> Text:
        """The text for times t (b)."""


class Backbone(Protocol):
    """A backbone. Its class is called with `(channels: int)`, the latent's channels.

    It may also have `keys_values(text) -> KeysValues`. Then sampling with a timeless encoder computes them once and
    passes them as `keys_values` to each call.
    """

    width: int
    """Channels d of the text's tokens."""
    patch: int
    """The sides of a latent must be multiples of it."""
    blocks: nn.ModuleList
    """The parts that activation checkpointing, compilation and FSDP2 work on; empty if the backbone is one piece."""

    def __call__(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        """The prediction (b c h w) for noisy latents (b c h w) at times t (b)."""


@runtime_checkable  # jsonargparse checks a recipe's class against it
class Objective(Protocol):
    """What the backbone learns to predict, and the path from data to noise; see `lidit/objectives.py`."""

    predicts: Literal["velocity", "noise"]
    """What the backbone predicts, which decides the samplers that fit."""

    def loss(self, predict: Any, x0: Any, generator: Any = None, /) -> Any:
        """Per-sample loss (b) of `predict(x_t, t)` for clean latents x0 (b c h w), and the times (b) drawn."""

    def times(self, steps: Any, latent_hw: Any, /) -> Any:
        """A sampler's times (steps + 1), decreasing from 1 to 0, for a latent's height and width."""

    def alpha_sigma(self, t: Any, /) -> Any:
        """The factors of data and of noise at times t, each of t's shape."""

    def to_x0(self, prediction: Any, x_t: Any, t: Any, /) -> Any:
        """The clean latent (b c h w) that follows from a prediction."""


def check_encoder(encoder: object) -> None:
    """Refuse an object that breaks the contract of a prompt encoder.

    Raises:
        ValueError: something is missing; the message names it.
    """
    _check(encoder, "prompt encoder", Encoder)


def check_backbone(backbone: object) -> None:
    """Refuse an object that breaks the contract of a backbone.

    Raises:
        ValueError: something is missing; the message names it.
    """
    _check(backbone, "backbone", Backbone)


def check_objective(objective: object) -> None:
    """Refuse an object that breaks the contract of an objective.

    Raises:
        ValueError: something is missing; the message names it.
    """
    _check(objective, "objective", Objective)


def _check(part: object, what: str, contract: type) -> None:
    wanted = [*contract.__annotations__, *(name for name in vars(contract) if not name.startswith("_"))]
    lacking = [name for name in wanted if not hasattr(part, name)]
    if not callable(part) and "__call__" in vars(contract):
        lacking.append("forward")
    if lacking:
        raise ValueError(
            f"{type(part).__module__}.{type(part).__name__} is no {what}: it has no {', '.join(lacking)}; "
            f"lidit.models.contracts.{contract.__name__} describes each"
        )
