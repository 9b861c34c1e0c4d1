"""Names in a run's folder: those who write them and those who read them mean the same."""

from __future__ import annotations

from pathlib import Path

from lidit.disk.folder import checkpoint_name, checkpoints_in, picture_name, pictures_in, starts, step_of


def test_names_say_their_step_and_are_found_again(tmp_path: Path) -> None:
    for step in (20, 100, 3):
        (tmp_path / checkpoint_name(step)).touch()
        (tmp_path / picture_name(step)).touch()
    (tmp_path / "latest").symlink_to(checkpoint_name(100))
    assert [step_of(path) for path in checkpoints_in(tmp_path)] == [100, 20, 3]
    assert [step_of(path) for path in pictures_in(tmp_path)] == [3, 20, 100]


def test_pictures_of_more_steps_than_a_name_has_room_for_stay_in_order(tmp_path: Path) -> None:
    for step in (1_500_000, 2_000, 999_999):
        (tmp_path / picture_name(step)).touch()
    assert [step_of(path) for path in pictures_in(tmp_path)] == [2_000, 999_999, 1_500_000]


def test_starts_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("version_10", "version_2", "version_old", "state"):
        (tmp_path / name).mkdir()
    assert [path.name for path in starts(tmp_path)] == ["version_2", "version_10"]
