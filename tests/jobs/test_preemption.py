"""What a run that was told to stop asks of Slurm, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lidit.callbacks.preemption import Preemption, end_job
from lidit.callbacks.record import in_a_line, lost_another

SAVED = Path("runs/a/checkpoints/step-00000003.ckpt")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes this a task of a job, with a scontrol that notes what it is asked and may refuse; gives its notes."""

    def make(code: int = 0, **variables: str) -> Path:
        asked = tmp_path / "asked"
        (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>{asked}\necho "not allowed" >&2\nexit {code}\n')
        (tmp_path / "scontrol").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        for name, value in ({"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0"} | variables).items():
            monkeypatch.setenv(name, value)
        return asked

    return make


def test_a_warned_job_is_requeued(slurm: Callable, caplog: pytest.LogCaptureFixture) -> None:
    asked = slurm()
    assert end_job(SAVED, warned=True) == "requeued"
    assert asked.read_text() == "requeue 12\n"
    assert f"saved {SAVED}; job 12 is requeued" in caplog.text


def test_a_task_of_an_array_is_requeued_alone(slurm: Callable) -> None:
    asked = slurm(SLURM_ARRAY_JOB_ID="10", SLURM_ARRAY_TASK_ID="2")
    end_job(SAVED, warned=True)
    assert asked.read_text() == "requeue 10_2\n"


def test_a_job_that_is_ended_by_slurm_is_not_requeued(slurm: Callable, caplog: pytest.LogCaptureFixture) -> None:
    asked = slurm()  # it may have been cancelled, and would come back
    assert end_job(SAVED, warned=False) == "stopped"
    assert not asked.exists()
    assert "starts it again if it was preempted" in caplog.text


def test_where_slurm_refuses_that_is_said(slurm: Callable, caplog: pytest.LogCaptureFixture) -> None:
    slurm(code=1)
    assert end_job(SAVED, warned=True) == "unqueued"
    assert "job 12 could not be requeued from here: scontrol requeue 12: not allowed" in caplog.text


def test_without_slurm_the_user_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    assert end_job(SAVED, warned=True) == "stopped"
    assert f"saved {SAVED}; go on with the same command and --resume auto" in caplog.text


def test_numbers_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps >= 1"):
        Preemption(every_n_steps=0)


@pytest.mark.parametrize(
    ("error", "echo", "line"),
    [
        (ValueError("bad\nworse"), False, "ValueError: bad"),
        (RuntimeError("[gloo/pair.cc:5] Connection closed by peer [::1]:1"), True, "RuntimeError: [gloo/pair.cc:5]"),
        (RuntimeError("CUDA out of memory"), False, "RuntimeError: CUDA out of memory"),
        (ValueError(), False, "ValueError: without a message"),
    ],
)
def test_errors_are_a_line_and_those_of_lost_ranks_are_known(error: Exception, echo: bool, line: str) -> None:
    assert in_a_line(error).startswith(line)
    assert lost_another(error) == echo
