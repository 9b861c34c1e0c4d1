"""Samplers: from noise to a clean latent, as pure functions of one signature, `sampler(predict, x, times) -> x0`.

`predict(x (b c h w), t (b))` is called once or twice a step; `times` decreases from 1 (noise) to 0 (data), see the top
of objectives.py. Each sampler needs predict to return either a velocity or a noise; `sampler_for` refuses a model that
returns the other. Samplers draw no random numbers, so the same noise gives the same latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]


def euler(predict: Predict, x: Float[Tensor, "b c h w"], times: Float[Tensor, " times"]) -> Float[Tensor, "b c h w"]:
    """Euler's method on dx/dt = velocity: one evaluation a step, order 1 (Liu et al. 2023, rectified flow)."""
    for now, later in _intervals(times):
        x = x + (later - now) * _ask(predict, x, now, times)
    return x


def heun(predict: Predict, x: Float[Tensor, "b c h w"], times: Float[Tensor, " times"]) -> Float[Tensor, "b c h w"]:
    """Heun's method on dx/dt = velocity: two evaluations a step, order 2 (Karras et al. 2022, algorithm 1).

    As there, the step that ends at 0 is Euler's: the order stays 2, and the model is not called at t = 0, a time that
    training with logit-normal times never draws. So s steps take 2 s - 1 evaluations.
    """
    for now, later in _intervals(times):
        velocity = _ask(predict, x, now, times)
        if later > 0:
            ahead = x + (later - now) * velocity
            velocity = (velocity + _ask(predict, ahead, later, times)) / 2
        x = x + (later - now) * velocity
    return x


def ddim(
    predict: Predict,
    x: Float[Tensor, "b c h w"],
    times: Float[Tensor, " times"],
    alpha_sigma: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Float[Tensor, "b c h w"]:
    """Deterministic DDIM on predicted noise: one evaluation a step (Song et al. 2021, equation 12 with eta = 0).

    `alpha_sigma(times)` gives the factors of data and of noise at those times; `sampler_for` binds it.
    """
    levels = zip(*(values.tolist() for values in alpha_sigma(times)), strict=True)
    for (now, _), (level, next_level) in zip(_intervals(times), pairwise(levels), strict=True):
        (alpha, sigma), (next_alpha, next_sigma) = level, next_level
        noise = _ask(predict, x, now, times)
        x = next_alpha * (x - sigma * noise) / alpha + next_sigma * noise
    return x


SAMPLERS = {"euler": euler, "heun": heun, "ddim": ddim}
ASKS_FOR = {"euler": "velocity", "heun": "velocity", "ddim": "noise"}


def sampler_for(
    name: str, predicts: str, alpha_sigma: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Callable[[Predict, Tensor, Tensor], Tensor]:
    """The sampler of that name, ready to be called as sampler(predict, x, times).

    Args:
        name: name of the sampler, one of `SAMPLERS`.
        predicts: what the model predicts, "velocity" or "noise": `objective.predicts`.
        alpha_sigma: the objective's path from data to noise: `objective.alpha_sigma`.

    Raises:
        ValueError: no sampler has that name, or it needs the other kind of prediction.
    """
    fitting = [known for known, asks_for in ASKS_FOR.items() if asks_for == predicts]
    if name not in SAMPLERS:
        raise ValueError(f"no sampler is called {name!r}: use one of {', '.join(SAMPLERS)}")
    if name not in fitting:
        raise ValueError(
            f"sampler {name!r} needs {ASKS_FOR[name]} and this model predicts {predicts}: "
            f"use one of {', '.join(fitting) or 'none, for no sampler needs that'}"
        )
    return partial(ddim, alpha_sigma=alpha_sigma) if name == "ddim" else SAMPLERS[name]


def watched(
    predict: Predict, to_x0: Callable[[Tensor, Tensor, Tensor], Tensor], watch: Callable[[Tensor], None]
) -> Predict:
    """The same predict, which also calls `watch` with the clean latent that follows from each prediction."""

    def predict_and_show(x: Tensor, t: Tensor) -> Tensor:
        prediction = predict(x, t)
        watch(to_x0(prediction, x, t))
        return prediction

    return predict_and_show


def guided(both: Predict, conditional: Predict, scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> Predict:
    """Classifier-free guidance (Ho & Salimans 2022), u + scale (c - u), as one predict for any sampler.

    Here c is the prediction with text and u the one without. Within the interval both come from one call on a batch of
    2 b. Outside of it (Kynkaanniemi et al. 2024: guidance harms at high noise and has no effect at low noise), and
    everywhere if scale is 1, where the sum is c, only c is predicted. All b samples must be at the same time, as they
    are in every sampler here.

    Args:
        both: predicts a batch of 2 b: the first b with their text, the last b, the same latents, without text.
        conditional: predicts a batch of b with their text.
        scale: guidance scale: 0 without text, 1 no guidance, above 1 towards the text.
        interval: lowest and highest time with guidance, both included.

    Raises:
        ValueError: the scale is negative or not finite, or the interval is not within 0 to 1.
    """
    low, high = interval
    if not (scale >= 0 and math.isfinite(scale)):
        raise ValueError(f"the guidance scale is {scale}: it must be a finite number of at least 0")
    if not 0 <= low <= high <= 1:
        raise ValueError(f"the guidance interval is {low} to {high}: it must be within 0 to 1, the lower time first")

    def predict(x: Tensor, t: Tensor) -> Tensor:
        if scale == 1 or not low <= float(t[0]) <= high:
            return conditional(x, t)
        with_text, without = both(torch.cat([x, x]), torch.cat([t, t])).to(x.dtype).chunk(2)
        return without + scale * (with_text - without)

    return predict


def _intervals(times: Tensor) -> list[tuple[float, float]]:
    """Pairs of neighbouring times as numbers; a loop over a tensor on a GPU would wait for the GPU at every step."""
    intervals = list(pairwise(times.tolist()))
    if not intervals or any(later >= now for now, later in intervals):
        raise ValueError(f"the times of a sampler must be two or more and decrease, not {times.tolist()}")
    return intervals


def _ask(predict: Predict, x: Tensor, time: float, times: Tensor) -> Tensor:
    """The prediction at one time for the whole batch, in the precision of x even if the model ran in a lower one."""
    return predict(x, torch.full((len(x),), time, dtype=times.dtype, device=x.device)).to(x.dtype)
