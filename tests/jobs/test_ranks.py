"""A process knows its part, as given or as its launcher says."""

from __future__ import annotations

import pytest

from lidit.jobs.ranks import is_task, on_node, share

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_STEP_ID")
SLURM = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "2", "SLURM_NTASKS": "8"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4)),
        (SLURM | {"SLURM_STEP_ID": "0"}, (2, 8)),
        (SLURM | {"SLURM_PROCID": "0"}, (0, 1)),  # the job's script itself: it runs once, whatever it may start later
        (SLURM | {"SLURM_STEP_ID": "0", "RANK": "3", "WORLD_SIZE": "4"}, (3, 4)),  # torchrun within srun
        ({"RANK": "3"}, (0, 1)),
    ],
)
def test_the_launcher_says_which_part_is_ours(
    environment: dict, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert share() == expected
    assert share(1, 2) == (1, 2)


@pytest.mark.parametrize(("rank", "world"), [(0, None), (None, 2), (2, 2), (-1, 2), (0, 0)])
def test_a_rank_and_world_that_do_not_fit_are_refused(rank: int | None, world: int | None) -> None:
    with pytest.raises(ValueError, match="rank is .* and world is"):
        share(rank, world)


def test_the_script_of_a_job_is_alone_and_a_task_of_srun_knows_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    assert (is_task(), on_node()) == (False, None)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert (is_task(), on_node()) == (True, 1)
    monkeypatch.setenv("LOCAL_RANK", "3")  # torchrun within srun
    assert on_node() == 3
