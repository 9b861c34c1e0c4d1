"""Logs how fast training runs: images and operations per second, and the share of time spent waiting for data."""

from __future__ import annotations

from time import perf_counter

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lidit.lightning_private import share
from lidit.models.adapter import AdaptedUNet
from lidit.models.contracts import Features, Text
from lidit.models.flops import backbone_flops, prompt_encoder_flops
from lidit.models.lidit import LIDiT
from lidit.models.llmdiff import LLMDiffEncoder
from lidit.models.prompt_encoder import PromptEncoder
from lidit.models.unet import UNet
from lidit.module import TextToImage

FORWARD_AND_BACKWARD = 3  # operations of both passes over those of the forward pass


class Throughput(Callback):
    """Log the speed every n steps, averaged over the steps since the last log.

    - `throughput/images_per_second`: over all ranks;
    - `throughput/seconds_per_step`: time of an optimizer step, including the wait for data;
    - `throughput/tflops_per_rank`: 10^12 operations a second of prompt encoder and backbone, forward and backward,
      counted from sizes (`models/flops.py`), without the frozen LLMs, the VAE and recomputed activations. Only for
      PromptEncoder with LIDiT;
    - `throughput/data_wait`: share of the time between two batches, 0 to 1, nearly all spent waiting for the next one.

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
        self._images = self._flops = 0  # of the batch that is being trained on
        self._logged = 0  # global step
        self._counted = True  # whether operations are counted
        self._clear()

    def _clear(self) -> None:
        """Begin a new average."""
        self.batches = self.images = self.flops = 0
        self.seconds = self.waited = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: TextToImage) -> None:
        """Watch the sizes of the model's inputs."""
        self._left_out, self._logged = self.warmup_batches, trainer.global_step
        model = (pl_module.prompt_encoder, pl_module.backbone)
        self._counted = isinstance(model[0], PromptEncoder) and isinstance(model[1], LIDiT)
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
        self._images = self._flops = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: TextToImage, *args: object) -> None:
        """Count the time since the last batch ended, unless it is to be left out."""
        now = perf_counter()
        if self._left_out:
            self._left_out -= 1
        else:
            self.batches += 1
            self.images += self._images
            self.flops += self._flops
            self.seconds += now - self._ended
            self.waited += self._started - self._ended
        self._ended = now
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step != self._logged and self.batches:
            self._logged = step
            self._log(trainer, step)
            self._clear()

    def _log(self, trainer: Trainer, step: int) -> None:
        _, replicas = share(trainer)
        metrics = {
            "throughput/images_per_second": self.images * replicas / self.seconds,
            "throughput/seconds_per_step": self.seconds / self.batches * trainer.accumulate_grad_batches,
            "throughput/data_wait": self.waited / self.seconds,
        }
        if self._counted:
            metrics["throughput/tflops_per_rank"] = self.flops / self.seconds / 1e12
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step)

    def _see_text(self, encoder: PromptEncoder | LLMDiffEncoder, inputs: tuple[list[Features], Tensor]) -> None:
        """Count the prompt encoder's operations."""
        if not self._counted:
            return
        tokens, kept = [], []
        for x, mask, prompt_start in inputs[0]:
            position = torch.arange(mask.shape[1], device=mask.device)
            tokens.append(x.shape[1])
            kept.append(int((mask & (position >= prompt_start[:, None])).sum(1).max()))
        self._flops += FORWARD_AND_BACKWARD * len(inputs[1]) * prompt_encoder_flops(encoder, tokens, kept)

    def _see_image(self, backbone: LIDiT | AdaptedUNet | UNet, inputs: tuple[Tensor, Tensor, Text]) -> None:
        """Count images and the backbone's operations; in evaluation mode, leave out the current batch."""
        if not backbone.training:
            self._left_out = max(1, self._left_out)
        x, _, text = inputs
        image_tokens = x.shape[-2] * x.shape[-1] // backbone.patch**2
        self._images += len(x)
        if not self._counted:
            return
        self._flops += FORWARD_AND_BACKWARD * len(x) * backbone_flops(backbone, image_tokens, text.tokens.shape[1])

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
