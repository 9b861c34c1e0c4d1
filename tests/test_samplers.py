"""The samplers: exact where they must be, their order measured, DDIM against diffusers, and guidance."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler

from lidit.objectives import DDPM, RectifiedFlow
from lidit.samplers import ASKS_FOR, SAMPLERS, ddim, euler, guided, heun, sampler_for


class Counted:
    """A predict that remembers the batch size and the time of every call."""

    def __init__(self, predict):
        self.predict, self.calls = predict, []

    def __call__(self, x, t):
        assert t.shape == (len(x),)
        assert (t == t[0]).all()
        self.calls.append((len(x), t[0].item()))
        return self.predict(x, t)


def noise(b: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(b, 4, 6, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slope_of_the_error(sampler, field, solution) -> float:
    """Order of convergence: the slope of log error against log step, on an ODE whose answer is known."""
    x, errors = noise(dtype=torch.float64), []
    for steps in (128, 256):
        found = sampler(field, x, torch.linspace(1, 0, steps + 1, dtype=torch.float64))
        errors.append((found - solution(x)).abs().max().item())
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("sampler", [euler, heun])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_a_constant_field_is_followed_exactly(sampler, steps):
    x, x0 = noise(dtype=torch.float64), noise(seed=1, dtype=torch.float64)
    times = RectifiedFlow(shift=3.0).times(steps, (6, 5)).double()
    torch.testing.assert_close(sampler(lambda x_t, t: x - x0, x, times), x0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_the_order_on_a_linear_ode(sampler, order):
    slope = slope_of_the_error(sampler, lambda x, t: -1.5 * x, lambda x: math.exp(1.5) * x)
    assert slope == pytest.approx(order, abs=0.06)


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_the_order_on_a_linear_ode_that_depends_on_time(sampler, order):
    slope = slope_of_the_error(sampler, lambda x, t: -3 * t.view(-1, 1, 1, 1) ** 2 * x, lambda x: math.e * x)
    assert slope == pytest.approx(order, abs=0.06)


def test_euler_evaluates_once_a_step_and_heun_twice_but_for_the_last():
    times = torch.linspace(1, 0, 6)
    asked = {}
    for sampler in (euler, heun):
        field = Counted(lambda x, t: x)
        sampler(field, noise(), times)
        asked[sampler] = [t for _, t in field.calls]
    assert asked[euler] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert asked[heun] == pytest.approx([1, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2])


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_ddim_takes_the_steps_of_diffusers_on_a_fixed_predictor(schedule):
    first, last, _ = DDPM.betas[schedule]
    theirs = DDIMScheduler(
        1000, beta_schedule=schedule, beta_start=first, beta_end=last, clip_sample=False, timestep_spacing="trailing"
    )
    theirs.set_timesteps(20)
    weight = noise(b=1, seed=5)

    def predict(x, t):
        return torch.tanh(weight * x + t.view(-1, 1, 1, 1))

    expected = noise()
    for step in theirs.timesteps:
        prediction = predict(expected, (step + 1).expand(3) / 1000)
        expected = theirs.step(prediction, step, expected).prev_sample
    objective = DDPM(schedule)
    found = ddim(predict, noise(), objective.times(20, (6, 5)), objective.alpha_sigma)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 4, 30])
def test_ddim_finds_the_data_from_the_exact_noise(steps):
    objective, x0 = DDPM(), noise(seed=1, dtype=torch.float64)

    def exact(x_t, t):
        alpha, sigma = (v.view(-1, 1, 1, 1) for v in objective.alpha_sigma(t))
        return (x_t - alpha * x0) / sigma

    found = ddim(exact, noise(dtype=torch.float64), objective.times(steps, (6, 5)).double(), objective.alpha_sigma)
    torch.testing.assert_close(found, x0, rtol=1e-9, atol=1e-9)


def test_ddim_on_the_straight_path_is_euler():
    flow, x = RectifiedFlow(), noise(dtype=torch.float64)
    times = flow.times(8, (6, 5)).double()[1:]  # at t = 1 the straight path has no data left to divide by

    def velocity(x_t, t):
        return torch.sin(x_t) - t.view(-1, 1, 1, 1)

    found = ddim(lambda x_t, t: flow.to_noise(velocity(x_t, t), x_t, t), x, times, flow.alpha_sigma)
    torch.testing.assert_close(found, euler(velocity, x, times), rtol=1e-9, atol=1e-9)


def test_a_model_in_half_precision_does_not_lower_the_precision_of_the_latent():
    times, ones = torch.linspace(1, 0, 4), torch.ones(3, 4, 6, 5, dtype=torch.bfloat16)
    doubled = torch.cat([ones, ones * 0.75])
    predicts = {1.0: lambda x, t: ones, 1.03: guided(lambda x, t: doubled, lambda x, t: ones, 1.12)}
    for sampler in (euler, heun):
        for velocity, predict in predicts.items():
            torch.testing.assert_close(sampler(predict, noise(), times), noise() - velocity, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_named_sampler_runs_for_the_objective_it_fits_and_leaves_its_input_alone(name):
    objective = next(o for o in (RectifiedFlow(), DDPM()) if o.predicts == ASKS_FOR[name])
    x = noise()
    sampler = sampler_for(name, objective.predicts, objective.alpha_sigma)
    found = sampler(lambda x_t, t: 0.5 * x_t, x, objective.times(5, (6, 5)))
    assert found.shape == x.shape
    assert found.isfinite().all()
    assert torch.equal(x, noise())


def test_an_unknown_sampler_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'dpm'.*euler, heun, ddim"):
        sampler_for("dpm", "velocity", RectifiedFlow().alpha_sigma)


@pytest.mark.parametrize(
    ("name", "predicts", "fitting"), [("ddim", "velocity", "euler, heun"), ("euler", "noise", "ddim")]
)
def test_a_sampler_for_another_prediction_is_refused_with_those_that_fit(name, predicts, fitting):
    with pytest.raises(ValueError, match=f"predicts {predicts}: use one of {fitting}"):
        sampler_for(name, predicts, DDPM().alpha_sigma)


@pytest.mark.parametrize("times", [[1.0], [0.0, 1.0], [1.0, 0.5, 0.5, 0.0]])
@pytest.mark.parametrize("sampler", [euler, heun])
def test_times_that_do_not_decrease_are_refused(sampler, times):
    with pytest.raises(ValueError, match="decrease"):
        sampler(lambda x, t: x, noise(), torch.tensor(times))


def conditional_and_both():
    """Two predicts over the same made-up model: text doubles the latent, no text negates it."""
    conditional = Counted(lambda x, t: 2 * x)
    both = Counted(lambda x, t: torch.cat([2 * x[: len(x) // 2], -x[len(x) // 2 :]]))
    return conditional, both


def test_guidance_of_one_is_the_conditional_prediction_and_runs_nothing_else():
    conditional, both = conditional_and_both()
    found = guided(both, conditional, 1.0)(noise(), torch.full((3,), 0.5))
    assert torch.equal(found, 2 * noise())
    assert both.calls == []
    assert len(conditional.calls) == 1


@pytest.mark.parametrize(("scale", "factor"), [(0.0, -1), (0.5, 0.5), (4.0, 11)])
def test_guidance_extrapolates_from_without_text_to_with_text_in_one_double_batch(scale, factor):
    conditional, both = conditional_and_both()
    found = guided(both, conditional, scale)(noise(), torch.full((3,), 0.5))
    torch.testing.assert_close(found, factor * noise())
    assert [b for b, _ in both.calls] == [6]
    assert conditional.calls == []


def test_guidance_is_off_outside_its_interval_and_on_at_both_ends():
    conditional, both = conditional_and_both()
    times = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.125, 0.0])
    euler(guided(both, conditional, 3.0, interval=(0.25, 0.75)), noise(), times)
    assert both.calls == [(6, 0.75), (6, 0.5), (6, 0.25)]
    assert conditional.calls == [(3, 1.0), (3, 0.125)]


@pytest.mark.parametrize("scale", [-0.1, math.nan, math.inf])
def test_a_scale_that_cannot_be_is_refused(scale):
    with pytest.raises(ValueError, match="guidance scale"):
        guided(*conditional_and_both(), scale)


@pytest.mark.parametrize("interval", [(-0.1, 1.0), (0.5, 0.4), (0.0, 1.1)])
def test_an_interval_that_cannot_be_is_refused(interval):
    with pytest.raises(ValueError, match="guidance interval"):
        guided(*conditional_and_both(), 2.0, interval)
