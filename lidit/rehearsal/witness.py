"""A callback that notes what each rank of a run does and loses, so that a rehearsal can tell how far it came."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

BATCH, TRAINED, VALIDATING, VALIDATED, ENDED = "batch", "trained", "validating", "validated", "ended"


class Witness(Callback):
    """Writes a line for each thing that this rank does to `FOLDER/rank-N.jsonl`.

    It comes first of a run's callbacks, so that what is noted last says which of the others ran when a run failed.

    Args:
        folder: where the notes are written.
        stop_at: after this optimizer step the last rank tells itself to stop, as a cluster would; 0: never.
    """

    def __init__(self, folder: str, stop_at: int = 0):
        self.folder, self.stop_at = Path(folder), stop_at

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: object) -> None:
        """Note the batch's loss, and stop."""
        self._note(trainer, BATCH, loss=float(outputs["loss"]) * trainer.accumulate_grad_batches)
        if trainer.global_step == (self.stop_at or None) and trainer.global_rank == trainer.world_size - 1:
            self.stop_at = 0
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer, VALIDATING)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer, VALIDATED)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer, TRAINED)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer, ENDED)

    def _note(self, trainer: Trainer, what: str, **more: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        line = {"what": what, "step": trainer.global_step, "at": time.time(), **more}
        with (self.folder / f"rank-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def notes(folder: Path) -> list[list[dict[str, Any]]]:
    """What each rank noted, in order."""
    files = sorted(folder.glob("rank-*.jsonl"), key=lambda path: int(path.stem.removeprefix("rank-")))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def losses(folder: Path) -> list[float]:
    """The mean loss over the ranks of each batch, up to the last batch that all of them noted."""
    each = [[note["loss"] for note in rank if note["what"] == BATCH] for rank in notes(folder)]
    together = min(batches(folder), default=0)
    return [sum(rank[i] for rank in each) / len(each) for i in range(together)]


def batches(folder: Path) -> list[int]:
    """How many batches each rank noted; unequal where one of them failed earlier than the others."""
    return [sum(note["what"] == BATCH for note in rank) for rank in notes(folder)]
