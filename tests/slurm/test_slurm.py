"""Jobs on a real Slurm of two nodes: preempted and gone on with, arrays, failures that are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lidit.cli import main
from lidit.disk.folder import checkpoints_in
from lidit.jobs.state import State, read

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

STEPS = 12
PACE = '''
"""What the tests' runs do beside training: take their time, write down losses, or fail."""
import json, os, time
from pathlib import Path
from lightning.pytorch import Callback

class Pace(Callback):
    def __init__(self, folder: str, fail_rank: int = -1, seconds: float = 0.3):
        self.folder, self.fail_rank, self.seconds = Path(folder), fail_rank, seconds

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        loss = trainer.strategy.reduce(outputs["loss"].detach()).item()
        if trainer.global_rank == self.fail_rank:
            raise ValueError("the disk of this rank is made of cheese")
        time.sleep(self.seconds + 0.2 * trainer.global_rank)  # ranks out of step: handlers that save would hang
        if trainer.is_global_zero:
            with (self.folder / "losses.jsonl").open("a") as file:
                file.write(json.dumps([trainer.global_step, loss, os.environ.get("SLURM_RESTART_COUNT", "0")]) + "\\n")
'''


@pytest.fixture
def pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    """The callback, with its folder."""
    (tmp_path / "tests_pace.py").write_text(PACE)
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name: str, **settings: object) -> dict:
        (tmp_path / name).mkdir()
        return {"class_path": "tests_pace.Pace", "init_args": {"folder": str(tmp_path / name), **settings}}

    return make


def losses(folder: Path) -> list[list]:
    """Step, loss and number of the start, in the order of writing."""
    file = folder / "losses.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def rank0(run: Path) -> State | None:
    ranks = read(run)
    return ranks[0] if ranks else None


@pytest.mark.one_of_each
def test_a_preempted_job_goes_on_and_ends_with_the_loss_of_one_that_was_not(
    slurm, lidit, launch, until, recipe, pace, tmp_path: Path
) -> None:
    path = recipe("long", pace("diary"), max_steps=STEPS)
    command = ("fit", "--config", str(path), "--trainer.strategy", "sharded")
    job = launch("--nodes", "2", "--name", "long", "--env", f"PYTHONPATH={tmp_path}:{Path.cwd()}", "--", *command)
    run = tmp_path / "runs/long"
    until(lambda: len(losses(tmp_path / "diary")) >= 3, "it does not train")
    assert "running" in lidit("runs")
    urgent = slurm.ask(
        "sbatch", "--parsable", "-p", "urgent", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap=true"
    )
    until(lambda: any(start == "1" for *_, start in losses(tmp_path / "diary")), "it does not go on")
    until(lambda: "COMPLETED" in slurm.ask("squeue", "-h", "-t", "all", "-j", job, "-o", "%T"), "it does not end")
    assert "COMPLETED" in slurm.ask("squeue", "-h", "-t", "all", "-j", urgent.strip(), "-o", "%T")
    steps = [step for step, *_ in losses(tmp_path / "diary")]
    assert steps == list(range(1, STEPS + 1))  # none is lost, none is done twice
    assert {start for *_, start in losses(tmp_path / "diary")} == {"0", "1"}
    log = (run / f"logs/{job}-rank0.log").read_text()
    assert f"job {job} is requeued" in log
    assert "going on from" in log
    assert [(rank.state, rank.step) for rank in read(run)] == [("finished", STEPS)] * 2
    listed = lidit("runs")
    assert "finished" in listed
    assert f"{STEPS}/{STEPS}" in listed
    whole = recipe("whole", pace("whole"), max_steps=STEPS)
    here = ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(tmp_path / "alone")]
    assert main(["fit", "--config", str(whole), *here]) == 0
    for (step, loss, _), (same, expected, _) in zip(
        losses(tmp_path / "diary"), losses(tmp_path / "whole"), strict=True
    ):
        assert step == same
        assert loss == pytest.approx(expected, abs=2e-3)


def test_an_array_does_a_row_each_and_tells_what_failed_and_a_cancelled_one_stays_away(
    slurm, lidit, launch, until, recipe, pace, tmp_path: Path
) -> None:
    recipes = {
        "good": recipe("good", pace("good"), max_steps=3),
        "bad": recipe("bad", pace("bad", fail_rank=0), max_steps=3),
        "endless": recipe("endless", pace("endless"), max_steps=100_000),
    }
    rows = [f"lidit fit --config {path} --seed_everything 1" for path in recipes.values()]
    (tmp_path / "rows.txt").write_text("\n".join(["# the table", *rows, "", "score nowhere"]))
    job = launch("--rows", "rows.txt", "--name", "table", "--env", f"PYTHONPATH={tmp_path}:{Path.cwd()}")
    runs = [tmp_path / f"runs/table/{i}" for i in range(4)]
    assert [(run / "jobs").read_text() for run in runs] == [f"{job}_{i}\n" for i in range(4)]

    def states() -> dict[str, str]:
        listed = slurm.ask("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%i %T")
        return dict(line.split() for line in listed.splitlines())

    lidit("launch", "slurm", "--rows", "rows.txt", "--name", "table", code=1)  # while they are at work
    until(lambda: losses(tmp_path / "endless"), "the endless one does not train")
    slurm.ask("scancel", f"{job}_2")
    ends = {f"{job}_0": "COMPLETED", f"{job}_1": "FAILED", f"{job}_2": "CANCELLED", f"{job}_3": "FAILED"}
    until(lambda: states() == ends, "they do not end so")
    assert [step for step, *_ in losses(tmp_path / "good")] == [1, 2, 3]
    lines = {line.split()[0]: line for line in lidit("runs", "runs").splitlines()}
    words = [lines[f"runs/table/{i}"].split()[1] for i in range(4)]
    assert words == ["finished", "failed", "cancelled", "failed"]
    assert "rank 0 on " in lines["runs/table/1"]
    assert "ValueError: the disk of this rank is made of cheese" in lines["runs/table/1"]
    said = (tmp_path / f"runs/table/3/logs/{job}_3-rank0.log").read_text().strip().splitlines()
    assert lines["runs/table/3"].endswith(said[-1])  # libraries may have printed something before
    assert checkpoints_in(runs[2] / "checkpoints")  # told to stop, it saved
