"""`lidit runs` from what ranks, logs and Slurm say, and signals that are remembered."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lidit.cli import main
from lidit.jobs import signals, state
from lidit.jobs.runs import look
from lidit.jobs.state import State


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Makes a run's folder from what its ranks say, its job and its log."""

    def make(*ranks: State, job: str | None = None, log: str = "") -> Path:
        folder = tmp_path / "runs/one"
        (folder / "logs").mkdir(parents=True)
        for rank in ranks:
            state.write(folder, replace(rank, job=job))
        if job:
            (folder / "jobs").write_text(f"7\n{job}\n")
            (folder / f"logs/{job}-rank0.log").write_text(log)
        return folder

    return make


def said(rank: int = 0, **what: object) -> State:
    return State(rank, "start", **{"step": 5, "max_steps": 9, "loss": 0.25} | what)


def gone_pid() -> int:
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


@pytest.mark.parametrize(
    ("word", "slurm", "expected", "note"),
    [
        ("running", "RUNNING", "running", ""),
        ("running", "PENDING", "queued", "since running at step 5"),
        ("requeued", "PENDING", "queued", "since requeued at step 5"),
        ("requeued", "RUNNING", "starting", ""),
        ("finished", "COMPLETED", "finished", ""),
        ("finished", "", "finished", ""),
        ("stopped", "", "stopped", "it has saved: the same command with --resume auto goes on"),
        ("running", "CANCELLED", "cancelled", ""),
        ("running", "OUT_OF_MEMORY", "failed", "vanished without a word"),
    ],
)
def test_a_runs_state_is_what_its_ranks_and_slurm_agree_on(
    run: Callable, word: str, slurm: str, expected: str, note: str
) -> None:
    line = look(run(said(state=word), job="12"), {"12": slurm} if slurm else {})
    assert (line.state, line.step, line.loss, line.job) == (expected, "5/9", "0.25", "12")
    assert note in line.note


def test_a_job_without_a_word_of_its_ranks_has_slurms(run: Callable) -> None:
    folder = run(job="12", log="...\nlidit: error: there is no recipe x\nbye\n")
    assert look(folder, {"12": "PENDING"}).state == "queued"
    assert look(folder, {"12": "RUNNING"}).state == "starting"
    for slurm in ({"12": "FAILED"}, {}):
        line = look(folder, slurm)
        assert (line.state, line.note) == ("failed", "lidit: error: there is no recipe x")


def test_what_an_earlier_job_said_is_not_this_ones(run: Callable) -> None:
    folder = run(said(state="failed", error="old"), job="11")
    (folder / "jobs").write_text("11\n12\n")
    assert look(folder, {"12": "RUNNING"}).state == "starting"


def test_the_error_of_the_rank_that_failed_by_itself_comes_first(run: Callable) -> None:
    echo = said(0, state="failed", error="Connection closed by peer", echo=True, updated=1.0)
    folder = run(echo, said(1, state="failed", error="ValueError: mine", updated=2.0))
    assert look(folder, {}).note.endswith("step 5: ValueError: mine")


def test_a_killed_rank_comes_before_those_that_lost_it(run: Callable) -> None:
    pid = gone_pid()
    echo = said(0, state="failed", error="Connection closed by peer", echo=True)
    line = look(run(echo, said(1, pid=pid, step=0)), {})
    assert line.state == "failed"
    assert re.match(r"rank 1 on \S+, step 5: ", line.note)
    assert f"pid {pid} vanished without a word" in line.note


def test_a_silent_run_of_another_machine_is_unknown(run: Callable) -> None:
    assert look(run(said(host="elsewhere", updated=time.time() - 3600)), {}).state == "unknown"


def test_ranks_of_an_earlier_start_are_not_counted(tmp_path: Path) -> None:
    state.write(tmp_path, State(3, "old", started=1.0))
    state.write(tmp_path, State(0, "new"))
    assert [rank.rank for rank in state.read(tmp_path)] == [0]


def test_the_list_has_a_line_for_each_run_below_a_folder(
    run: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run(said(state="finished"))
    state.write(tmp_path / "runs/table/0", said(state="stopped"))
    assert main(["runs", str(tmp_path / "runs")]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split() == ["run", "state", "step", "loss", "job", "updated"]
    assert [line.split()[:3] for line in lines] == [
        [str(tmp_path / "runs/one"), "finished", "5/9"],
        [str(tmp_path / "runs/table/0"), "stopped", "5/9"],
    ]


def test_no_folder_and_no_runs_are_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["runs", str(tmp_path / "none")]) == 1
    assert "none is no folder" in capsys.readouterr().err
    assert main(["runs", str(tmp_path)]) == 0
    assert "no runs in" in capsys.readouterr().out


def test_without_slurm_the_files_must_do(
    run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run(said(state="running"), job="12")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["runs", str(tmp_path / "runs")]) == 0
    printed = capsys.readouterr()
    assert "running" in printed.out
    assert "what Slurm knows is left out: squeue not found" in printed.err


def test_the_list_needs_no_torch() -> None:
    code = "import sys, lidit.jobs.runs, lidit.jobs.launch; assert not {'torch', 'lightning'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_state_is_whole_whenever_it_is_read(tmp_path: Path) -> None:
    writer = (
        "import sys; from pathlib import Path; from lidit.jobs import state\n"
        "for step in range(100000): state.write(Path(sys.argv[1]), state.State(0, 'a', step=step))"
    )
    with subprocess.Popen([sys.executable, "-c", writer, str(tmp_path)]) as process:
        try:
            deadline = time.monotonic() + 20
            steps: set[int] = set()
            while len(steps) < 50 and time.monotonic() < deadline:
                steps |= {each.step for each in state.read(tmp_path)}
        finally:
            process.kill()
    assert len(steps) >= 50


def test_a_signal_is_remembered_and_nothing_else() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with signals.remembered():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # as a library may do
        signals.keep()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received() == ["SIGTERM", "SIGUSR1"]
    assert signal.getsignal(signal.SIGTERM) is before
    assert signals.received() == []  # a later run of this process was not told to stop


def test_a_run_that_nobody_would_stop_ends_by_the_signal() -> None:
    code = (
        "import os, signal\nfrom lidit.jobs import signals\nwith signals.remembered():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    print('here', flush=True)\n"
        "    signals.release()\n    print('not')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "here\n")
