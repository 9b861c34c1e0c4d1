"""Objectives: how a noisy latent is made, what the model learns to predict, and how the time is drawn.

The one time convention of this project: t in [0, 1], 0 = data, 1 = noise, x_t = (1 - t) x0 + t noise, v = noise - x0.
`DDPM` (the paper's appendix A.1) keeps t and v but has a path of its own, x_t = alpha(t) x0 + sigma(t) noise.

Both classes have the same methods, so that training and sampling need not know which one they hold: `loss`, `sample_t`,
`times`, `alpha_sigma`, `x_t`, `to_velocity`, `to_noise`, `to_x0`; and `predicts`, which names what the model predicts.
Letters: b batch, c h w latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lidit.draws import Draws, draw

Latent = Float[Tensor, "b c h w"]
Times = Float[Tensor, " b"]
Predict = Callable[[Tensor, Tensor], Tensor]
"""The model, called with noisy latents (b c h w) and times (b), returns a velocity or a noise (b c h w)."""


class RectifiedFlow:
    """Rectified flow (Liu et al. 2023) with the time sampling of Stable Diffusion 3 (Esser et al. 2024, section 3.1).

    A latent of m positions needs more noise to be destroyed than one of n < m positions (section 5.3.2 there). So each
    time t, in training and in sampling alike, becomes a t / (1 + (a - 1) t) with a = sqrt(m / n).

    Args:
        t_distribution: distribution of times; "logit_normal" draws t = sigmoid(normal), which prefers middle times;
            "uniform" prefers none.
        t_mean: mean of the normal variable; above 0, times near noise are more frequent. Used by "logit_normal" alone.
        t_std: standard deviation of the normal variable. Used by "logit_normal" alone.
        shift: the number a, for latents of every size; or "resolution" for a = sqrt(m / n), but at least 1.
        base_size: height and width, in latent pixels, of the size that is not shifted: n = base_size**2.
            32 is 256 px with a VAE of factor 8.
    """

    predicts = "velocity"

    def __init__(
        self,
        t_distribution: Literal["logit_normal", "uniform"] = "logit_normal",
        t_mean: float = 0.0,
        t_std: float = 1.0,
        shift: float | Literal["resolution"] = "resolution",
        base_size: int = 32,
    ):
        # UNSTATED: the paper names no distribution of times; this one is Stable Diffusion 3's, and so is the shift.
        _one_of("t_distribution", t_distribution, ("logit_normal", "uniform"))
        if isinstance(shift, str):
            _one_of("shift, when it is not a number,", shift, ("resolution",))
        else:
            _positive("shift", shift)
        _positive("t_std", t_std)
        _positive("base_size", base_size)
        self.t_distribution, self.t_mean, self.t_std = t_distribution, t_mean, t_std
        self.shift, self.base_size = shift, base_size

    def loss(self, predict: Predict, x0: Latent, generator: Draws = None) -> tuple[Float[Tensor, " b"], Times]:
        """Mean squared error of the velocity predict(x_t, t), in float32, for each sample; and the times drawn."""
        x0 = x0.float()
        t = self.sample_t(len(x0), x0.shape[-2:], generator, x0.device)
        noise = draw(torch.randn, x0.shape, generator, x0.device)
        return _squared_error(predict(self.x_t(x0, noise, t), t), noise - x0), t

    def sample_t(
        self, b: int, latent_hw: Sequence[int], generator: Draws = None, device: torch.device | str = "cpu"
    ) -> Times:
        """Times for a batch of b latents of that height and width, shifted."""
        if self.t_distribution == "uniform":
            return self._shifted(draw(torch.rand, (b,), generator, device), latent_hw)
        normal = draw(torch.randn, (b,), generator, device)
        return self._shifted(torch.sigmoid(self.t_mean + self.t_std * normal), latent_hw)

    def times(self, steps: int, latent_hw: Sequence[int]) -> Float[Tensor, " times"]:
        """Times of a sampler (steps + 1), decreasing from 1 to 0, shifted as in training.

        Raises:
            ValueError: steps is below 1.
        """
        if steps < 1:
            raise ValueError(f"steps is {steps}: a sampler needs at least 1 step")
        evenly = torch.linspace(1, 0, steps + 1, dtype=torch.float64)  # in float32 the shift would miss 1 by a rounding
        return self._shifted(evenly, latent_hw).float()

    def shift_for(self, latent_hw: Sequence[int]) -> float:
        """The number a of the shift for a latent of that height and width."""
        if not isinstance(self.shift, str):
            return float(self.shift)
        # UNSTATED: SD3 writes the shift for sizes above the base. Below it we keep a = 1: a < 1 would take the training
        # times away from the noise end, where the layout of the picture is decided.
        return max(1.0, math.sqrt(math.prod(latent_hw)) / self.base_size)

    def alpha_sigma(self, t: Float[Tensor, "*any"]) -> tuple[Float[Tensor, "*any"], Float[Tensor, "*any"]]:
        """The factors of data and of noise at time t: 1 - t and t."""
        return 1 - t, t

    def x_t(self, x0: Latent, noise: Latent, t: Times) -> Latent:
        """The noisy latent (1 - t) x0 + t noise."""
        return _mix(x0, noise, *self.alpha_sigma(t))

    def to_velocity(self, prediction: Latent, x_t: Latent, t: Times) -> Latent:
        """The velocity in a prediction of this objective: the prediction itself."""
        return prediction

    def to_noise(self, prediction: Latent, x_t: Latent, t: Times) -> Latent:
        """The noise in a prediction of this objective."""
        return velocity_to_noise(prediction, x_t, *self.alpha_sigma(t))

    def to_x0(self, prediction: Latent, x_t: Latent, t: Times) -> Latent:
        """The clean latent in a prediction of this objective: the noise minus the velocity."""
        return self.to_noise(prediction, x_t, t) - prediction

    def _shifted(self, t: Float[Tensor, " n"], latent_hw: Sequence[int]) -> Float[Tensor, " n"]:
        a = self.shift_for(latent_hw)
        return a * t / (1 + (a - 1) * t)


class DDPM:
    """Noise prediction over 1000 discrete steps (Ho et al. 2020), the loss the paper writes in its appendix A.1.

    Step k = 0 ... 999 is time t = (k + 1) / 1000; t = 0 is the clean latent, with alpha 1 and sigma 0. A time between
    two steps is rounded to the nearest step. There is no shift: every latent size has the same times.

    Args:
        schedule: noise schedule; "linear" has betas evenly spaced from 0.0001 to 0.02 (DDPM, DiT); "scaled_linear" has
            their square roots evenly spaced, from 0.00085 to 0.012 (Stable Diffusion).
    """

    # UNSTATED: the paper names no schedule; linear is DiT's, which LI-DiT builds on. There is no cosine schedule: its
    # last alpha is 5e-5, so x0 = (x_t - sigma noise) / alpha multiplies the error of a predicted noise by 20,000, and
    # the clipping of x0 that rescues it for pixels has no counterpart for a latent, whose range is open.
    steps = 1000
    betas = {"linear": (1e-4, 0.02, 1), "scaled_linear": (0.00085, 0.012, 2)}  # first, last, power
    predicts = "noise"

    def __init__(self, schedule: Literal["linear", "scaled_linear"] = "linear"):
        _one_of("schedule", schedule, tuple(self.betas))
        first, last, power = self.betas[schedule]
        roots = torch.linspace(first ** (1 / power), last ** (1 / power), self.steps, dtype=torch.float64)
        # Entry i is alpha-bar at t = i / 1000; the entry in front, 1, is the clean latent.
        self.alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - roots**power).cumprod(0)])

    def loss(self, predict: Predict, x0: Latent, generator: Draws = None) -> tuple[Float[Tensor, " b"], Times]:
        """Mean squared error of the noise predict(x_t, t), in float32, for each sample; and the times drawn."""
        x0 = x0.float()
        t = self.sample_t(len(x0), x0.shape[-2:], generator, x0.device)
        noise = draw(torch.randn, x0.shape, generator, x0.device)
        return _squared_error(predict(self.x_t(x0, noise, t), t), noise), t

    def sample_t(
        self, b: int, latent_hw: Sequence[int], generator: Draws = None, device: torch.device | str = "cpu"
    ) -> Times:
        """Times for a batch of b latents: each of the 1000 steps is as likely, whatever the size."""
        step = (draw(torch.rand, (b,), generator, device) * self.steps).floor().clamp(max=self.steps - 1)
        return (step + 1) / self.steps

    def times(self, steps: int, latent_hw: Sequence[int]) -> Float[Tensor, " times"]:
        """Times of a sampler (steps + 1), decreasing from 1 to 0, evenly spaced ("trailing" in Lin et al. 2024).

        Raises:
            ValueError: steps is below 1 or above 1000.
        """
        if not 1 <= steps <= self.steps:
            raise ValueError(f"steps is {steps}: a sampler for DDPM takes 1 to {self.steps} steps")
        return torch.linspace(self.steps, 0, steps + 1, dtype=torch.float64).round().float() / self.steps

    def alpha_sigma(self, t: Float[Tensor, "*any"]) -> tuple[Float[Tensor, "*any"], Float[Tensor, "*any"]]:
        """The factors of data and of noise at time t: the roots of alpha-bar and of 1 - alpha-bar."""
        alpha_bar = self.alpha_bar.to(t.device)[(t * self.steps).round().long()]
        return alpha_bar.sqrt().to(t.dtype), (1 - alpha_bar).sqrt().to(t.dtype)

    def x_t(self, x0: Latent, noise: Latent, t: Times) -> Latent:
        """The noisy latent alpha(t) x0 + sigma(t) noise."""
        return _mix(x0, noise, *self.alpha_sigma(t))

    def to_velocity(self, prediction: Latent, x_t: Latent, t: Times) -> Latent:
        """The velocity noise - x0 in a prediction of this objective."""
        return noise_to_velocity(prediction, x_t, *self.alpha_sigma(t))

    def to_noise(self, prediction: Latent, x_t: Latent, t: Times) -> Latent:
        """The noise in a prediction of this objective: the prediction itself."""
        return prediction

    def to_x0(self, prediction: Latent, x_t: Latent, t: Times) -> Latent:
        """The clean latent in a prediction of this objective: the noise minus the velocity."""
        return prediction - self.to_velocity(prediction, x_t, t)


def velocity_to_noise(velocity: Latent, x_t: Latent, alpha: Float[Tensor, " b"], sigma: Float[Tensor, " b"]) -> Latent:
    """The noise of x_t = alpha x0 + sigma noise from v = noise - x0: (x_t + alpha v) / (alpha + sigma)."""
    alpha, sigma = _per_image(alpha), _per_image(sigma)
    return (x_t + alpha * velocity) / (alpha + sigma)


def noise_to_velocity(noise: Latent, x_t: Latent, alpha: Float[Tensor, " b"], sigma: Float[Tensor, " b"]) -> Latent:
    """The inverse of `velocity_to_noise`: ((alpha + sigma) noise - x_t) / alpha, which needs alpha > 0."""
    alpha, sigma = _per_image(alpha), _per_image(sigma)
    return ((alpha + sigma) * noise - x_t) / alpha


def _mix(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return _per_image(alpha) * x0 + _per_image(sigma) * noise


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]  # (b) against (b c h w)


def _squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    assert prediction.shape == target.shape, f"the model gave {tuple(prediction.shape)} for {tuple(target.shape)}"
    return (prediction.float() - target).square().flatten(1).mean(1)


def _one_of(setting: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{setting} is {value!r}: use one of {', '.join(known)}")


def _positive(setting: str, value: float | int) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{setting} is {value}: it must be a finite number above 0")
