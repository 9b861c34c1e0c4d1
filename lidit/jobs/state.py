"""What each rank of a run says about itself, in `RUN/state/rank-N.json`; who reads it needs no torch."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from lidit.disk.folder import STATE, state_name
from lidit.disk.whole import write_text
from lidit.jobs.ranks import is_task

RUNNING, FINISHED, FAILED = "running", "finished", "failed"
STOPPED, REQUEUED = "stopped", "requeued"  # told to stop, and has saved
UNQUEUED = "unqueued"  # the same, and its job should be requeued, which it could not do; the job's script looks for it
STOPPED_CODE = 75  # exit code of a run that was told to stop, has saved, and can go on


@dataclass(frozen=True)
class State:
    """One rank's words.

    Args:
        rank: of the process.
        start: the same for all ranks of one start of the run, another for each start.
        state: one of the words above.
        step: optimizer steps done.
        max_steps: where training ends; -1: elsewhere.
        loss: of the last batch that was looked at.
        error: the last line of what it failed with.
        echo: the error is that of a rank which lost another one, not a cause.
        job: of Slurm.
        host: its machine.
        pid: its process there.
        started: seconds since 1970.
        updated: seconds since 1970.
    """

    rank: int
    start: str
    state: str = RUNNING
    step: int = 0
    max_steps: int = -1
    loss: float | None = None
    error: str | None = None
    echo: bool = False
    job: str | None = None
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    started: float = field(default_factory=time.time)
    updated: float = field(default_factory=time.time)

    @property
    def gone(self) -> bool:
        """It ran on this machine, and its process is not there any more."""
        return self.state == RUNNING and self.host == socket.gethostname() and not Path(f"/proc/{self.pid}").exists()

    def now(self, **changes: object) -> State:
        """The same with changes, as of now."""
        return replace(self, updated=time.time(), **changes)


def write(run: Path, state: State) -> None:
    """Replace what this rank has said; a reader finds the old words or the new ones, nothing between."""
    write_text(run / STATE / state_name(state.rank), json.dumps(asdict(state)) + "\n")


def read(run: Path) -> list[State]:
    """What the ranks of the run's newest start say, by rank.

    Raises:
        ValueError: a file is none of ours.
    """
    found = [_parse(path) for path in (run / STATE).glob(state_name("*"))]
    newest = max(found, key=lambda state: state.started, default=None)
    return sorted((s for s in found if newest and s.start == newest.start), key=lambda state: state.rank)


def _parse(path: Path) -> State:
    try:
        return State(**json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no state of a run of this version of lidit ({error}); remove it") from None


def start_name() -> str:
    """What tells one start of a run from the next, and is the same on all its ranks."""
    names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT") if is_task() else ()
    names = names or ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    return "-".join(os.environ[name] for name in names if name in os.environ) or f"pid-{os.getpid()}"
