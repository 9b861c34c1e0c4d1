"""The names of the files in a run's folder, for the code that writes them and the code that reads them.

    RUN/version_0/config.yaml                 each start of the run has a folder: its recipe,
    RUN/version_0/metrics.csv                 everything logged,
    RUN/version_0/samples/step-000500.png     and what was drawn while it trained
    RUN/checkpoints/step-00001000.ckpt        a file, or a folder of sharded weights; `latest` links to the newest
    RUN/record.json                           what it trained with, and how long (`lidit.callbacks.provenance`)
    RUN/state/rank-0.json                     the state of each rank (`lidit.jobs.state`)
    RUN/jobs                                  the ids of its jobs in Slurm, one per line, the newest last
    RUN/logs/                                 what its jobs printed

A folder of a benchmark's pictures, in a run's folder or anywhere, holds `provenance.json` and `scores.json`.
"""

from __future__ import annotations

from pathlib import Path

CONFIG, METRICS = "config.yaml", "metrics.csv"  # in a start's folder
CHECKPOINTS, LATEST = "checkpoints", "latest"
RECORD = "record.json"
STATE, JOBS, LOGS = "state", "jobs", "logs"
PROVENANCE, SCORES = "provenance.json", "scores.json"  # beside a benchmark's pictures


def starts(run: Path) -> list[Path]:
    """The log folder of each start of a run, the oldest first."""
    found = [path for path in run.glob("version_*") if path.name.removeprefix("version_").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("version_")))


def checkpoint_name(step: int) -> str:
    """The name of the checkpoint after a step."""
    return f"step-{step:08d}.ckpt"


def checkpoints_in(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, the newest first."""
    return sorted(folder.glob("step-*.ckpt"), reverse=True)


def picture_name(step: int) -> str:
    """The name of the picture that a callback draws after a step."""
    return f"step-{step:06d}.png"


def pictures_in(folder: Path) -> list[Path]:
    """The pictures that a callback has drawn into its folder, in the order of steps."""
    return sorted(folder.glob("step-*.png"), key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint or a picture."""
    return int(path.stem.removeprefix("step-"))


def state_name(rank: int | str) -> str:
    """The name of the file with a rank's state; rank `*` gives a pattern for the files of all ranks."""
    return f"rank-{rank}.json"
