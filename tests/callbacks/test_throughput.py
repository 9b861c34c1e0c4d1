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
from lidit.callbacks.throughput import Throughput
from lidit.models.flops import backbone_flops, prompt_encoder_flops

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
    features = cli.model.encode_prompts(batches.dataset[0].prompt)
    tokens = [x.shape[1] for x, _, _ in features]
    kept = [int((mask.sum(1) - start).max()) for _, mask, start in features]  # padded on the right
    forward = backbone_flops(cli.model.backbone, 16, sum(kept)) + prompt_encoder_flops(
        cli.model.prompt_encoder, tokens, kept
    )
    expected = {
        "seconds_per_step": STEP + WAIT,
        "images_per_second": 2 / (STEP + WAIT),
        "data_wait": WAIT / (STEP + WAIT),
        "tflops_per_rank": 3 * 2 * forward / (STEP + WAIT) / 1e12,
    }
    for name, value in expected.items():
        assert logged(f"throughput/{name}") == pytest.approx({4: value, 8: value})


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
