"""Draws images of fixed prompts from fixed noise during training: the same pictures, getting better."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch.distributed.tensor import DTensor

from lidit.callbacks.ema import EMA
from lidit.disk.folder import picture_name
from lidit.module import TextToImage
from lidit.pictures import grid, parse_size, save_image
from lidit.pipeline import Pipeline
from lidit.samplers import sampler_for


class FixedPrompts(Callback, ABC):
    """Draws the same prompts from the same noise every n steps; a subclass decides what to do with the images.

    The weights are the averaged ones if there is an `EMA`. Training goes on as if nothing had been drawn: its weights,
    modes and random state are as before. The first drawing loads the LLMs and the VAE, even if training reads all from
    a cache.

    Args:
        prompts: prompts to draw.
        every_n_steps: optimizer steps between drawings.
        seed: seed of the first prompt's noise; the next prompt has the next seed.
        size: WIDTHxHEIGHT of an image in pixels; by default that of most training images.
        steps: number of steps of the sampler.
        guidance: classifier-free guidance scale; 1 is no guidance.
        sampler: euler or heun for rectified flow, ddim for noise prediction; by default the first that fits.
        batch_size: number of images drawn at one time.

    Raises:
        ValueError: there are no prompts, a number is below 1, or a size is not WIDTHxHEIGHT.
    """

    def __init__(
        self,
        prompts: list[str],
        every_n_steps: int = 500,
        seed: int = 0,
        size: str | None = None,
        steps: int = 25,
        guidance: float = 3.0,
        sampler: Literal["euler", "heun", "ddim"] | None = None,
        batch_size: int = 32,
    ):
        for name, value in {"every_n_steps": every_n_steps, "steps": steps, "batch_size": batch_size}.items():
            if value < 1:
                raise ValueError(f"{name} of {type(self).__name__} is {value}; it must be at least 1")
        if not prompts:
            raise ValueError(f"{type(self).__name__} has no prompts; name at least one, or leave the callback out")
        self.prompts, self.every_n_steps = prompts, every_n_steps
        self.seeds, self.size = [seed + i for i in range(len(prompts))], parse_size(size) if size else None
        self.settings = {"steps": steps, "guidance": guidance, "sampler": sampler, "batch_size": batch_size}
        self._sharded = False
        self._drawn = -1

    def on_train_start(self, trainer: Trainer, pl_module: TextToImage) -> None:
        """Refuse settings that the model cannot draw with, before training instead of at the first drawing.

        Raises:
            ValueError: the size does not divide into the VAE's latents and patches, or the sampler does not fit.
        """
        self._sharded = any(isinstance(p, DTensor) for p in pl_module.parameters())
        self._sharded |= any(llm.distribute is not None for llm in pl_module.llms)
        training, objective = pl_module.training, pl_module.objective
        pipeline = Pipeline(pl_module, trainer.datamodule.sizes if trainer.datamodule else ())
        self.size = self.size or pipeline.size
        pipeline.noise(self.seeds[:1], *self.size)
        pl_module.train(training)
        if self.settings["sampler"]:
            sampler_for(self.settings["sampler"], objective.predicts, objective.alpha_sigma)

    def on_train_batch_end(self, trainer: Trainer, pl_module: TextToImage, *args: object) -> None:
        """Draw after every n-th optimizer step."""
        if trainer.global_step % self.every_n_steps == 0:
            self._once_a_step(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: TextToImage) -> None:
        """Draw with the last weights."""
        self._once_a_step(trainer, pl_module)

    def draw(
        self, trainer: Trainer, pl_module: TextToImage, which: Sequence[int] | None = None
    ) -> list[UInt8[np.ndarray, "h w 3"]]:
        """One image for each prompt, or for `which` prompts, in the trainer's precision."""
        ema = next((callback for callback in trainer.callbacks if isinstance(callback, EMA)), None)
        which = range(len(self.prompts)) if which is None else which
        training = pl_module.training
        try:
            averaged = ema.swapped(pl_module) if ema else nullcontext()
            with averaged, trainer.precision_plugin.forward_context():  # as the weights were trained
                prompts, seeds = [self.prompts[i] for i in which], [self.seeds[i] for i in which]
                return Pipeline(pl_module)(prompts, seeds, self.size, **self.settings)
        finally:
            pl_module.train(training)

    @abstractmethod
    def use(self, trainer: Trainer, pl_module: TextToImage, step: int) -> None:
        """Draw, and use the images; the random numbers drawn here do not change those of training."""

    def _once_a_step(self, trainer: Trainer, pl_module: TextToImage) -> None:
        step = trainer.global_step
        if step in (0, self._drawn):  # nothing is trained yet, or this step is drawn already
            return
        self._drawn = step
        with isolate_rng():  # loading and scoring may draw random numbers
            self.use(trainer, pl_module, step)


class Samples(FixedPrompts):
    """Draw a grid every n steps and at the end, to `FOLDER/step-000500.png` in the log directory and to TensorBoard.

    Rank 0 draws while the other ranks go on to the next exchange of gradients and wait there, for at most the process
    group's time-out (`timeout` of the strategy, 30 minutes); there is no barrier. Sharded weights are gathered in every
    forward pass, so then all ranks draw, and rank 0 writes.

    Args:
        prompts: prompts to draw, in the grid's reading order; the PNG's metadata holds them, too.
        folder: folder in the log directory, and the image's name in TensorBoard.
        settings: other arguments of `FixedPrompts`.
    """

    def __init__(self, prompts: list[str], folder: str = "samples", **settings):
        super().__init__(prompts, **settings)
        self.folder = folder
        self._root = Path()

    def setup(self, trainer: Trainer, pl_module: TextToImage, stage: str) -> None:
        """Find the log directory; every rank must ask, since the trainer makes the ranks agree on it."""
        self._root = Path(trainer.log_dir or trainer.default_root_dir)

    def scores(self, images: list[UInt8[np.ndarray, "h w 3"]]) -> dict[str, float]:
        """Scores of the images for the log; none here, for subclasses."""
        return {}

    def use(self, trainer: Trainer, pl_module: TextToImage, step: int) -> None:
        """Write the grid."""
        if trainer.is_global_zero or self._sharded:
            images = self.draw(trainer, pl_module)
            if trainer.is_global_zero:
                self._write(trainer, images, step)

    def _write(self, trainer: Trainer, images: list[np.ndarray], step: int) -> None:
        picture = grid(images)
        facts = {"prompts": "\n".join(self.prompts), "seed": self.seeds[0], "step": step, **self.settings}
        save_image(picture, self._root / self.folder / picture_name(step), facts)
        scores = self.scores(images)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(self.folder, picture, step, dataformats="HWC")
            if scores:
                logger.log_metrics(scores, step)
