"""Logs how fast training runs: images and operations per second, and the share of time spent waiting for data."""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lidit.lightning_private import share
from lidit.models.contracts import Features, is_caption
from lidit.module import TextToImage
from lidit.plan.operations import FORWARD_AND_BACKWARD, DryRun, FeatureSizes, Sizes

Latent = tuple[int, int, int, int]
Tokens = list[tuple[int, Tensor, int]]  # of each LLM: all of a batch's, the longest caption's, and their channels


class Throughput(Callback):
    """Log the speed every n steps, averaged over the steps since the last log.

    - `throughput/images_per_second`: over all ranks;
    - `throughput/seconds_per_step`: time of an optimizer step, including the wait for data;
    - `throughput/tflops_per_rank`: 10^12 operations a second of prompt encoder and backbone, forward and backward,
      counted by `plan/operations.py` for each size of latent, with captions of the mean length; frozen LLMs and VAE
      and recomputed activations do not count. Where a part cannot be counted, a warning says so once;
    - `throughput/data_wait`: share of time between two batches, 0 to 1: nearly all of it is waiting for the next one.

    Left out are the first steps, and every step during which the model was used in evaluation mode (validation,
    samples) or a checkpoint was written.

    Args:
        every_n_steps: optimizer steps between two lines in the log.
        warmup_batches: number of batches after the start of a run that do not count.

    Raises:
        ValueError: a number is too small.
    """

    def __init__(self, every_n_steps: int = 50, warmup_batches: int = 5):
        if every_n_steps < 1 or warmup_batches < 1:
            raise ValueError(f"Throughput needs numbers of at least 1, not {every_n_steps} and {warmup_batches}")
        self.every_n_steps, self.warmup_batches = every_n_steps, warmup_batches
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._ended = self._started = 0.0
        self._left_out = 0  # number of the next batches that do not count
        self._tokens: Tokens = []  # that the prompt encoder read last
        self._passes: list[tuple[Latent, Tokens]] = []  # of the batch being trained on
        self._logged = 0  # global step
        self._dry_run: DryRun | None = None
        self._countable = True
        self._clear()

    def _clear(self) -> None:
        """Begin a new average."""
        self.batches = 0
        self.passes: list[tuple[Latent, Tokens]] = []
        self.seconds = self.waited = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: TextToImage) -> None:
        """Watch the sizes of the model's inputs."""
        self._left_out, self._logged = self.warmup_batches, trainer.global_step
        self._hooks = [
            pl_module.prompt_encoder.register_forward_pre_hook(self._see_text),
            pl_module.backbone.register_forward_pre_hook(self._see_image),
        ]

    def on_train_end(self, trainer: Trainer, pl_module: TextToImage) -> None:
        self._unhook()

    def on_exception(self, trainer: Trainer, pl_module: TextToImage, exception: BaseException) -> None:
        self._unhook()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: TextToImage, checkpoint: dict) -> None:
        """Leave out the time in which a checkpoint is written."""
        self._left_out = max(1, self._left_out)

    def on_train_batch_start(self, trainer: Trainer, pl_module: TextToImage, *args: object) -> None:
        self._started = perf_counter()
        self._passes = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: TextToImage, *args: object) -> None:
        """Count the time since the last batch ended, unless it is to be left out."""
        now = perf_counter()
        if self._left_out:
            self._left_out -= 1
        else:
            self.batches += 1
            self.passes += self._passes
            self.seconds += now - self._ended
            self.waited += self._started - self._ended
        self._ended = now
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step != self._logged and self.batches:
            self._logged = step
            self._log(trainer, pl_module, step)
            self._clear()

    def _log(self, trainer: Trainer, pl_module: TextToImage, step: int) -> None:
        _, replicas = share(trainer)
        images = sum(latent[0] for latent, _ in self.passes)
        metrics = {
            "throughput/images_per_second": images * replicas / self.seconds,
            "throughput/seconds_per_step": self.seconds / self.batches * trainer.accumulate_grad_batches,
            "throughput/data_wait": self.waited / self.seconds,
        }
        if trainer.is_global_zero and self._countable:
            metrics |= self._rate(pl_module)
            self._ended = perf_counter()  # counting is no training
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)

    def _rate(self, pl_module: TextToImage) -> dict[str, float]:
        """Operations a second; nothing where they cannot be counted."""
        try:
            if self._dry_run is None:
                self._dry_run = DryRun(pl_module.build)
            forward = sum(sum(self._dry_run.operations(sizes)) * n for sizes, n in mean_sizes(self.passes))
        except ValueError as error:
            self._countable = False
            rank_zero_warn(f"throughput/tflops_per_rank is not logged: {error}")
            return {}
        return {"throughput/tflops_per_rank": FORWARD_AND_BACKWARD * forward / self.seconds / 1e12}

    def _see_text(self, encoder: nn.Module, inputs: tuple[list[Features], Tensor]) -> None:
        """Remember the lengths of features and captions."""
        self._tokens = [(x.shape[1], is_caption(mask, start).sum(1).max(), x.shape[2]) for x, mask, start in inputs[0]]

    def _see_image(self, backbone: nn.Module, inputs: tuple) -> None:
        """Remember the size of the latent; in evaluation mode, leave out the current batch."""
        if not backbone.training:
            self._left_out = max(1, self._left_out)
        self._passes.append((tuple(inputs[0].shape), self._tokens))

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def mean_sizes(passes: list[tuple[Latent, Tokens]]) -> Iterator[tuple[Sizes, int]]:
    """For each size of latent, the mean lengths of its features and captions, and how many passes it had.

    Operations are nearly linear in the length: rounding it moves them by one per cent at most where captions have 24
    tokens. To count every length would take a second each.
    """
    for latent in dict.fromkeys(latent for latent, _ in passes):
        each = [tokens for of, tokens in passes if of == latent]
        features = [
            FeatureSizes(round(sum(all_) / len(each)), round(float(sum(captions)) / len(each)), widths[0])
            for all_, captions, widths in (zip(*llm, strict=True) for llm in zip(*each, strict=True))
        ]
        yield Sizes(latent, tuple(features)), len(each)
