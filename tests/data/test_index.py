"""Shards are read by offset, and whatever is wrong with one is said in one sentence."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.sources import scenes
from lidit.data.index import COLUMNS, ShardIndex, index_path, read_index, scan
from lidit.data.reader import Unreadable
from lidit.data.remote import Copies


def test_every_sample_is_read_back_as_it_was_drawn(shards: Path) -> None:
    index = ShardIndex(str(shards))
    for sample, width in ((0, 64), (17, 96), (59, 96)):
        (record,) = scenes(1, 0, width, 64, start=sample)
        assert index.key(sample) == record.key
        assert np.array_equal(index.image(sample), record.image)
        assert index.text(sample) == {"caption": record.caption, "dense": record.dense, "width": width, "height": 64}


def test_scanning_the_headers_gives_what_the_index_holds(shards: Path) -> None:
    tar = shards / "00002.tar"
    stored, scanned = read_index(tar), scan(tar)
    assert all(np.array_equal(stored[column], scanned[column]) for column in COLUMNS)


def test_a_folder_a_pattern_and_a_list_name_the_same_samples(shards: Path) -> None:
    folder = ShardIndex(str(shards))
    pattern = ShardIndex(f"{shards}/{{00000..00003}}.tar")
    listed = ShardIndex([f"{shards}/00000.tar", f"{shards}/{{00001..00003}}.tar"])
    assert folder.digest == pattern.digest == listed.digest


def test_the_digest_notices_another_shard(shards: Path) -> None:
    assert ShardIndex(f"{shards}/00000.tar").digest != ShardIndex(f"{shards}/00001.tar").digest


def test_a_missing_shard_is_named(shards: Path) -> None:
    with pytest.raises(FileNotFoundError, match="00004.tar is missing"):
        ShardIndex(f"{shards}/{{00000..00004}}.tar")


def test_a_shard_that_an_interrupted_run_did_not_write_is_named(shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shards, tmp_path / "copy")
    (folder / "00002.tar").unlink()
    with pytest.raises(FileNotFoundError, match="00002.tar is missing.*lidit prep shard"):
        ShardIndex(str(folder))


def test_an_empty_folder_is_said_to_be_empty(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no .tar shards"):
        ShardIndex(str(tmp_path))


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("keep", [0, 700, 10_240, 20_000])
def test_a_truncated_shard_is_named(shards: Path, tmp_path: Path, keep: int, indexed: bool) -> None:
    tar = tmp_path / "00000.tar"
    tar.write_bytes((shards / "00000.tar").read_bytes()[:keep])
    if indexed:
        shutil.copy(index_path(shards / "00000.tar"), index_path(tar))
    with pytest.raises(ValueError, match="00000.tar.*truncated"):
        ShardIndex(str(tar))


def test_a_shard_that_breaks_off_between_two_samples_is_named(shards: Path, tmp_path: Path) -> None:
    columns = scan(shards / "00000.tar")
    tar = tmp_path / "00000.tar"
    tar.write_bytes((shards / "00000.tar").read_bytes()[: columns["image_offset"][5] - 512])
    with pytest.raises(ValueError, match="00000.tar is truncated"):
        ShardIndex(str(tar))


def test_a_shard_that_shrinks_while_it_is_read_is_named(shards: Path, tmp_path: Path) -> None:
    index = ShardIndex(str(shutil.copytree(shards, tmp_path / "copy")))
    tar = tmp_path / "copy" / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    with pytest.raises(ValueError, match="00000.tar, sample 00000015: the shard is truncated"):
        index.text(15)


def test_an_index_that_belongs_to_another_tar_is_refused(shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shards, tmp_path / "copy")
    with (folder / "00000.tar").open("ab") as file:
        file.write(bytes(10_240))
    with pytest.raises(ValueError, match=r"delete .*00000.index.npz"):
        ShardIndex(str(folder))


def test_a_broken_index_is_named(shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shards, tmp_path / "copy")
    (folder / "00001.index.npz").write_bytes(b"PK nonsense")
    with pytest.raises(ValueError, match=r"00001.index.npz cannot be read"):
        ShardIndex(str(folder))


def test_an_index_with_a_pickle_in_it_is_refused(shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shards, tmp_path / "copy")
    columns = dict(read_index(folder / "00000.tar"))
    columns["key"] = np.array([{"any": "object"}] * 16, dtype=object)
    np.savez(index_path(folder / "00000.tar"), **columns, tar_bytes=(folder / "00000.tar").stat().st_size)
    with pytest.raises(ValueError, match=r"allow_pickle=False"):
        ShardIndex(str(folder))


def test_a_pipe_is_refused_unless_it_is_allowed(shards: Path, tmp_path: Path) -> None:
    command = f"pipe:touch {tmp_path}/ran; cat {shards}/00000.tar"
    with pytest.raises(ValueError, match="would run a command; set allow_commands"):
        ShardIndex(command)
    assert not (tmp_path / "ran").exists()
    index = ShardIndex(command, allow_commands=True)
    assert (tmp_path / "ran").exists()
    assert len(index) == 16
    assert index.text(3) == ShardIndex(f"{shards}/00000.tar").text(3)


def test_a_pipe_that_fails_is_named() -> None:
    with pytest.raises(ValueError, match="'exit 3'.* exit code 3"):
        ShardIndex("pipe:exit 3", allow_commands=True)


@pytest.mark.parametrize("url", ["ftp://host/0.tar", "file:///0.tar", "simplecache::http://host/0.tar"])
def test_an_unknown_kind_of_url_is_refused_even_where_commands_are_allowed(url: str) -> None:
    with pytest.raises(ValueError, match="shards are read from http://, https://, s3://, gs:// and local paths"):
        ShardIndex(url, allow_commands=True)


def write(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def picture(kind: str = "JPEG", size: tuple[int, int] = (32, 48)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind)
    return buffer.getvalue()


def text(caption: str = "a red field") -> bytes:
    return json.dumps({"caption": caption}).encode()


def test_a_strangers_shard_with_folders_jpegs_and_no_dense_captions_is_read(tmp_path: Path) -> None:
    members = {"./a.b/x.JPG": picture(), "./a.b/x.json": text("ein rotes Feld 🟥"), "./a.b/x.cls": b"7"}
    members |= {"y/1.webp": picture("WEBP"), "y/1.json": text()}
    index = ShardIndex(str(write(tmp_path / "x.tar", members)))
    assert [index.key(0), index.key(1)] == ["a.b/x", "y/1"]
    assert index.text(0)["caption"] == "ein rotes Feld 🟥"
    assert index.image(0).shape == (48, 32, 3)
    assert not index.column("dense_chars").any()


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"a.png": picture("PNG")}, "sample a has no text file"),
        ({"a.json": text()}, "sample a has no image file"),
        ({"a.png": picture("PNG"), "a.jpg": picture(), "a.json": text()}, "second image"),
        ({"a.png": picture("PNG"), "a.json": b"{"}, "cannot be read"),
        ({"a.png": picture("PNG"), "a.json": b"[]"}, 'has no "caption"'),
        ({"a.png": b"no image", "a.json": text()}, "cannot identify image file"),
    ],
)
def test_a_sample_that_is_not_whole_is_named(tmp_path: Path, members: dict[str, bytes], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ShardIndex(str(write(tmp_path / "x.tar", members)))


def test_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    tar = write(tmp_path / "x.tar", {"a.png": picture("PNG"), "a.json": text()}, "w:gz")
    with pytest.raises(ValueError, match="not an uncompressed tar"):
        ShardIndex(str(tar))


def test_an_image_that_breaks_off_is_named_with_its_sample(tmp_path: Path) -> None:
    data = picture(size=(300, 200))
    index = ShardIndex(str(write(tmp_path / "x.tar", {"a.jpg": data[: len(data) // 2], "a.json": text()})))
    with pytest.raises(ValueError, match="sample a: the image cannot be decoded"):
        index.image(0)


def test_a_copy_for_a_worker_reads_the_same(shards: Path) -> None:
    index = ShardIndex(str(shards))
    before = index.text(20)
    assert pickle.loads(pickle.dumps(index)).text(20) == before


def test_more_shards_than_may_be_open_are_read(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lidit.data.reader.MAX_OPEN", 2)
    index = ShardIndex(str(shards))
    assert [index.text(sample)["width"] for sample in (0, 17, 35, 59, 0)] == [64, 96, 96, 96, 64]


def test_the_digest_is_the_one_that_caches_and_checkpoints_hold(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ShardIndex(str(shards))
    whole = hashlib.sha256("\n".join(path.name for path in index.paths).encode())
    for column in COLUMNS:
        values = index.column(column)
        whole.update(b"\n".join(values.tolist()) if column == "key" else values.astype("<i8").tobytes())
    for piece in (7, 20, 60, 100_000):  # of 60 samples
        monkeypatch.setattr("lidit.data.columns.PIECE", piece)
        assert ShardIndex(str(shards)).digest == whole.hexdigest()[:16]


def test_the_columns_of_all_shards_are_kept_as_one_and_noticed_when_a_shard_changes(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, copies = shutil.copytree(shards, tmp_path / "copy"), Copies(str(tmp_path / "kept"), 1)
    plain, first = ShardIndex(str(folder)), ShardIndex(str(folder), copies=copies)
    with monkeypatch.context() as patch:
        patch.setattr("lidit.data.columns.read_index", None)  # no index is read again
        second = ShardIndex(str(folder), copies=copies)
    for index in (first, second, pickle.loads(pickle.dumps(second))):
        assert index.digest == plain.digest
        assert all(np.array_equal(index.column(column), plain.column(column)) for column in COLUMNS)
        assert index.text(20) == plain.text(20)
    assert len(pickle.dumps(second)) < 3000  # mapped anew, not sent to every worker
    shutil.copy(shards / "00001.tar", folder / "00003.tar")
    shutil.copy(index_path(shards / "00001.tar"), index_path(folder / "00003.tar"))
    assert ShardIndex(str(folder), copies=copies).digest == ShardIndex(str(folder)).digest != plain.digest


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_shard_that_went_bad_does_not_keep_a_run_from_resuming_where_that_is_allowed(
    shards: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(shards, tmp_path / "copy")
    tar = folder / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    if damage == "missing":
        tar.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=f"00001.tar is {damage}"):
        ShardIndex(str(folder))
    index = ShardIndex(str(folder), strict=False)
    assert "00001.tar is missing or truncated" in caplog.text
    assert index.digest == ShardIndex(str(shards)).digest  # the order of the run that goes on
    assert index.text(0)["caption"]
    with pytest.raises(Unreadable, match="00001.tar"):
        index.image(31)


def test_a_missing_shard_without_an_index_is_refused_always(shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shards, tmp_path / "copy")
    (folder / "00001.tar").unlink()
    index_path(folder / "00001.tar").unlink()
    with pytest.raises(FileNotFoundError, match="00001.tar is missing"):
        ShardIndex(str(folder), strict=False)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_whatever_is_wrong_with_an_image_is_said_with_its_sample(tmp_path: Path, kind: str) -> None:
    rng, good = np.random.default_rng(0), picture(kind)
    index = ShardIndex(str(write(tmp_path / "x.tar", {"a.png": good, "a.json": text()})))
    broken = 0
    for _ in range(150):
        data = bytearray(good[: rng.integers(len(good) // 2, len(good))] if rng.random() < 0.3 else good)
        for place in rng.integers(0, len(data), 4):
            data[place] = rng.integers(256)
        index._bytes = lambda *_, data=data: bytes(data)
        try:
            index.image(0)
        except Unreadable:  # any other error would be a traceback in the middle of a run
            broken += 1
    assert broken > 20


def test_an_image_of_another_size_than_its_index_says_is_refused(tmp_path: Path) -> None:
    index = ShardIndex(str(write(tmp_path / "x.tar", {"a.png": picture("PNG"), "a.json": text()})))
    index.column("width")[0] = 40
    with pytest.raises(Unreadable, match=r"sample a: the image has \(48, 32\) pixels, its index says \(48, 40\)"):
        index.image(0)


def test_a_name_in_latin_1_does_not_stop_a_scan(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for name, data in {"grün.png": picture("PNG"), "grün.json": text()}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert ShardIndex(str(tmp_path / "x.tar")).key(0) == "gr\ufffdn"
