"""Samples of the miniature world, judged during training: the only callback that knows the miniature world."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import UInt8

from lidit.callbacks.samples import Samples
from lidit.scenes import benchmarks


class JudgedSamples(Samples):
    """`Samples` of a benchmark's prompts, and the judge's score of these images as `judge/TASK` in every log.

    With few prompts a score is coarse: 16 per task give steps of 0.06. For results, run the benchmark itself.

    Args:
        benchmark: name of a benchmark in `lidit/scenes/benchmarks.py`.
        count_per_task: number of prompts per task; a grid shows them task by task.
        prompt_seed: decides the prompts; `seed` decides the noise.
        folder: folder in the log directory, by default another one than that of `Samples`.
        settings: other arguments of `FixedPrompts`.

    Raises:
        ValueError: `FixedPrompts` refuses a setting.
    """

    def __init__(
        self,
        benchmark: Literal["attributes", "geneval", "positional_bias", "dense", "heldout"] = "heldout",
        count_per_task: int = 16,
        prompt_seed: int = 0,
        folder: str = "judged",
        **settings,
    ):
        self.benchmark = benchmark
        self.questions = benchmarks.prompts(benchmark, count_per_task, prompt_seed)
        super().__init__([question.text for question in self.questions], folder, **settings)

    def scores(self, images: list[UInt8[np.ndarray, "h w 3"]]) -> dict[str, float]:
        """The judge's scores in [0, 1], per task and overall."""
        scores = benchmarks.score(self.benchmark, self.questions, images)
        return {f"judge/{task}": value for task, value in scores.items()}
