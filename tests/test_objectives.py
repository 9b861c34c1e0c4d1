"""The objectives: perfect prediction, round trips, distribution of t, the shift, and the schedule against diffusers."""

from __future__ import annotations

import itertools
import math

import jaxtyping
import pytest
import torch
from diffusers import DDPMScheduler

from lidit.draws import SampleDraws, draw
from lidit.objectives import DDPM, RectifiedFlow, noise_to_velocity, velocity_to_noise

OBJECTIVES = [RectifiedFlow(), DDPM("linear"), DDPM("scaled_linear")]
BASE = (32, 32)  # latent height and width that RectifiedFlow() does not shift


@pytest.fixture
def without_type_checks():
    """Under pytest --jaxtyping-packages a wrong literal would end in the checker's error, before ours."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(b: int = 6, size: tuple[int, int] = (8, 12), dtype: torch.dtype = torch.float32, seed: int = 0):
    return torch.randn(b, 16, *size, generator=generator(seed), dtype=dtype)


def path_in_float64(objective):
    x0, noise = latents(dtype=torch.float64, seed=1), latents(dtype=torch.float64, seed=2)
    t = torch.tensor([0.001, 0.1, 0.4, 0.5, 0.9, 0.999], dtype=torch.float64)
    return x0, noise, t, objective.x_t(x0, noise, t)


def test_perfect_velocity_has_zero_loss_under_rectified_flow():
    x0 = latents()
    loss, t = RectifiedFlow().loss(lambda x_t, t: (x_t - x0) / t[:, None, None, None], x0, generator())
    assert loss.shape == t.shape == (6,)
    assert loss.max() < 1e-9


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_perfect_noise_has_zero_loss_under_ddpm(schedule):
    x0, objective = latents(), DDPM(schedule)

    def perfect(x_t, t):
        alpha, sigma = (v[:, None, None, None] for v in objective.alpha_sigma(t))
        return (x_t - alpha * x0) / sigma

    loss, _ = objective.loss(perfect, x0, generator())
    assert loss.max() < 1e-9


def test_the_loss_of_predicting_zero_is_the_mean_square_of_the_target():
    x0 = latents(b=64)
    flow, _ = RectifiedFlow().loss(lambda x_t, t: torch.zeros_like(x_t), x0, generator())
    ddpm, _ = DDPM().loss(lambda x_t, t: torch.zeros_like(x_t), x0, generator(1))
    assert flow.mean().item() == pytest.approx(2, rel=0.02)  # noise - x0, both of variance 1
    assert ddpm.mean().item() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_float32_whatever_the_latents_and_the_predictions_are(objective, dtype):
    seen = []

    def predict(x_t, t):
        seen.append((x_t.dtype, t.dtype))
        return x_t.to(dtype)

    loss, t = objective.loss(predict, latents().to(dtype), generator())
    assert seen == [(torch.float32, torch.float32)]
    assert loss.dtype == t.dtype == torch.float32


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_prediction_of_another_shape_is_refused_instead_of_broadcast(objective):
    with pytest.raises(AssertionError, match="the model gave"):
        objective.loss(lambda x_t, t: x_t[:, :1], latents(), generator())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_velocity_and_noise_convert_back_and_forth_in_float64(objective):
    x0, noise, t, x_t = path_in_float64(objective)
    alpha, sigma = objective.alpha_sigma(t)
    velocity = noise_to_velocity(noise, x_t, alpha, sigma)
    torch.testing.assert_close(velocity, noise - x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(velocity_to_noise(velocity, x_t, alpha, sigma), noise, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_perfect_prediction_gives_back_noise_velocity_and_clean_latent(objective):
    x0, noise, t, x_t = path_in_float64(objective)
    prediction = noise - x0 if objective.predicts == "velocity" else noise
    torch.testing.assert_close(objective.to_velocity(prediction, x_t, t), noise - x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(objective.to_noise(prediction, x_t, t), noise, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(objective.to_x0(prediction, x_t, t), x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_time_zero_is_data_and_time_one_is_almost_noise(objective):
    x0, noise = latents(seed=1), latents(seed=2)
    assert torch.equal(objective.x_t(x0, noise, torch.zeros(6)), x0)
    alpha, sigma = objective.alpha_sigma(torch.ones(1))
    assert alpha.item() < 0.07
    assert sigma.item() > 0.997


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.6)])
def test_the_logit_of_t_has_the_mean_and_deviation_of_the_settings(mean, std):
    t = RectifiedFlow(t_mean=mean, t_std=std).sample_t(40_000, BASE, generator())
    assert t.min() > 0
    assert t.max() < 1
    assert t.logit().mean().item() == pytest.approx(mean, abs=0.02)
    assert t.logit().std().item() == pytest.approx(std, rel=0.02)


def test_uniform_t_has_the_moments_of_a_uniform_variable():
    t = RectifiedFlow("uniform").sample_t(40_000, BASE, generator())
    assert t.mean().item() == pytest.approx(0.5, abs=0.01)
    assert t.var().item() == pytest.approx(1 / 12, rel=0.02)


def test_ddpm_draws_every_one_of_its_thousand_steps_and_nothing_else():
    steps = DDPM().sample_t(40_000, BASE, generator()) * 1000
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert steps.round().unique().tolist() == list(range(1, 1001))


@pytest.mark.parametrize("objective", [*OBJECTIVES, RectifiedFlow("uniform")])
def test_the_same_generator_gives_the_same_times_and_the_same_loss(objective):
    first, second, other = (objective.loss(lambda x, t: x, latents(), generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[1], other[1])


def test_a_generator_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    RectifiedFlow().loss(lambda x, t: x, latents(), generator())
    assert torch.equal(before, torch.get_rng_state())


def test_the_base_resolution_and_smaller_ones_are_not_shifted():
    flow = RectifiedFlow()
    plain = torch.linspace(1, 0, 11)
    for size in (BASE, (8, 8), (16, 64)):
        assert torch.equal(flow.times(10, size), plain)


def test_the_shift_is_the_root_of_the_ratio_of_positions():
    flow = RectifiedFlow()
    assert flow.shift_for((128, 128)) == pytest.approx(4)  # 1024 px against 256 px, as in SD3
    assert flow.shift_for((32, 128)) == pytest.approx(2)
    assert RectifiedFlow(base_size=8).shift_for((8, 12)) == pytest.approx(math.sqrt(1.5))
    assert flow.times(2, (128, 128)).tolist() == pytest.approx([1, 0.8, 0])


def test_a_number_shifts_every_size_alike():
    flow = RectifiedFlow(shift=3.0)
    assert torch.equal(flow.times(7, (8, 8)), flow.times(7, (128, 128)))
    assert flow.times(2, (8, 8)).tolist() == pytest.approx([1, 0.75, 0])


def test_a_larger_latent_is_trained_and_sampled_at_noisier_times():
    flow = RectifiedFlow()
    drawn = [flow.sample_t(500, (size, size), generator()) for size in (32, 64, 128)]
    times = [flow.times(10, (size, size))[1:-1] for size in (32, 64, 128)]
    for smaller, larger in [*zip(drawn, drawn[1:], strict=False), *zip(times, times[1:], strict=False)]:
        assert (larger > smaller).all()


def test_training_and_sampling_are_shifted_by_the_same_function():
    flow = RectifiedFlow("uniform")
    plain = flow.sample_t(1000, BASE, generator())
    shifted = flow.sample_t(1000, (64, 64), generator())
    torch.testing.assert_close(shifted, 2 * plain / (1 + plain))
    grid = flow.times(10, BASE)
    torch.testing.assert_close(flow.times(10, (64, 64)), 2 * grid / (1 + grid))


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 999, 1000])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_times_decrease_from_one_to_zero(objective, steps):
    times = objective.times(steps, (64, 48))
    assert times.shape == (steps + 1,)
    assert times[0] == 1
    assert times[-1] == 0
    assert (times.diff() < 0).all()


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_the_ddpm_path_is_that_of_diffusers(schedule):
    first, last, _ = DDPM.betas[schedule]
    theirs = DDPMScheduler(1000, beta_schedule=schedule, beta_start=first, beta_end=last)
    x0, noise, objective = latents(b=1000, size=(2, 2), seed=1), latents(b=1000, size=(2, 2), seed=2), DDPM(schedule)
    step = torch.arange(1000)
    torch.testing.assert_close(objective.alpha_bar[1:].float(), theirs.alphas_cumprod, rtol=2e-5, atol=0)
    ours = objective.x_t(x0, noise, (step + 1) / 1000)
    torch.testing.assert_close(ours, theirs.add_noise(x0, noise, step), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"t_distribution": "normal"}, "logit_normal, uniform"),
        ({"shift": "size"}, "resolution"),
        ({"shift": 0.0}, "above 0"),
        ({"t_std": -1.0}, "above 0"),
        ({"base_size": 0}, "above 0"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_a_wrong_setting_of_rectified_flow_is_refused_with_what_is_allowed(settings, message):
    with pytest.raises(ValueError, match=message):
        RectifiedFlow(**settings)


@pytest.mark.usefixtures("without_type_checks")
def test_an_unknown_schedule_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="linear, scaled_linear"):
        DDPM("sigmoid")


@pytest.mark.parametrize(("objective", "steps"), [(RectifiedFlow(), 0), (DDPM(), 0), (DDPM(), 1001)])
def test_a_number_of_steps_that_cannot_be_is_refused(objective, steps):
    with pytest.raises(ValueError, match=f"steps is {steps}"):
        objective.times(steps, BASE)


@pytest.mark.parametrize("parts", [2, 4])  # ranks, or passes of an accumulated gradient
@pytest.mark.parametrize("objective", [RectifiedFlow(), DDPM()], ids=["flow", "ddpm"])
def test_parts_of_a_batch_draw_what_the_whole_draws(objective, parts: int) -> None:
    x0, size, seen = torch.zeros(8, 2, 8, 8), 8 // parts, []

    def predict(x_t, t):
        seen.append(x_t)
        return torch.zeros_like(x_t)

    loss, t = objective.loss(predict, x0, SampleDraws([7], first=16))
    each = [objective.loss(predict, x0[:size], SampleDraws([7], first=16 + size * i)) for i in range(parts)]
    assert torch.equal(torch.cat([loss for loss, _ in each]), loss)
    assert torch.equal(torch.cat([t for _, t in each]), t)
    assert torch.equal(torch.cat(seen[1:]), seen[0])


def test_a_rank_holds_the_noise_of_its_own_samples_alone() -> None:
    noise = draw(torch.randn, (4, 2, 8, 8), SampleDraws([7], first=12), "cpu")
    assert noise.untyped_storage().nbytes() == 4 * 2 * 8 * 8 * 4


def test_another_sample_seed_or_draw_is_another_draw() -> None:
    def times(draws: SampleDraws) -> torch.Tensor:
        return RectifiedFlow().sample_t(4, (8, 8), draws)

    twice = SampleDraws([0])
    drawn = [*times(twice), *times(twice), *times(SampleDraws([1])), *times(SampleDraws([0], first=4))]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


def test_the_samples_of_a_run_draw_independent_normal_numbers() -> None:
    noise = draw(torch.randn, (2000, 16), SampleDraws([0]), "cpu").double()
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert (noise[1:] * noise[:-1]).mean().item() == pytest.approx(0, abs=0.02)  # of neighbours
    first = draw(torch.randn, (2000,), SampleDraws([0]), "cpu").double()
    assert first.std().item() == pytest.approx(1, abs=0.06)
    assert (first[1:] * first[:-1]).mean().item() == pytest.approx(0, abs=0.08)
