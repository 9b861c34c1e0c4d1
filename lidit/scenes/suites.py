"""The benchmarks of `benchmarks.py` in the form of `lidit.eval`: which pictures to draw, and a folder's score."""

from __future__ import annotations

import json
from pathlib import Path

from lidit.eval.suite import BenchmarkError, Picture, Suite, present, read_image
from lidit.scenes import benchmarks

ASKED = "prompts.json"  # a file in the run folder with the arguments of benchmarks.prompts


class Twin:
    """A miniature benchmark with the two functions that every benchmark has.

    Args:
        benchmark: the name of the benchmark in `benchmarks.TASKS`.
    """

    def __init__(self, benchmark: str):
        self.benchmark, self.name = benchmark, f"scenes-{benchmark.replace('_', '-')}"

    def suite(self, count_per_task: int = 100, prompt_seed: int = 0) -> Suite:
        """The pictures to draw: one for each prompt, each from its own noise.

        Args:
            count_per_task: number of prompts of each task.
            prompt_seed: seed of the prompts.
        """
        asked = {"benchmark": self.benchmark, "count_per_task": count_per_task, "seed": prompt_seed}
        questions = benchmarks.prompts(**asked)
        pictures = [Picture(f"{q.task}/{i:05d}.png", q.text, sample=i) for i, q in enumerate(questions)]
        return Suite(self.name, pictures, {}, {ASKED: json.dumps(asked, indent=2) + "\n"})

    def score(self, run: Path, allow_missing: bool = False) -> dict:
        """The judge's scores in [0, 1].

        Args:
            run: the folder that `lidit sample --benchmark` wrote.
            allow_missing: score the pictures that are there, even if some are missing.

        Raises:
            BenchmarkError: pictures are missing, or the folder is not a run of this benchmark.
        """
        if not (run / ASKED).is_file():
            raise BenchmarkError(f"{run / ASKED} is missing; draw the run with lidit sample --benchmark {self.name}")
        asked = json.loads((run / ASKED).read_text())
        if asked["benchmark"] != self.benchmark:
            raise BenchmarkError(f"{run} holds pictures of {asked['benchmark']}, not of {self.benchmark}")
        questions = benchmarks.prompts(**asked)
        pictures = self.suite(asked["count_per_task"], asked["seed"]).pictures
        found = set(present(run, [picture.path for picture in pictures], allow_missing))
        drawn = [(q, read_image(run / p.path)) for q, p in zip(questions, pictures, strict=True) if p.path in found]
        return {
            "name": self.name,
            "scores": benchmarks.score(self.benchmark, *zip(*drawn, strict=True)),
            "images_demanded": len(pictures),
            "images_scored": len(drawn),
        }


HELDOUT, ATTRIBUTES, GENEVAL, POSITIONAL_BIAS, DENSE = (
    Twin(name) for name in ("heldout", "attributes", "geneval", "positional_bias", "dense")
)
