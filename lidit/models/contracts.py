"""The contracts between the parts of a text-to-image model: what each part is given, and what it must have.

```
frozen LLM      prompts: list[str]                    -> Features
prompt encoder  (list of Features, t (b))             -> Text
backbone        (x_t (b c h w), t (b), Text)          -> prediction (b c h w)
objective       loss(predict: (x_t, t) -> ., x0)      -> loss of each sample (b), t (b)
```

A class of your own that keeps a contract is named in a recipe by its import path; it needs no base class of ours but
`torch.nn.Module`, for what is trained. Letters: b batch, l tokens, e an LLM's width, d the width the backbone reads,
c h w latent. Times t are in [0, 1], from data to noise.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Features = tuple[Float[Tensor, "b _ _"], Bool[Tensor, "b _"], Int[Tensor, " b"]]
"""One LLM's reading of a batch: tokens (b l e), which of them are valid (b l), and where each caption starts (b)."""

KeysValues = list[tuple[Tensor, Tensor]]
"""For each block of a backbone, the keys and the values that its cross-attention makes of a text."""


class Text(NamedTuple):
    """What a backbone reads: tokens, which of them are valid, and one vector of the whole text for modulation."""

    tokens: Float[Tensor, "b l d"]
    mask: Bool[Tensor, "b l"]
    pooled: Float[Tensor, "b _"]


def is_caption(mask: Bool[Tensor, "b l"], prompt_start: Int[Tensor, " b"]) -> Bool[Tensor, "b l"]:
    """Which tokens are the caption's: the valid ones from its first token on; template and instruction come before."""
    return mask & (torch.arange(mask.shape[1], device=mask.device) >= prompt_start[:, None])


class Encoder(Protocol):
    """A prompt encoder, made by `(llm_widths: list[int], width: int)`, the LLMs' widths and the backbone's."""

    timeless: bool
    """The text does not depend on the time, so that sampling computes it once per prompt."""
    units: Iterable[nn.Module]
    """Submodules whose weights FSDP2 gathers together, inner ones first; what is in none belongs to the encoder."""

    def __call__(self, features: list[Features], t: Tensor) -> Text:
        """The text for times t (b)."""


class Backbone(Protocol):
    """A backbone, made by `(channels: int)`, the latent's.

    It may also have `keys_values(text) -> KeysValues`. Then sampling with a timeless encoder computes them once and
    passes them as `keys_values` to each call.
    """

    width: int
    """Channels d of the text's tokens."""
    patch: int
    """The sides of a latent are multiples of it."""
    blocks: nn.ModuleList
    """What activation checkpointing, compilation and FSDP2 work on; empty: the backbone is one piece."""

    def __call__(self, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
        """The prediction (b c h w) for noisy latents (b c h w) at times t (b)."""


@runtime_checkable  # for the parser
class Objective(Protocol):
    """What is regressed, and the path between data and noise that sampling follows back; see `lidit/objectives.py`."""

    predicts: Literal["velocity", "noise"]
    """What the backbone predicts, which decides the samplers that fit."""

    def loss(self, predict: Any, x0: Any, generator: Any = None, /) -> Any:
        """Per-sample loss (b) of `predict(x_t, t)` for clean latents x0 (b c h w), and the times (b) drawn."""

    def times(self, steps: Any, latent_hw: Any, /) -> Any:
        """Times of a sampler of so many steps, decreasing from 1 to 0 (steps + 1), for a latent's height and width."""

    def alpha_sigma(self, t: Any, /) -> Any:
        """What data and noise are multiplied with at times t, each of t's shape."""

    def to_x0(self, prediction: Any, x_t: Any, t: Any, /) -> Any:
        """The clean latent (b c h w) that a prediction means."""


def check_encoder(encoder: object) -> None:
    """Refuse what is no prompt encoder.

    Raises:
        ValueError: naming what it lacks.
    """
    _check(encoder, "prompt encoder", Encoder)


def check_backbone(backbone: object) -> None:
    """Refuse what is no backbone.

    Raises:
        ValueError: naming what it lacks.
    """
    _check(backbone, "backbone", Backbone)


def check_objective(objective: object) -> None:
    """Refuse what is no objective.

    Raises:
        ValueError: naming what it lacks.
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
            f"lidit.models.contracts.{contract.__name__} says what each is"
        )
