"""A run's folder is read as it is: growing, resumed, crashed, or of another version."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import lidit
from lidit.jobs import state
from lidit.run import Run


def logged(run: Path, version: int, *lines: str) -> Path:
    folder = run / f"version_{version}"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("".join(lines))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Started twice: the second start went on from step 4."""
    folder = tmp_path / "run"
    first = logged(
        folder, 0, "epoch,step,train/loss,val/loss\n", "0,1,0.9,\n", "0,3,0.7,\n", "0,3,,0.8\n", "0,5,0.5,\n"
    )
    second = logged(folder, 1, "epoch,step,train/loss,throughput/images_per_second\n", "0,4,0.6,\n", ",4,,120.5\n")
    for start, step in ((first, 2), (first, 4), (second, 6)):
        (start / "judged").mkdir(exist_ok=True)
        (start / f"judged/step-{step:06d}.png").touch()
    (second / "config.yaml").write_text("seed_everything: 3\n")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/step-00000004.ckpt").touch()
    state.write(folder, state.State(0, "a", state.FINISHED, step=6, max_steps=6, loss=0.4))
    return folder


def test_metrics_have_one_row_a_step_and_what_was_done_again_counts_once(run: Path) -> None:
    metrics = Run(run).metrics
    assert metrics["train/loss"].dropna().to_dict() == {1: 0.9, 3: 0.7, 4: 0.6}
    assert metrics["val/loss"].dropna().to_dict() == {3: 0.8}
    assert metrics["throughput/images_per_second"].dropna().to_dict() == {4: 120.5}
    assert metrics.index.name == "step"


def test_it_says_what_became_of_it_and_what_is_there(run: Path) -> None:
    opened = lidit.Run(run)
    assert (opened.state, opened.step, opened.config) == ("finished", 6, {"seed_everything": 3})
    assert list(opened.images()) == list(opened.images("judged")) == [2, 4, 6]
    assert opened.images("samples") == {}
    assert list(opened.checkpoints) == [4]
    assert opened.record == {}
    assert repr(opened) == f"Run('{run}'): finished, step 6"


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    logged(tmp_path, 0, "epoch,step,train/loss\n", "0,1,0.9\n", "0,2,0.")
    assert Run(tmp_path).metrics["train/loss"].to_dict() == {1: 0.9}


def test_a_start_whose_first_line_is_being_written_takes_nothing_back(tmp_path: Path) -> None:
    logged(tmp_path, 0, "epoch,step,train/loss\n", "0,1,0.9\n", "0,,0.8\n")
    logged(tmp_path, 1, "epoch,step,train/loss\n", "0,9,0.")
    assert Run(tmp_path).metrics["train/loss"].to_dict() == {1: 0.9}


def test_a_start_from_an_older_checkpoint_replaces_all_that_came_after(tmp_path: Path) -> None:
    logged(tmp_path, 0, "step,train/loss,val/loss\n", *(f"{step},0.9,1\n" for step in range(1, 9)))
    logged(tmp_path, 1, "step,train/loss\n", *(f"{step},0.8\n" for step in range(7, 10)))
    logged(tmp_path, 2, "step,train/loss\n", "4,0.7\n", "5,0.6\n")
    metrics = Run(tmp_path).metrics
    assert metrics["train/loss"].to_dict() == {1: 0.9, 2: 0.9, 3: 0.9, 4: 0.7, 5: 0.6}
    assert list(metrics["val/loss"].dropna().index) == [1, 2, 3]


def test_what_lidit_validate_logged_is_no_start_at_step_0(run: Path) -> None:
    before = Run(run).metrics
    logged(run, 2, "epoch,step,val/loss\n", "0,0,0.3\n")
    pd.testing.assert_frame_equal(Run(run).metrics, before)


def test_of_a_step_that_was_drawn_again_the_newer_picture_is_taken(run: Path) -> None:
    for version in (2, 10):
        (run / f"version_{version}" / "judged").mkdir(parents=True)
        (run / f"version_{version}" / "judged" / "step-000006.png").touch()
    assert Run(run).images()[6].parts[-3] == "version_10"


def test_a_run_that_waits_in_the_queue_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs").write_text("7\n")
    monkeypatch.setattr("lidit.jobs.slurm.states", lambda jobs: dict.fromkeys(jobs, "PENDING"))
    assert Run(tmp_path).state == "queued"


def test_a_run_that_has_logged_nothing_yet_is_empty_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "version_0").mkdir()
    opened = Run(tmp_path)
    assert opened.metrics.equals(pd.DataFrame(index=pd.Index([], name="step")))
    assert opened.images() == opened.checkpoints == {}
    with pytest.raises(ValueError, match=r"has no config.yaml: it stopped before training began"):
        _ = opened.config


def test_a_crash_is_told_with_its_reason(run: Path) -> None:
    state.write(run, state.State(0, "b", state.FAILED, step=5, error="ValueError: loss is nan"))
    assert Run(run).state == "failed"
    assert "loss is nan" in Run(run).error


def test_what_is_no_run_is_refused_with_where_one_is(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder .*; `lidit runs` lists"):
        Run(tmp_path / "nothing")
    with pytest.raises(ValueError, match=f"is no run of lidit: .*; {run} in it is one"):
        Run(tmp_path)


def test_another_versions_log_is_named(tmp_path: Path) -> None:
    logged(tmp_path, 0, "iteration,loss\n", "1,0.9\n")
    with pytest.raises(ValueError, match="no log of this version of lidit; it has iteration, loss"):
        _ = Run(tmp_path).metrics


def test_a_step_without_a_checkpoint_is_answered_with_those_there_are(run: Path) -> None:
    with pytest.raises(ValueError, match="has no checkpoint of step 5; there are those of steps 4"):
        Run(run).pipeline(5)


def test_a_checkpoint_is_opened_to_draw(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "version_0").mkdir()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step-00000002.ckpt").symlink_to(tiny_checkpoint.resolve())
    (image,) = Run(tmp_path).pipeline()(["a red circle"], [0], size=(32, 32), steps=1)
    assert image.shape == (32, 32, 3)


def test_nothing_else_is_found_in_the_package() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Walk'"):
        _ = lidit.Walk  # type: ignore[attr-defined]
