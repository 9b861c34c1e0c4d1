"""`lidit.Run`: read a run's folder, also while the run is being written and after it crashed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lidit.disk.folder import CHECKPOINTS, CONFIG, METRICS, RECORD, STATE, checkpoints_in, pictures_in, starts, step_of
from lidit.jobs import runs, state

if TYPE_CHECKING:
    import pandas as pd

    from lidit.pipeline import Pipeline


class Run:
    """A run of `lidit fit --run`, as its folder shows it. Each attribute reads the files anew.

    Args:
        path: the run's folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds no run.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"there is no folder {path}; `lidit runs` lists the runs there are")
        if not self.starts and (inner := next(runs.find(self.path), None)) != self.path:
            hint = f"; {inner} in it is one" if inner else "; `lidit fit --run FOLDER` makes one"
            raise ValueError(f"{path} is no run of lidit: it has neither {STATE}/ nor version_0/{hint}")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}): {self.state}, step {self.step}"

    @property
    def starts(self) -> list[Path]:
        """The log folder of each start, the oldest first."""
        return starts(self.path)

    @property
    def state(self) -> str:
        """The run's state as `lidit runs` shows it: running, finished, failed, stopped or another of its words."""
        return self._line.state

    @property
    def error(self) -> str:
        """Why the run failed, as `lidit runs` shows it; empty if it did not fail."""
        return self._line.note

    @property
    def _line(self) -> runs.Line:
        job = runs.last_job(self.path)
        return runs.look(self.path, runs.ask({job} if job else set()))

    @property
    def step(self) -> int:
        """Number of optimizer steps that the run has reported."""
        ranks = state.read(self.path)
        return max((rank.step for rank in ranks), default=0)

    @property
    def config(self) -> dict[str, Any]:
        """The recipe of the newest start, with everything the command line set.

        Raises:
            ValueError: no start has written it yet.
        """
        written = [folder / CONFIG for folder in self.starts if (folder / CONFIG).is_file()]
        if not written:
            raise ValueError(
                f"{self.path} has no {CONFIG}: it stopped before training began; {self.error or 'see logs'}"
            )
        return yaml.safe_load(written[-1].read_text())

    @property
    def record(self) -> dict[str, Any]:
        """Commit, versions, machine and time, if the recipe has the callback `Provenance`; else empty."""
        path = self.path / RECORD
        return json.loads(path.read_text()) if path.is_file() else {}

    @property
    def metrics(self) -> pd.DataFrame:
        """Everything logged: a column per name and a row per optimizer step, of which the latest start counts.

        What `lidit validate` and `lidit test` log is left out: they log at step 0, whatever checkpoint they read.

        Raises:
            ValueError: a log has no column of steps, so another program or version wrote it.
        """
        import pandas as pd

        frames = [frame for folder in self.starts if (frame := _read(folder / METRICS)) is not None]
        kept, first_again = [], math.inf
        for frame in reversed([frame for frame in frames if not _evaluation(frame)]):
            kept.append(frame[frame.index < first_again])
            first_again = min(first_again, frame.index.min())
        if not kept:
            return pd.DataFrame(index=pd.Index([], name="step"))
        # each call of the logger made a row: those of one step are merged
        return pd.concat(kept).groupby(level=0).last().sort_index()

    def images(self, folder: str | None = None) -> dict[int, Path]:
        """Paths of the PNGs that a callback has drawn, by step.

        Args:
            folder: the callback's folder, such as `samples` or `judged`; None takes the first one.
        """
        drawn = {inner.name for start in self.starts for inner in start.iterdir() if pictures_in(inner)}
        names = [folder] if folder else sorted(drawn)[:1]
        found = {step_of(path): path for name in names for start in self.starts for path in pictures_in(start / name)}
        return dict(sorted(found.items()))

    @property
    def checkpoints(self) -> dict[int, Path]:
        """Paths of the checkpoints, by step."""
        return {step_of(path): path for path in reversed(checkpoints_in(self.path / CHECKPOINTS))}

    def pipeline(self, step: int | None = None, ema: bool = True, trust: Sequence[str] | str = ()) -> Pipeline:
        """The model of a checkpoint, ready to draw.

        Args:
            step: step of the checkpoint; None takes the newest.
            ema: take averaged weights; a checkpoint without them is then an error.
            trust: modules besides lidit whose classes the checkpoint may name.

        Raises:
            ValueError: there is no such checkpoint, or its configuration is of another version of lidit.
        """
        from lidit.pipeline import Pipeline

        there = self.checkpoints
        if not there or (step is not None and step not in there):
            known = f"there are those of steps {', '.join(map(str, there))}" if there else "it has none yet"
            raise ValueError(f"{self.path} has no checkpoint{'' if step is None else f' of step {step}'}; {known}")
        return Pipeline.load(str(there[max(there) if step is None else step]), ema, trust)


def _read(path: Path) -> pd.DataFrame | None:
    """A log as a frame by step, or None if nothing is logged yet. A half-written last line is left out."""
    import pandas as pd

    if not path.is_file():
        return None
    lines = path.read_text().splitlines(keepends=True)
    if len(lines) < 2:
        return None
    whole = lines if lines[-1].endswith("\n") else lines[:-1]
    names = whole[0].strip().split(",")
    if "step" not in names:
        raise ValueError(
            f"{path} has no column step, so it is no log of this version of lidit; it has {', '.join(names)}"
        )
    rows = [line.strip().split(",") for line in whole[1:]]
    frame = pd.DataFrame([row for row in rows if len(row) == len(names)], columns=names)
    frame = frame.apply(pd.to_numeric, errors="coerce").dropna(subset="step")
    frame = frame.astype({"step": int}).set_index("step").drop(columns="epoch", errors="ignore")
    return None if frame.empty else frame


def _evaluation(frame: pd.DataFrame) -> bool:
    return not frame.index.any() and not any(name.startswith("train/") for name in frame)
