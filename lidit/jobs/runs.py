"""`lidit runs`: what became of the runs in a folder, from what their ranks wrote, their logs and Slurm."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lidit.disk.folder import CHECKPOINTS, JOBS, LOGS, STATE
from lidit.jobs import slurm, state
from lidit.jobs.state import State

DEPTH = 3  # folders within folders that are looked into
SILENT = 300  # seconds without a word after which nobody knows whether a run is still there
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED")
ACTIVE = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING")
PAUSED = (state.STOPPED, state.REQUEUED, state.UNQUEUED)
ERRORS = ("Error: ", "Exception: ", "lidit: error: ", "srun: error: ", "slurmstepd: error: ")


@dataclass(frozen=True)
class Line:
    """A line of the list.

    Args:
        name: folder.
        state: queued, starting, running, ending, finished, failed, cancelled, stopped, requeued, unqueued or unknown.
        step: `done/of`.
        loss: the last one.
        job: of Slurm.
        updated: how long ago something was heard of it.
        note: why it failed, or what is known otherwise.
    """

    name: str
    state: str
    step: str = "-"
    loss: str = "-"
    job: str = "-"
    updated: str = "-"
    note: str = ""


def runs(folder: str = "runs") -> None:
    """List the runs in a folder: state, step, last loss, and the error of those that failed.

    Args:
        folder: the run folders are in it, or it is one.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is no folder; name the one with the runs, such as `lidit runs runs`")
    found = list(find(Path(folder)))
    known = ask({job for run in found if (job := last_job(run))})
    listed = [look(run, known) for run in found]
    if not listed:
        print(f"no runs in {folder}: `lidit fit --run` and `lidit launch` make them")
        return
    titles = Line("run", "state", "step", "loss", "job", "updated", "")
    rows = [tuple(vars(row).values()) for row in (titles, *listed)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())


def find(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The run folders in a folder, itself among them."""
    if (folder / STATE).is_dir() or (folder / JOBS).is_file():
        yield folder
    for inner in sorted(folder.iterdir()) if depth else ():
        if inner.is_dir() and not inner.name.startswith(".") and inner.name not in (STATE, LOGS, CHECKPOINTS):
            yield from find(inner, depth - 1)


def last_job(run: Path) -> str | None:
    """The newest job of a run, None if it had none."""
    file = run / JOBS
    lines = file.read_text().split() if file.is_file() else []
    return lines[-1] if lines else None


def ask(jobs: set[str]) -> dict[str, str]:
    """Slurm's states of jobs; where it does not answer, that is said once, and the files must do."""
    if not jobs:
        return {}
    try:
        return slurm.states(jobs)
    except ValueError as error:
        print(f"lidit: what Slurm knows is left out: {error}", file=sys.stderr)
        return {}


def look(folder: Path, known: dict[str, str]) -> Line:
    """What became of a run.

    Args:
        folder: the run's.
        known: Slurm's states of jobs.
    """
    ranks, job = state.read(folder), last_job(folder)
    slurms = known.get(job or "", "")
    if job and ranks and ranks[0].job != job:  # of an earlier job
        ranks = []
    word, note = judge(folder, ranks, slurms, job)
    main = ranks[0] if ranks else None
    return Line(
        name=str(folder),
        state=word,
        step=f"{main.step}/{main.max_steps}" if main else "-",
        loss=f"{main.loss:.4g}" if main and main.loss is not None else "-",
        job=job or (main.job if main else None) or "-",
        updated=ago(time.time() - max(rank.updated for rank in ranks)) if ranks else "-",
        note=note,
    )


def judge(folder: Path, ranks: list[State], slurms: str, job: str | None) -> tuple[str, str]:
    """A run's state in a word, and why.

    Args:
        folder: the run's.
        ranks: what they say, of the newest job.
        slurms: Slurm's word for that job; empty: it does not know.
        job: its id.
    """
    own = ranks[0].state if ranks else ""
    if slurms in WAITING:
        return "queued", f"since {own} at step {ranks[0].step}" if ranks else ""
    if slurms in ACTIVE and own in ("", *PAUSED):
        return "starting" if own != state.STOPPED else "ending", ""
    if slurms.startswith("CANCELLED"):
        return "cancelled", ""
    over = bool(slurms) and slurms not in ACTIVE
    if error := first_error(ranks, over):
        return state.FAILED, error
    if own in (state.FINISHED, *PAUSED):
        return own, "" if own == state.FINISHED else "it has saved: the same command with --resume auto goes on"
    if slurms == "COMPLETED":
        return state.FINISHED, ""
    if over:
        return state.FAILED, log_error(folder, job or "") or f"Slurm says {slurms}"
    if slurms or (ranks and time.time() - ranks[0].updated < SILENT):
        return state.RUNNING, ""
    error = log_error(folder, job or "")
    return (state.FAILED, error) if error else ("unknown", "" if ranks else "Slurm does not know the job (any more)")


def first_error(ranks: list[State], over: bool) -> str | None:
    """What the run failed of: an error of its own before a process that vanished, and that before what others lost.

    Args:
        ranks: what they say.
        over: none of them runs any more.
    """
    failed = sorted((rank for rank in ranks if rank.state == state.FAILED), key=lambda rank: rank.updated)
    causes = [rank for rank in failed if not rank.echo]
    vanished = [rank for rank in ranks if rank.gone or (over and rank.state == state.RUNNING)]
    for rank in causes + vanished + failed:
        said = rank.error or f"pid {rank.pid} vanished without a word: killed from outside, or out of memory"
        step = rank.step if rank.error else max(each.step for each in ranks)  # only rank 0 says how far it is
        return f"rank {rank.rank} on {rank.host}, step {step}: {said}"
    return None


def log_error(folder: Path, job: str) -> str | None:
    """The last line of a job's logs that looks like an error's; a rank's log comes before the script's."""
    logs = sorted((folder / LOGS).glob(f"{job}[-.]*log"), key=lambda log: "rank" not in log.name)
    for log in logs:
        lines = log.read_text(errors="replace").splitlines()
        for line in reversed(lines):
            if any(mark in line for mark in ERRORS):
                return line.strip()
    return None


def ago(seconds: float) -> str:
    """A time that has passed, in its largest unit."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
