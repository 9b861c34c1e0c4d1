"""Throughput on a clock that only the test moves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lidit.callbacks import throughput
from lidit.callbacks.samples import Samples
from lidit.callbacks.throughput import Throughput, mean_sizes
from lidit.models.contracts import Text
from lidit.models.lidit import LIDiT
from lidit.plan.operations import DryRun, FeatureSizes, Operations, Sizes, counted

STEP, WAIT = 2.0, 0.5  # seconds of a batch, and before it
METER = {
    "class_path": "lidit.callbacks.throughput.Throughput",
    "init_args": {"every_n_steps": 4, "warmup_batches": 2},
}


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Work(Callback):
    """Lets time pass: for every batch, and a lot for compiling the first, for validation and for checkpoints."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_before_zero_grad(self, trainer: object, *_: object) -> None:
        self.clock.now += STEP if trainer.fit_loop.epoch_loop.batch_idx else 1000

    def on_validation_end(self, *_: object) -> None:
        self.clock.now += 500

    def on_save_checkpoint(self, *_: object) -> None:
        self.clock.now += 300


class SlowSamples(Samples):
    """Samples that take long."""

    clock: Clock

    def scores(self, images: list) -> dict[str, float]:
        self.clock.now += 700
        return super().scores(images)


class SlowLoader(DataLoader):
    """Batches that are waited for."""

    clock: Clock

    def __iter__(self) -> object:
        for batch in super().__iter__():
            self.clock.now += WAIT
            yield batch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = SlowSamples.clock = SlowLoader.clock = Clock()
    monkeypatch.setattr(throughput, "perf_counter", clock)
    return clock


def slow(batches: DataLoader) -> SlowLoader:
    return SlowLoader(batches.dataset, batch_size=None, collate_fn=batches.collate_fn)


def test_the_log_tells_time_images_waiting_and_operations(
    built: Callable, loader: Callable, logged: Callable, clock: Clock
) -> None:
    cli = built(METER, max_steps=8)
    cli.trainer.callbacks.append(Work(clock))
    batches = loader(8)
    cli.trainer.fit(cli.model, slow(batches))
    batch = batches.dataset[0]
    features = cli.model.encode_prompts(batch.prompt)
    _, forward = counted(lambda: cli.model.predict(batch.latent, torch.rand(2), features))
    expected = {
        "seconds_per_step": STEP + WAIT,
        "images_per_second": 2 / (STEP + WAIT),
        "data_wait": WAIT / (STEP + WAIT),
        "tflops_per_rank": 3 * forward / (STEP + WAIT) / 1e12,
    }
    for name, value in expected.items():
        assert logged(f"throughput/{name}") == pytest.approx({4: value, 8: value})


class Scale(torch.nn.Module):
    """A backbone of somebody else's: 64 multiplications a picture, as a matrix product."""

    width, patch = 32, 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, 1))
        self.blocks = torch.nn.ModuleList()

    def forward(self, x: torch.Tensor, t: torch.Tensor, text: Text) -> torch.Tensor:
        return x + (x[:, 0].flatten()[:, None] @ self.weight).mean() + text.pooled.mean()


def test_a_backbone_that_lidit_does_not_know_is_counted(
    built: Callable, loader: Callable, logged: Callable, clock: Clock
) -> None:
    cli, known = built(METER, max_steps=4), built(METER, max_steps=4)
    batches = loader(4)
    cli.trainer.callbacks.append(Work(clock))
    cli.model.make_backbone = lambda channels: Scale()
    cli.trainer.fit(cli.model, slow(batches))
    known.model.configure_model()
    features = known.model.encode_prompts(batches.dataset[0].prompt)
    _, encoder = counted(lambda: known.model.prompt_encoder(features, torch.rand(2)))
    expected = 3 * (encoder + 2 * 2 * 64) / (STEP + WAIT) / 1e12
    assert logged("throughput/tflops_per_rank") == pytest.approx({4: expected})


class Deciding(LIDiT):
    """Works only with values."""

    def forward(self, x: torch.Tensor, *rest: object) -> torch.Tensor:
        return x if x.isnan().any() else super().forward(x, *rest)


def test_what_cannot_be_counted_is_said_once_and_the_rest_is_logged(
    built: Callable, loader: Callable, logged: Callable, clock: Clock
) -> None:
    cli = built(METER, max_steps=8)
    cli.trainer.callbacks.append(Work(clock))
    cli.model.make_backbone = lambda channels: Deciding(channels, depth=1, width=32, heads=4)
    with pytest.warns(UserWarning, match="tflops_per_rank is not logged: .*Deciding cannot be run") as said:
        cli.trainer.fit(cli.model, slow(loader(8)))
    assert sum("tflops_per_rank" in str(each.message) for each in said) == 1
    assert logged("throughput/tflops_per_rank") == {}
    assert logged("throughput/seconds_per_step") == pytest.approx({4: STEP + WAIT, 8: STEP + WAIT})


def test_counting_is_not_timed_and_leaves_chance_alone(
    built: Callable, loader: Callable, logged: Callable, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = []

    class Slow(DryRun):
        def operations(self, sizes: Sizes) -> Operations:
            clock.now += 900
            before = torch.get_rng_state()
            found = super().operations(sizes)
            states.append(torch.equal(before, torch.get_rng_state()))
            return found

    monkeypatch.setattr(throughput, "DryRun", Slow)
    cli = built(METER, max_steps=8)
    cli.trainer.callbacks.append(Work(clock))
    cli.trainer.fit(cli.model, slow(loader(8)))
    assert states == [True, True]
    assert logged("throughput/seconds_per_step") == pytest.approx({4: STEP + WAIT, 8: STEP + WAIT})


def test_captions_of_many_lengths_are_counted_at_their_mean_for_each_size_of_latent() -> None:
    def tokens(length: int) -> list:
        return [(40 + length, torch.tensor(length), 32), (42 + length, torch.tensor(length), 48)]

    small, large = (2, 4, 8, 8), (2, 4, 8, 12)
    found = list(mean_sizes([(small, tokens(10)), (large, tokens(5)), (small, tokens(13)), (small, tokens(14))]))
    assert found == [
        (Sizes(small, (FeatureSizes(52, 12, 32), FeatureSizes(54, 12, 48))), 3),
        (Sizes(large, (FeatureSizes(45, 5, 32), FeatureSizes(47, 5, 48))), 1),
    ]


@pytest.mark.parametrize("first", ["meter", "samples"])
def test_validation_checkpoints_and_samples_do_not_count(
    built: Callable, loader: Callable, logged: Callable, clock: Clock, first: str
) -> None:
    save = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"every_n_train_steps": 3, "save_top_k": -1},
    }
    cli = built(METER, save, max_steps=12, val_check_interval=5, enable_checkpointing=True)
    slow_samples = SlowSamples(["a red circle"], every_n_steps=4, size="16x16", steps=1)
    cli.trainer.callbacks.insert(0 if first == "samples" else 1, slow_samples)
    cli.trainer.callbacks.append(Work(clock))
    cli.trainer.fit(cli.model, slow(loader(12)), loader(1))
    assert clock.now > 5000
    assert logged("throughput/seconds_per_step") == pytest.approx(dict.fromkeys((4, 8, 12), STEP + WAIT))


def test_a_step_of_accumulated_gradients_is_all_its_batches(
    built: Callable, loader: Callable, logged: Callable, clock: Clock
) -> None:
    cli = built(METER, max_steps=4, accumulate_grad_batches=3)
    cli.trainer.callbacks.append(PerBatch(clock))
    cli.trainer.fit(cli.model, slow(loader(12)))
    assert logged("throughput/seconds_per_step") == pytest.approx({4: 3 * (STEP + WAIT)})
    assert logged("throughput/images_per_second") == pytest.approx({4: 2 / (STEP + WAIT)})


class PerBatch(Callback):
    """Lets time pass for every batch."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_after_backward(self, *_: object) -> None:
        self.clock.now += STEP


@pytest.mark.parametrize("channels", [4, 3])
def test_nothing_stays_on_the_model(built: Callable, loader: Callable, channels: int) -> None:
    cli, batches = built(METER, max_steps=1), loader(1)
    batches.dataset[0].latent = torch.zeros(2, channels, 8, 8)
    with nullcontext() if channels == 4 else pytest.raises(RuntimeError, match="channels"):
        cli.trainer.fit(cli.model, batches)
    assert not cli.model.backbone._forward_pre_hooks
    assert not cli.model.prompt_encoder._forward_pre_hooks


@pytest.mark.parametrize("wrong", [{"every_n_steps": 0}, {"warmup_batches": 0}])
def test_numbers_below_one_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Throughput(**wrong)
