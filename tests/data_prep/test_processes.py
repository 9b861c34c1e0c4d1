"""Processes that share a folder: each knows its part, and all agree on how it was begun."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from data_prep.processes import begin, own_device
from lidit.disk.whole import replacing


def test_each_process_of_a_node_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert own_device("cuda") == "cuda"
    monkeypatch.setenv("SLURM_LOCALID", "3")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert (own_device("cuda"), own_device("cpu"), own_device("cuda:1")) == ("cuda:3", "cpu", "cuda:1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)  # Slurm shows each task its own one
    assert own_device("cuda") == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert own_device("cuda") == "cuda:1"


def together(count: int, folder: Path, made: list[dict]) -> list[Exception | None]:
    """What each of `count` threads got that begin a folder at the same moment."""
    barrier = Barrier(count)

    def run(i: int) -> Exception | None:
        barrier.wait()
        try:
            begin(folder, "made.json", made[i % len(made)], {"more": 1}, "fix it")
            with replacing(folder / f"{i}.txt") as partial:
                partial.write_text("done")
        except ValueError as error:
            return error
        return None

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_processes_that_begin_at_once_agree(tmp_path: Path) -> None:
    for trial in range(20):
        folder = tmp_path / str(trial)
        assert together(8, folder, [{"seed": 0}]) == [None] * 8
        assert sorted(file.name for file in folder.iterdir()) == [*(f"{i}.txt" for i in range(8)), "made.json"]
        assert json.loads((folder / "made.json").read_text()) == {"seed": 0, "more": 1}


def test_of_processes_that_begin_otherwise_at_once_one_kind_is_refused(tmp_path: Path) -> None:
    for trial in range(20):
        errors = together(8, tmp_path / str(trial), [{"seed": 0}, {"seed": 1}])
        kept = json.loads((tmp_path / str(trial) / "made.json").read_text())["seed"]
        assert [error is None for error in errors] == [i % 2 == kept for i in range(8)]
        assert all("holds other data: seed was" in str(error) for error in errors if error)


def test_a_file_system_without_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*paths: Path) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refused)
    begin(tmp_path / "f", "made.json", {"seed": 0}, {}, "fix it")
    begin(tmp_path / "f", "made.json", {"seed": 0}, {}, "fix it")
    assert [file.name for file in (tmp_path / "f").iterdir()] == ["made.json"]


def test_a_strangers_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="was not begun by this command; fix it"):
        begin(tmp_path, "made.json", {}, {}, "fix it")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_killed_beginning_is_no_stranger(tmp_path: Path) -> None:
    (tmp_path / ".made.json.0123abcd.partial").write_text("{")
    begin(tmp_path, "made.json", {"seed": 0}, {}, "fix it")
    assert json.loads((tmp_path / "made.json").read_text()) == {"seed": 0}
