"""Runs on this machine that are told to stop, or lose a rank; each is a process of its own, as a user starts it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from lidit.cli import main
from lidit.disk.folder import checkpoints_in
from lidit.jobs.state import STOPPED_CODE, read

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEPS = 12
PATIENCE = 120  # seconds for imports and some steps, on a busy machine
END = 60  # seconds within which all ranks have ended after one did: torchrun waits for 30, and we are not alone
PACE = '''
"""A run that takes its time, and writes down its losses; rank 1 may fail."""
import json, time
from pathlib import Path
from lightning.pytorch import Callback

class Pace(Callback):
    def __init__(self, file: str, seconds: float = 0.3, fails: bool = False):
        self.file, self.seconds, self.fails = Path(file), seconds, fails

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        loss = trainer.strategy.reduce(outputs["loss"].detach()).item()
        if self.fails and trainer.global_rank == 1:
            raise ValueError("this rank has had enough")
        time.sleep(self.seconds)
        if trainer.is_global_zero:
            with self.file.open("a") as file:
                file.write(json.dumps([trainer.global_step, loss]) + "\\n")
'''


@pytest.fixture
def recipe(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes the tiny recipe with the callback above, in an empty folder that is then the current one."""
    (tmp_path / "local_pace.py").write_text(PACE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")

    def write(name: str, **pace: object) -> Path:
        content = yaml.safe_load(tiny_recipe.read_text())
        callback = {"class_path": "local_pace.Pace", "init_args": {"file": str(tmp_path / f"{name}.jsonl"), **pace}}
        content["trainer"]["callbacks"] = [content["trainer"]["callbacks"][0], callback]
        content["trainer"] |= {"logger": False, "max_steps": STEPS, "val_check_interval": 1000}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture
def begin() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a command line of lidit; whatever is left of it ends with the test."""
    started: list[subprocess.Popen] = []

    def start(*argv: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "lidit", *argv]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, start_new_session=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition: Callable[[], object], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def test_a_signal_before_anything_is_imported_stops_after_a_step_and_the_run_goes_on_as_if_nothing_was(
    recipe: Callable[..., Path], begin: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    path = recipe("one", seconds=0.0)
    command = ("fit", "--config", str(path), "--run", "runs/one", "--resume", "auto", "--trainer.accelerator", "cpu")
    process = begin(*command)

    def caught() -> bool:  # by a handler of Python's
        status = Path(f"/proc/{process.pid}/status").read_text()
        return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (signal.SIGUSR1 - 1) & 1)

    wait_for(caught, process)
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == STOPPED_CODE
    assert "told to stop (SIGUSR1): saved runs/one/checkpoints/step-00000001.ckpt; go on with" in said
    assert [(rank.state, rank.step) for rank in read(Path("runs/one"))] == [("stopped", 1)]
    assert main(list(command)) == 0
    assert [(rank.state, rank.step) for rank in read(Path("runs/one"))] == [("finished", STEPS)]
    whole = recipe("whole", seconds=0.0)
    assert main(["fit", "--config", str(whole), "--trainer.accelerator", "cpu"]) == 0
    assert lines(tmp_path / "one.jsonl")[1:] == lines(tmp_path / "whole.jsonl")[1:]  # the first wrote no line


def test_sigterm_to_the_launcher_saves_on_all_ranks_and_ends_with_a_code_of_its_own(
    recipe: Callable[..., Path], begin: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    fit = ("--", "fit", "--config", str(recipe("two")), "--trainer.strategy", "sharded")
    process = begin("launch", "local", "--tasks-per-node", "2", "--name", "two", *fit)
    wait_for(lambda: len(lines(tmp_path / "two.jsonl")) >= 2, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=END)
    assert process.returncode == STOPPED_CODE, said
    assert "lidit: told to stop, and saved; the same command goes on" in said
    (saved,) = checkpoints_in(Path("runs/two/checkpoints"))
    step = int(re.search(r"\d+", saved.name)[0])
    assert [(rank.state, rank.step) for rank in read(Path("runs/two"))] == [("stopped", step)] * 2
    assert step == len(lines(tmp_path / "two.jsonl"))


@pytest.mark.parametrize("how", ["raises", "is killed"])
def test_a_rank_that_dies_ends_the_others_and_is_the_one_named(
    how: str, recipe: Callable[..., Path], begin: Callable[..., subprocess.Popen], tmp_path: Path
) -> None:
    fit = ("--", "fit", "--config", str(recipe("dies", fails=how == "raises")), "--trainer.strategy", "sharded")
    process = begin("launch", "local", "--tasks-per-node", "2", "--name", "dies", *fit)
    if how == "is killed":
        wait_for(lambda: len(lines(tmp_path / "dies.jsonl")) >= 1, process)
        os.kill(read(Path("runs/dies"))[1].pid, signal.SIGKILL)
    else:
        wait_for(lambda: any(rank.state == "failed" for rank in read(Path("runs/dies"))), process)
    said, _ = process.communicate(timeout=END)
    assert process.returncode == 1
    *_, last = said.splitlines()
    assert last.startswith("lidit: error: rank 1 on ")
    expected = {"raises": "ValueError: this rank has had enough", "is killed": "vanished without a word"}
    assert expected[how] in last
    pids = [rank.pid for rank in read(Path("runs/dies"))]
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_ranks_that_cannot_meet_name_the_port(
    recipe: Callable[..., Path], begin: Callable[..., subprocess.Popen]
) -> None:
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "LOCAL_RANK": "0"}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in meet.items():
                patch.setenv(name, value)
            options = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.accelerator", "cpu")
            process = begin("fit", "--config", str(recipe("port")), *options)
        said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert f"lidit: error: port {port} (MASTER_PORT) is taken on this machine" in said.splitlines()[-1]
    assert "launch slurm --env MASTER_PORT=N" in said


def test_a_recipe_for_gpus_without_one_says_what_to_do(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["fit", "--config", str(recipe("gpu")), "--trainer.accelerator", "gpu"]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("lidit: error: the recipe asks for GPUs, and this machine shows none")
