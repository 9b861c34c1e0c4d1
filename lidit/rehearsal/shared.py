"""What the stages of a rehearsal share: the recipe that is played, and a verdict."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lidit.rehearsal.play import Failed, Player
from lidit.rehearsal.small import Ranks

PASSED, FAILED, SKIPPED = "passed", "FAILED", "-"
CSV_LOGGER = "lightning.pytorch.loggers.CSVLogger"


@dataclass(frozen=True)
class Verdict:
    """What came of a stage.

    Args:
        stage: its name.
        verdict: passed, failed, or not played.
        seconds: it took.
        said: in a line, what was seen, or what failed where.
    """

    stage: str
    verdict: str
    seconds: float
    said: str


@dataclass(frozen=True)
class Play:
    """What the stages share.

    Args:
        player: plays commands.
        folder: everything is written into it.
        recipe: small, with tiny models and drawn data.
        ranks: processes that it is played with.
        sizes: of the pictures, width and height.
        url: of a server of the folder `data`.
        trusted: modules besides lidit that the recipe names.
        over: a file of settings that the user lays over the small recipe.
        callbacks: of the recipe.
    """

    player: Player
    folder: Path
    recipe: dict[str, Any]
    ranks: Ranks
    sizes: list[tuple[int, int]]
    url: str
    trusted: list[str]
    over: str | None = None
    callbacks: list[Any] = field(default_factory=list)

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.folder / "runs" / name

    def fit(
        self, name: str, run: str, *more: str, stop_at: int = 0, ranks: Ranks | None = None, expected: int = 0
    ) -> None:
        """Train by the recipe, with a witness among its callbacks.

        Args:
            name: of the logs.
            run: name of the run.
            more: words on the command line.
            stop_at: the step after which the last rank is told to stop.
            ranks: processes, by default the recipe's.
            expected: exit code.
        """
        ranks = ranks or self.ranks
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(on(with_witness(self.recipe, self.notes(run), stop_at), ranks), sort_keys=False))
        over = ["--config", self.over] if self.over else []
        self.player(
            name, ["fit", "--config", str(path), *over, "--run", str(self.run(run)), *more], ranks.all, expected
        )

    def notes(self, run: str) -> Path:
        """Where the ranks of a run note what they do."""
        return self.folder / "notes" / run

    @property
    def passes(self) -> int:
        """Batches of an optimizer step."""
        return self.recipe["trainer"]["accumulate_grad_batches"]


def with_witness(recipe: dict[str, Any], folder: Path, stop_at: int) -> dict[str, Any]:
    """The recipe with a witness before all other callbacks, and with a log that can be read."""
    arguments = {"folder": str(folder), "stop_at": stop_at}
    witness = {"class_path": "lidit.rehearsal.witness.Witness", "init_args": arguments}
    trainer, csv_logger = recipe["trainer"], {"class_path": CSV_LOGGER, "init_args": {"save_dir": "runs"}}
    loggers = trainer["logger"] if isinstance(trainer["logger"], list) else [trainer["logger"]]
    named = [logger for logger in loggers if isinstance(logger, dict)]
    with_csv = named if any(logger["class_path"] == CSV_LOGGER for logger in named) else [*named, csv_logger]
    return recipe | {"trainer": trainer | {"callbacks": [witness, *(trainer["callbacks"] or [])], "logger": with_csv}}


def on(recipe: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The recipe on so many processes."""
    trainer = recipe["trainer"] | {"devices": ranks.all}
    strategy = trainer["strategy"]
    if isinstance(strategy, dict) and "replicate" in strategy.get("init_args", {}):
        trainer["strategy"] = strategy | {"init_args": strategy["init_args"] | {"replicate": ranks.copies}}
    return recipe | {"trainer": trainer}


def timed(name: str, stage: Callable[[], str]) -> Verdict:
    """Play a stage."""
    begun = time.monotonic()
    try:
        said = stage()
    except Failed as error:
        return Verdict(name, FAILED, time.monotonic() - begun, str(error))
    return Verdict(name, SKIPPED if said.startswith("-") else PASSED, time.monotonic() - begun, said.lstrip("- "))
