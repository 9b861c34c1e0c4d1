"""The shard writer: same bytes for the same arguments, nothing half-written, nothing mixed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.shard import parse_size, shard, write_tar
from data_prep.sources import Record, scenes
from lidit.data.index import ShardIndex


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write(folder: Path, **changes: object) -> Path:
    shard(str(folder), **{"count": 25, "sizes": ("32x32", "48x32"), "shard_size": 10, "workers": 1} | changes)
    return folder


def test_the_same_arguments_give_the_same_bytes_with_one_process_or_two(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two", workers=2)
    assert contents(one) == contents(two)
    assert list(contents(one)) == [
        *("00000.index.npz", "00000.tar", "00001.index.npz", "00001.tar", "00002.index.npz", "00002.tar", "shards.json")
    ]


def test_the_size_of_a_shard_does_not_change_the_samples(tmp_path: Path) -> None:
    few, many = ShardIndex(str(write(tmp_path / "few"))), ShardIndex(str(write(tmp_path / "many", shard_size=7)))
    assert [few.text(s) for s in range(25)] == [many.text(s) for s in range(25)]


def test_running_again_writes_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "s")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    write(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("damage", ["00001.tar", "00001.index.npz"])
def test_running_again_writes_what_is_missing_and_nothing_else(tmp_path: Path, damage: str) -> None:
    folder = write(tmp_path / "s")
    before, kept = contents(folder), (folder / "00000.tar").stat().st_mtime_ns
    (folder / damage).unlink()
    write(folder)
    assert contents(folder) == before
    assert (folder / "00000.tar").stat().st_mtime_ns == kept


def test_running_again_mends_a_truncated_shard(tmp_path: Path) -> None:
    folder = write(tmp_path / "s")
    before = contents(folder)
    (folder / "00002.tar").write_bytes(before["00002.tar"][:3000])
    write(folder)
    assert contents(folder) == before


@pytest.mark.parametrize("change", [{"count": 26}, {"seed": 1}, {"sizes": ("32x32",)}, {"held": True}])
def test_a_folder_with_other_data_is_refused_with_the_difference(tmp_path: Path, change: dict) -> None:
    folder = write(tmp_path / "s")
    before = contents(folder)
    with pytest.raises(ValueError, match=f"holds other data: {next(iter(change))} is .* there and .* here"):
        write(folder, **change)
    assert contents(folder) == before


def test_a_folder_that_is_not_ours_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="was not begun by this command"):
        write(tmp_path)
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_an_interrupted_shard_leaves_nothing_behind(tmp_path: Path) -> None:
    def breaking() -> Iterator[Record]:
        yield from scenes(3, 0, 32, 32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tar(tmp_path / "00000.tar", breaking())
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking(count: int, seed: int, width: int, height: int, held: bool, start: int = 0) -> Iterator[Record]:
        if start == 15:
            raise OSError("the disk is full")
        return scenes(count, seed, width, height, held, start)

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules["data_prep.shard"].SOURCES, "scenes", breaking)
        with pytest.raises(OSError, match="disk is full"):
            write(tmp_path / "s")
    assert sorted(contents(tmp_path / "s")) == ["00000.index.npz", "00000.tar", "shards.json"]
    assert contents(write(tmp_path / "s")) == contents(write(tmp_path / "whole"))


def test_a_killed_run_leaves_only_whole_shards(tmp_path: Path) -> None:
    code = "import sys; from data_prep.shard import shard; shard(sys.argv[1], count=4000, shard_size=40, workers=1)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "s")], stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if "shard 2 of" in line:
                run.kill()
    tars = sorted((tmp_path / "s").glob("*.tar"))
    assert 2 <= len(tars) < 100
    assert len(ShardIndex([str(tar) for tar in tars])) == 40 * len(tars)


def test_progress_is_a_line_a_shard_with_the_time_left(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path / "s")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all("s left" in line for line in lines[1:])


def test_records_of_a_seed_do_not_depend_on_how_many_are_drawn() -> None:
    (last,) = scenes(1, 5, 32, 32, start=9)
    assert list(scenes(10, 5, 32, 32))[9].caption == last.caption
    assert [r.dense for r in scenes(4, 5, 32, 32)] != [r.dense for r in scenes(4, 6, 32, 32)]


def test_sizes_go_round(tmp_path: Path) -> None:
    index = ShardIndex(str(write(tmp_path / "s")))
    assert index.column("width").tolist() == [32, 48] * 12 + [32]


@pytest.mark.parametrize("size", ["64", "64x", "x64", "64*64", "6.4x64", "-64x64"])
def test_a_size_of_another_form_is_refused(size: str) -> None:
    with pytest.raises(ValueError, match="WIDTHxHEIGHT"):
        parse_size(size)


@pytest.mark.parametrize(
    "change", [{"count": 0}, {"shard_size": 0}, {"workers": 0}, {"sizes": ("16x64",)}, {"sizes": ()}]
)
def test_bad_arguments_leave_nothing_behind(tmp_path: Path, change: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))} is 0|not 16x64"):
        write(tmp_path / "s", **change)
    assert not (tmp_path / "s").exists()


def test_the_script_says_what_is_wrong_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_prep.shard", "--out", str(tmp_path / "s"), "--sizes", "[64x]"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.splitlines() == ["error: size '64x' is not of the form WIDTHxHEIGHT, for example 96x64"]


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    folder = write(tmp_path / "s")
    samples = list(webdataset.WebDataset(f"{folder}/{{00000..00002}}.tar", shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == [f"{i:08d}" for i in range(25)]
    assert samples[1]["png"].size == (48, 32)
    assert samples[1]["json"] == ShardIndex(str(folder)).text(1)


def test_writing_shards_imports_no_torch() -> None:
    code = "import sys, data_prep.shard; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_manifest_says_how_the_folder_was_made(tmp_path: Path) -> None:
    manifest = json.loads((write(tmp_path / "s") / "shards.json").read_text())
    assert (manifest["source"], manifest["count"], manifest["seed"]) == ("scenes", 25, 0)
    assert manifest["tars"] == ["00000.tar", "00001.tar", "00002.tar"]
