"""Slurm's commands: submit, requeue, and what became of jobs; each is waited for a minute at most."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from lidit.jobs.ranks import is_task

PATIENCE = 60  # seconds


def call(*command: str) -> str:
    """What a command of Slurm prints.

    Raises:
        ValueError: it is not there, or says no.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except FileNotFoundError:
        raise ValueError(
            f"{command[0]} not found: Slurm's commands are not on PATH here; run this on a login node of the cluster "
            "(`lidit launch slurm --dry-run` prints the script anywhere, `lidit launch local` needs no Slurm)"
        ) from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"{command[0]} did not answer for {PATIENCE} s; is slurmctld up? Try `sinfo`") from None
    if done.returncode:
        raise ValueError(f"{' '.join(command)}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout


def job_id() -> str | None:
    """The job this process is a task of, as Slurm wants it named; a task of an array is JOB_TASK, JOB would be all."""
    if not is_task():  # in a job's script nobody is rank 0
        return None
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def submit(script: Path) -> str:
    """Submit a script and return the job's id.

    Raises:
        ValueError: Slurm is not there, or refuses.
    """
    return call("sbatch", "--parsable", str(script)).strip().partition(";")[0]


def requeue(job: str) -> None:
    """Put a running job back into the queue; Slurm then ends its processes.

    Raises:
        ValueError: Slurm is not there, or refuses.
    """
    call("scontrol", "requeue", job)


def states(jobs: Iterable[str]) -> dict[str, str]:
    """Slurm's word for each job that it knows: from squeue, or else from its accounting.

    Raises:
        ValueError: Slurm is not there, or does not answer.
    """
    asked = set(jobs)
    listed = call("squeue", "--noheader", "--array", "--states=all", "--me", "--format=%i %T")
    known = dict(line.split(maxsplit=1) for line in listed.splitlines() if line.strip())
    if missing := asked - known.keys():
        try:
            table = call("sacct", "--noheader", "-X", "-P", "--format=JobID,State", "--jobs", ",".join(sorted(missing)))
        except ValueError:  # a cluster without accounting: what squeue has forgotten is unknown
            table = ""
        known |= {job: state.split()[0] for job, _, state in (line.partition("|") for line in table.splitlines())}
    return {job: known[job].strip() for job in asked if job in known}
