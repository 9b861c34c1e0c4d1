"""CLIP and SigLIP scores during training: how well pictures of fixed prompts follow them, by open_clip's models."""

from __future__ import annotations

from time import perf_counter

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lidit.callbacks.samples import FixedPrompts
from lidit.eval.metrics import Agreement, CLIPScore, SigLIPScore
from lidit.eval.openclip import CLIP, SIGLIP, OpenCLIP
from lidit.module import TextToImage


class ScoreCallback(FixedPrompts):
    """Scores sets of fixed prompts every n steps and at the end, as `NAME/SET` in every log.

    Each rank draws and scores its share of the prompts. Callbacks that draw the same prompts in the same way share the
    images. The scorer is not a part of the module: no checkpoint, EMA copy or shard holds it. At the end of the run,
    scoring's share of the training time is logged.

    Args:
        name: name of the score in the logs.
        scorer: the metric; its encoder is outside the module tree.
        prompt_sets: the prompts of each set, by the set's name.
        settings: other arguments of `FixedPrompts`.

    Raises:
        ValueError: `FixedPrompts` refuses a setting, or a set has no prompts.
    """

    def __init__(self, name: str, scorer: Agreement, prompt_sets: dict[str, list[str]], **settings):
        if empty := [which for which, prompts in prompt_sets.items() if not prompts]:
            raise ValueError(f"prompt set {empty[0]!r} of {type(self).__name__} is empty; leave it out")
        super().__init__([prompt for prompts in prompt_sets.values() for prompt in prompts], **settings)
        self.name, self.scorer = name, scorer
        self.sets = [which for which, prompts in prompt_sets.items() for _ in prompts]  # each prompt's set
        self.images: dict[int, np.ndarray] = {}  # this rank's images of the last drawing, by their prompts' numbers
        self._times: list[float] = []
        self._start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: TextToImage) -> None:
        """Load the scorer now, since a scorer that cannot be loaded would otherwise stop a run in its middle."""
        super().on_train_start(trainer, pl_module)
        self.scorer.encoder.load()
        self.scorer.to(pl_module.device)  # the metric's sums, which are added up over the ranks
        self._start = perf_counter()

    def use(self, trainer: Trainer, pl_module: TextToImage, step: int) -> None:
        """Draw the images, or take those of another callback; score them and log the scores."""
        begun = perf_counter()
        self.images = self._shared(trainer, step) or self._share(trainer, pl_module)
        scores = {f"{self.name}/{which}": self._score(which) for which in dict.fromkeys(self.sets)}
        for logger in trainer.loggers:
            logger.log_metrics(scores, step)
        self._times.append(perf_counter() - begun)

    def on_train_end(self, trainer: Trainer, pl_module: TextToImage) -> None:
        """Score the last weights, and log how much time scoring took."""
        super().on_train_end(trainer, pl_module)
        spent, whole = sum(self._times), perf_counter() - self._start
        if self._times:
            rank_zero_info(
                f"{self.name}: scored {len(self._times)} times in {spent:.1f} s, {100 * spent / whole:.1f} % of the "
                f"training time; every_n_steps is {self.every_n_steps}"
            )

    def same_images(self, other: ScoreCallback) -> bool:
        """Whether another callback draws the same images."""
        ours, theirs = ((c.prompts, c.seeds, c.size, c.settings) for c in (self, other))
        return ours == theirs

    def _shared(self, trainer: Trainer, step: int) -> dict[int, np.ndarray]:
        """The same images, if another callback has drawn them in this step."""
        others = (c for c in trainer.callbacks if isinstance(c, ScoreCallback) and c is not self)
        return next((c.images for c in others if c._drawn == step and c.images and c.same_images(self)), {})

    def _share(self, trainer: Trainer, pl_module: TextToImage) -> dict[int, np.ndarray]:
        """This rank's images. All ranks draw equally many, since sharded weights are gathered in each forward pass."""
        count, world = len(self.prompts), trainer.world_size
        which = [i % count for i in range(trainer.global_rank, -(-count // world) * world, world)]
        drawn = dict(zip(which, self.draw(trainer, pl_module, which), strict=True))
        return {i: image for i, image in drawn.items() if i % world == trainer.global_rank}

    def _score(self, which: str) -> float:
        """The score of a set's images, over all ranks."""
        mine = [i for i in self.images if self.sets[i] == which]
        self.scorer.reset()
        if mine:
            self.scorer.update([self.images[i] for i in mine], [self.prompts[i] for i in mine])
        return float(self.scorer.compute())


class CLIPScoreCallback(ScoreCallback):
    """`ScoreCallback` with `lidit.eval.metrics.CLIPScore`, logged as `clip_score/SET`.

    Args:
        prompt_sets: the prompts of each set, by the set's name.
        model: architecture, as open_clip names it.
        pretrained: the model's weights, as `OpenCLIP` reads them: a tag, a file, a folder, `bundled:clip`.
        device: where the scorer runs, cpu or cuda.
        every_n_steps: optimizer steps between scores.
        settings: other arguments of `FixedPrompts`.
    """

    def __init__(
        self,
        prompt_sets: dict[str, list[str]],
        model: str = CLIP[0],
        pretrained: str = CLIP[1],
        device: str = "cpu",
        every_n_steps: int = 5000,
        **settings,
    ):
        scorer = CLIPScore(OpenCLIP(model, pretrained, device))
        super().__init__("clip_score", scorer, prompt_sets, every_n_steps=every_n_steps, **settings)


class SigLIPScoreCallback(ScoreCallback):
    """`ScoreCallback` with `lidit.eval.metrics.SigLIPScore`, logged as `siglip_score/SET`.

    Args:
        prompt_sets: the prompts of each set, by the set's name.
        model: architecture, as open_clip names it.
        pretrained: the model's weights, as `OpenCLIP` reads them: a tag, a file, a folder, `bundled:clip`.
        device: where the scorer runs, cpu or cuda.
        every_n_steps: optimizer steps between scores.
        settings: other arguments of `FixedPrompts`.
    """

    def __init__(
        self,
        prompt_sets: dict[str, list[str]],
        model: str = SIGLIP[0],
        pretrained: str = SIGLIP[1],
        device: str = "cpu",
        every_n_steps: int = 5000,
        **settings,
    ):
        scorer = SigLIPScore(OpenCLIP(model, pretrained, device))
        super().__init__("siglip_score", scorer, prompt_sets, every_n_steps=every_n_steps, **settings)
