"""What is wrong with a shard is found and named, and a good shard is called good."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.check import check, check_shard
from lidit.data.index import index_path, scan


def picture(size: tuple[int, int] = (32, 48)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def text(caption: object = "a red field", **more: object) -> bytes:
    return json.dumps({"caption": caption, **more}).encode()


def write(tar: Path, members: dict[str, bytes], index: bool = True) -> Path:
    with tarfile.open(tar, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    if index:
        np.savez(index_path(tar), **scan(tar), tar_bytes=tar.stat().st_size)
    return tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three good shards of three samples; the last one has no index and no synthetic captions."""
    out = tmp_path / "shards"
    out.mkdir()
    for shard in range(3):
        members = {}
        for i in range(3):
            members[f"{shard}{i}.png"] = picture()
            members[f"{shard}{i}.json"] = text(dense="") if shard == 2 else text("ein Feld 🟥", dense="words")
        write(out / f"{shard}.tar", members, index=shard < 2)
    return out


def change(tar: Path, old: bytes, new: bytes) -> None:
    """Damage that leaves the size as it was."""
    data = tar.read_bytes()
    assert len(old) == len(new)
    assert old in data
    tar.write_bytes(data.replace(old, new, 1))


def change_index(tar: Path, column: str, value: int) -> None:
    with np.load(index_path(tar)) as stored:
        columns = dict(stored)
    columns[column][1] = value
    np.savez(index_path(tar), **columns)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_good_shards_are_called_good(folder: Path, capsys: pytest.CaptureFixture, workers: int) -> None:
    check(str(folder), workers=workers)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [f"{folder}/{i}.tar: 3 samples, good; {i + 1} of 3" for i in range(3)]
    assert lines[3:] == ["3 shards, 2 with an index: 3 good, 0 bad; 9 samples, 6 with a synthetic caption; problems: 0"]


def test_shards_that_lidit_writes_are_good(shards: Path, capsys: pytest.CaptureFixture) -> None:
    check(str(shards), workers=1)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("3 shards, 3 with an index: 3 good, 0 bad; 24 samples, ")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda tar: tar.unlink(), "it is missing"),
    "truncated": (lambda tar: tar.write_bytes(tar.read_bytes()[:5000]), "it is truncated: 5000 bytes"),
    "longer": (lambda tar: tar.write_bytes(tar.read_bytes() + bytes(10240)), "it is not the one that was indexed"),
    "pixels": (lambda tar: change(tar, picture()[60:80], bytes(20)), "sample 10: the image cannot be decoded"),
    "no image": (lambda tar: change(tar, picture()[:8], bytes(8)), "sample 10: the image cannot be decoded"),
    "not UTF-8": (lambda tar: change(tar, b"\\ud83d\\udfe5", b"\xff" * 12), "sample 10: the JSON cannot be read"),
    "half a letter": (
        lambda tar: change(tar, b"\\ud83d\\udfe5", b"\\ud83d......"),
        "sample 10: its caption is not valid",
    ),
    "no JSON": (lambda tar: change(tar, b'{"caption"', b'["caption"'), "sample 10: the JSON cannot be read"),
    "no caption": (lambda tar: change(tar, b'"caption"', b'"Caption"'), 'sample 10: the JSON has no "caption"'),
    "blank caption": (
        lambda tar: change(tar, b"ein Feld \\ud83d\\udfe5", b" " * 21),
        "sample 10: its caption holds no word",
    ),
    "dense caption": (lambda tar: change(tar, b'"words"', b'["abc"]'), "sample 10: its dense is not a text"),
    "index of width": (
        lambda tar: change_index(tar, "width", 33),
        "wrong about width of 1 samples; for 11 it says 33, the tar says 32",
    ),
    "size of image": (lambda tar: change_index(tar, "width", 33), "sample 11: the image has (48, 32) pixels"),
    "index of place": (lambda tar: change_index(tar, "text_offset", 0), "wrong about text_offset of 1 samples"),
    "index of text": (lambda tar: change_index(tar, "caption_chars", 3), "wrong about caption_chars of 1 samples"),
    "index": (lambda tar: index_path(tar).write_bytes(b"PK nonsense"), "1.index.npz cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_shard_is_named_with_what_is_wrong(folder: Path, capsys: pytest.CaptureFixture, damage: str) -> None:
    spoil, reason = DAMAGE[damage]
    (folder / "shards.json").write_text('{"tars": ["0.tar", "1.tar", "2.tar"]}')
    spoil(folder / "1.tar")
    with pytest.raises(ValueError, match=rf"1 of 3 shards are bad: {folder}/1.tar; delete each"):
        check(str(folder), workers=1)
    out = capsys.readouterr().out
    assert f"\n{folder}/1.tar:\n" in out
    assert reason in out.partition(f"\n{folder}/1.tar:\n")[2]
    assert "2 good, 1 bad" in out


def test_an_index_of_other_samples_is_found(folder: Path) -> None:
    with np.load(index_path(folder / "1.tar")) as stored:
        columns = {name: values if name == "tar_bytes" else values[:2] for name, values in stored.items()}
    np.savez(index_path(folder / "1.tar"), **columns)
    assert check_shard(folder / "1.tar").problems == ["its index lists 2 samples and the tar holds 3"]


def test_every_bad_sample_is_named(folder: Path) -> None:
    tar = folder / "1.tar"
    data = tar.read_bytes()
    tar.write_bytes(data.replace(picture()[60:80], bytes(20)))
    assert [problem.partition(":")[0] for problem in check_shard(tar).problems] == [
        "sample 10",
        "sample 11",
        "sample 12",
    ]


def test_keys_that_two_shards_share_are_found(folder: Path, capsys: pytest.CaptureFixture) -> None:
    write(folder / "3.tar", {"01.png": picture(), "01.json": text(), "9.png": picture(), "9.json": text()})
    with pytest.raises(ValueError, match=rf"1 of 4 shards are bad: {folder}/3.tar;"):
        check(str(folder), workers=1)
    assert f"{folder}/3.tar:\n  sample 01: its key is in {folder}/0.tar too\n" in capsys.readouterr().out


def test_a_key_of_bytes_that_are_no_text_is_found(tmp_path: Path) -> None:
    tar = write(tmp_path / "0.tar", {"caf\udce9.png": picture(), "caf\udce9.json": text()})
    assert check_shard(tar).problems == ["sample caf\ufffd: its key is not UTF-8"]


def test_of_many_problems_some_are_shown(folder: Path, capsys: pytest.CaptureFixture) -> None:
    tar = folder / "1.tar"
    tar.write_bytes(tar.read_bytes().replace(picture()[60:80], bytes(20)))
    with pytest.raises(ValueError, match="shards are bad"):
        check(str(folder), workers=1, shown=1)
    out = capsys.readouterr().out
    assert ("sample 10:" in out, "sample 11:" in out, "  and 2 more" in out) == (True, False, True)


def test_all_bad_shards_are_listed(folder: Path) -> None:
    for name in ("0.tar", "2.tar"):
        (folder / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=rf"2 of 3 shards are bad: {folder}/0.tar, {folder}/2.tar;"):
        check(f"{folder}/{{0..2}}.tar", workers=1)


def test_a_shard_without_samples_is_good(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path / "0.tar", {})
    check(str(tmp_path), workers=1)
    assert capsys.readouterr().out.startswith(f"{tmp_path}/0.tar: 0 samples, good; 1 of 1\n")


def test_what_is_no_set_of_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no .tar shards"):
        check(str(tmp_path))
    with pytest.raises(ValueError, match="is remote"):
        check("s3://bucket/shards")
    with pytest.raises(ValueError, match="workers is 0"):
        check(str(tmp_path), workers=0)


def test_the_script_exits_with_1_and_the_list(folder: Path) -> None:
    shutil.copy(folder / "0.tar", folder / "4.tar")
    command = [sys.executable, "-m", "data_prep.check", "--shards", str(folder), "--workers", "1"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith(f"error: 1 of 4 shards are bad: {folder}/4.tar; ")
    assert "Traceback" not in run.stderr
