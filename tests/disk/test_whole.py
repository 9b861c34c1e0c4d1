"""What is written is whole or not there, whoever else writes it, and nothing temporary stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from lidit.disk.whole import is_partial, partial, remove, replacing, write_first, write_text


def test_a_file_is_there_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"

    def interrupted() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_goes_with_the_finished_file(tmp_path: Path) -> None:
    for name in (".a.tar.0123abcd.partial", ".b.tar.0123abcd.partial"):
        (tmp_path / name).write_text("half")
    with replacing(tmp_path / "a.tar") as partial:
        partial.write_text("whole")
    assert sorted(file.name for file in tmp_path.iterdir()) == [".b.tar.0123abcd.partial", "a.tar"]


def test_two_processes_that_write_the_same_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with replacing(path) as slow:
        slow.write_text("slow")
        with replacing(path) as fast:
            fast.write_text("fast")
        assert path.read_text() == "fast"
    assert path.read_text() in ("slow", "fast")
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a.tar"):
        pass


def test_an_error_leaves_what_was_there_before(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "before")

    def failing() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        failing()
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_is_published_whole_and_never_over_another(tmp_path: Path) -> None:
    def write(content: str) -> None:
        with replacing(tmp_path / "new" / "model") as folder:
            folder.mkdir()
            (folder / "a.txt").write_text(content)

    write("first")
    with pytest.raises(OSError, match="model"):
        write("second")
    assert (tmp_path / "new/model/a.txt").read_text() == "first"
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["model"]


def test_temporary_files_of_a_longer_name_are_left_alone(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.tar.index") as index:
        index.write_text("x")
        write_text(tmp_path / "a.tar", "y")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tar", "a.tar.index"]


def test_of_two_that_write_first_the_first_stays(tmp_path: Path) -> None:
    write_first(tmp_path / "a", "one")
    write_first(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "one"
    assert len(list(tmp_path.iterdir())) == 1


def test_removing_takes_files_folders_and_links_but_not_what_links_lead_to(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a").touch()
    (tmp_path / "link").symlink_to("folder")
    remove(tmp_path / "link")
    assert (tmp_path / "folder/a").exists()
    for name in ("folder", "nothing"):
        remove(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_name_is_known_as_one() -> None:
    path = Path("runs/step-1.ckpt")
    assert is_partial(partial(path))
    assert is_partial(partial(path, "0123abcd"))
    assert partial(path).parent == path.parent
    assert not is_partial(path)
