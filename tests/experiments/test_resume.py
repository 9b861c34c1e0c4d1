from __future__ import annotations

from pathlib import Path

from experiments.resume import history, last_step, newest, table
from lidit.disk.folder import checkpoint_name


def log(folder: Path, start: str, text: str) -> None:
    (folder / start).mkdir(parents=True)
    (folder / start / "metrics.csv").write_text(f"epoch,step,train/loss,val/loss\n{text}")


def test_of_a_step_that_was_trained_twice_the_last_counts(tmp_path: Path) -> None:
    log(tmp_path, "log-1", "0,0,0.9,\n0,1,0.8,\n0,1,,0.7\n0,2,0.6,\n")
    log(tmp_path, "log-2", "0,2,0.5,\n0,3,0.4,\n0,3,,0.3\n")
    assert last_step(tmp_path) == 3
    assert history(tmp_path) == {"train/loss": {0: 0.9, 1: 0.8, 2: 0.5, 3: 0.4}, "val/loss": {1: 0.7, 3: 0.3}}
    assert history(tmp_path, ranks=2) == {"val/loss": {1: 0.7, 3: 0.3}}


def test_a_line_that_a_kill_cut_off_does_not_count(tmp_path: Path) -> None:
    log(tmp_path, "log-1", "0,0,0.9,\n0,1,")
    assert last_step(tmp_path) == 0


def test_the_newest_checkpoint_is_that_of_the_latest_step(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    for step in (10, 100, 20):
        (tmp_path / checkpoint_name(step)).touch()
    assert newest(tmp_path) == tmp_path / checkpoint_name(100)


def test_the_table_says_how_far_runs_are_apart() -> None:
    whole = {"train/loss": {0: 0.5, 1: 0.4}, "val/loss": {1: 0.30}}
    other = {"train/loss": {1: 0.4}, "val/loss": {1: 0.31}}
    lines = table({"uninterrupted": whole, "resumed": other, "on 2 ranks": {"val/loss": {1: 0.3}}}).splitlines()
    assert lines[2] == "| 2 | 0.3000000 | 0.3100000 | 0.3000000 |"
    assert lines[3] == "| largest difference of val/loss | 0 | 0.01 | 0 |"
    assert lines[4] == "| largest difference of train/loss | 0 | 0 |  |"
