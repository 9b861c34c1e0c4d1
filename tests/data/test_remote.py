"""Remote shards are read as local ones are, from copies that stay within their room, and through failures."""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lidit.data.datamodule import ShardData
from lidit.data.index import ShardIndex, index_path
from lidit.data.reader import Unreadable
from lidit.data.remote import Copies, Url, read
from tests.data.conftest import Server

ALL = 10**9


def tars(folder: Path) -> list[str]:
    """Copies in a folder, by their names, the one opened longest ago first."""
    found = sorted(folder.glob("*-*.tar"), key=lambda path: path.stat().st_mtime_ns)
    return [path.name.partition("-")[2] for path in found]


def size(shards: Path, name: str) -> int:
    return (shards / name).stat().st_size


@pytest.mark.parametrize("pattern", ["", "/", "/{00000..00003}.tar"])
def test_a_remote_set_is_the_local_one(server: Server, shards: Path, tmp_path: Path, pattern: str) -> None:
    local, remote = ShardIndex(str(shards)), ShardIndex(server.url + pattern, copies=Copies(str(tmp_path), ALL))
    assert remote.digest == local.digest
    assert not any(name.endswith(".tar") for name in server.asked)  # only indices so far
    for sample in (0, 17, 59):
        assert np.array_equal(remote.image(sample), local.image(sample))
        assert remote.text(sample) == local.text(sample)
    assert {name: n for name, n in server.asked.items() if name.endswith(".tar")} == dict.fromkeys(tars(tmp_path), 1)


def test_a_folder_without_a_manifest_is_listed(shards: Path, tmp_path: Path, server: Server) -> None:
    server.fail, server.how = {"shards.json": 9}, 404
    assert len(ShardIndex(server.url, copies=Copies(str(tmp_path), ALL)).paths) == 4


def test_a_remote_folder_without_shards_is_said_to_have_none(tmp_path: Path, server: Server) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither a shards.json nor .tar shards; name them as"):
        ShardIndex(f"{server.url}/nothing", copies=Copies(str(tmp_path), ALL))


def test_a_shard_without_an_index_is_scanned_and_need_not_be_fetched_again(
    server: Server, shards: Path, tmp_path: Path
) -> None:
    server.fail, server.how = {"00001.index.npz": 9}, 404
    copies = Copies(str(tmp_path), ALL)
    index = ShardIndex(f"{server.url}/00001.tar", copies=copies)
    assert index.digest == ShardIndex(f"{shards}/00001.tar").digest
    assert index.text(3) == ShardIndex(f"{shards}/00001.tar").text(3)
    assert ShardIndex(f"{server.url}/00001.tar", copies=copies).text(3) == index.text(3)
    assert server.asked["00001.tar"] == 1


def test_the_next_start_asks_the_server_for_nothing_but_the_list(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        index = ShardIndex(server.url, copies=Copies(str(tmp_path), ALL))
        index.text(0)
    assert server.asked == {"shards.json": 2, "00000.tar": 1, **{f"0000{i}.index.npz": 1 for i in range(4)}}


def test_copies_stay_within_their_room_and_the_one_opened_longest_ago_goes(
    server: Server, shards: Path, tmp_path: Path
) -> None:
    room = size(shards, "00000.tar") + size(shards, "00001.tar") + size(shards, "00002.tar")
    copies = Copies(str(tmp_path), room)
    (tmp_path / "thesis.tar").write_bytes(bytes(10 * room))  # not ours: neither counted nor removed
    for turn in (0, 1, 2, 0, 3):  # a new process each time
        ShardIndex(server.url, copies=copies).text(16 * turn)
    kept = [name for name in tars(tmp_path) if name.startswith("0")]
    assert kept == ["00002.tar", "00000.tar", "00003.tar"]
    assert sum(size(shards, name) for name in kept) <= room
    assert (tmp_path / "thesis.tar").exists()


def test_a_copy_that_goes_while_it_is_read_is_read_on_and_then_let_go(
    server: Server, shards: Path, tmp_path: Path
) -> None:
    copies = Copies(str(tmp_path), max(size(shards, f"0000{i}.tar") for i in range(4)))
    first, second = (ShardIndex(server.url, copies=copies) for _ in range(2))
    first.text(0)
    second.text(17)
    assert tars(tmp_path) == ["00001.tar"]
    assert first.text(1) == ShardIndex(str(shards)).text(1)
    assert server.asked["00000.tar"] == 1
    first.text(40)  # opening another one closes it: its room is free at last
    assert 0 not in first._reader._files
    first.text(1)
    assert server.asked["00000.tar"] == 2


def test_a_shard_that_can_never_fit_is_refused(server: Server, tmp_path: Path) -> None:
    index = ShardIndex(server.url, copies=Copies(str(tmp_path), 1000))
    with pytest.raises(ValueError, match="does not fit into .*; raise shard_cache_gb"):
        index.text(0)


def test_a_room_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="limit of .* is 0 bytes"):
        Copies(str(tmp_path), 0)


class FullDisk:
    """A file system that can be read, but there is no room for what is read."""

    def get_file(self, *_: object) -> None:
        raise OSError(28, "No space left on device")


def test_a_full_disk_stops_the_run_with_its_name(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = ShardIndex(server.url, copies=Copies(str(tmp_path), ALL))
    monkeypatch.setattr("lidit.data.remote.file_system", lambda url: (FullDisk(), url))
    with pytest.raises(ValueError, match=r"the disk of .* is full; lower shard_cache_gb") as caught:
        index.text(0)
    assert not isinstance(caught.value, Unreadable)  # skipping would not help


def read_all(url: str, folder: str, room: int, seen: multiprocessing.Queue) -> None:
    index = ShardIndex(url, copies=Copies(folder, room))
    seen.put([index.text(sample)["caption"] for sample in range(len(index))])


@pytest.mark.parametrize("fits", [True, False])
def test_processes_share_copies(server: Server, shards: Path, tmp_path: Path, fits: bool) -> None:
    context, index = multiprocessing.get_context("fork"), ShardIndex(str(shards))
    seen, room = context.Queue(), ALL if fits else max(size(shards, f"0000{i}.tar") for i in range(4))
    processes = [context.Process(target=read_all, args=(server.url, str(tmp_path), room, seen)) for _ in range(4)]
    for process in processes:
        process.start()
    captions = [seen.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(10)
    assert captions == [[index.text(sample)["caption"] for sample in range(60)]] * 4
    if fits:
        assert all(server.asked[f"0000{i}.tar"] == server.asked[f"0000{i}.index.npz"] == 1 for i in range(4))
    else:
        assert len(tars(tmp_path)) == 1


def test_a_copy_that_another_process_takes_away_while_room_is_counted_does_not_matter(
    server: Server, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / ".0123456789abcdef-00000.tar.partial").symlink_to("gone")  # listed, and not there when it is looked at
    index = ShardIndex(server.url, copies=Copies(str(tmp_path), ALL))
    assert index.text(0) == ShardIndex(str(shards)).text(0)


def test_what_a_killed_process_left_is_overwritten_or_makes_room(server: Server, shards: Path, tmp_path: Path) -> None:
    copies = Copies(str(tmp_path), size(shards, "00000.tar") + size(shards, "00001.tar"))
    index = ShardIndex(server.url, copies=copies)
    for shard in (0, 3):
        partial = copies._path(Url(f"{server.url}/0000{shard}.tar"))
        partial.with_name(f".{partial.name}.partial").write_bytes(bytes(size(shards, "00000.tar") // 2))
    assert index.text(0) == ShardIndex(str(shards)).text(0)
    index.text(17)
    assert tars(tmp_path) == ["00000.tar", "00001.tar"]
    assert not list(tmp_path.glob(".*partial"))


def test_a_copy_that_is_short_since_the_machine_broke_down_is_fetched_again(
    server: Server, shards: Path, tmp_path: Path
) -> None:
    copies = Copies(str(tmp_path), ALL)
    ShardIndex(server.url, copies=copies).text(0)
    (copy,) = tmp_path.glob("*-00000.tar")
    os.truncate(copy, 3000)
    assert ShardIndex(server.url, copies=copies).text(15) == ShardIndex(str(shards)).text(15)
    assert copy.stat().st_size == size(shards, "00000.tar")


@pytest.mark.parametrize("how", [503, 429, "short"])
@pytest.mark.parametrize("name", ["00000.tar", "00000.index.npz"])
def test_failures_that_pass_are_waited_out(
    server: Server, shards: Path, tmp_path: Path, how: int | str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.fail, server.how = {name: 2}, how
    index = ShardIndex(f"{server.url}/00000.tar", copies=Copies(str(tmp_path), ALL))
    assert index.text(5) == ShardIndex(str(shards)).text(5)
    assert server.asked[name] == 3
    assert caplog.text.count(f"{name}: ") == caplog.text.count("trying again") == 2


@pytest.mark.parametrize("how", [503, 404, "short"])
def test_a_shard_that_stays_unreadable_is_named_and_left_alone_for_a_while(
    server: Server, shards: Path, tmp_path: Path, how: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = ShardIndex(server.url, copies=Copies(str(tmp_path), ALL))
    server.fail, server.how = {"00001.tar": 99}, how
    for sample in (16, 17, 31):
        with pytest.raises(
            Unreadable, match=r"shard http.*/00001.tar cannot be read \(.*\) and its samples are skipped"
        ):
            index.text(sample)
    assert server.asked["00001.tar"] == (1 if how == 404 else 3)
    assert index.text(0) == ShardIndex(str(shards)).text(0)
    server.fail = {}
    monkeypatch.setattr("lidit.data.reader.time.monotonic", lambda now=index._reader._given_up[1][0]: now + 1)
    assert index.text(17) == ShardIndex(str(shards)).text(17)


def test_a_shard_of_another_size_than_its_index_says_is_not_read(server: Server, shards: Path, tmp_path: Path) -> None:
    index = ShardIndex(server.url, copies=Copies(str(tmp_path / "c"), ALL))
    index._reader._sizes[0] += 10_240
    with pytest.raises(Unreadable, match="has .* bytes and its index says"):
        index.text(0)
    assert tars(tmp_path / "c") == []


def test_an_index_that_cannot_be_fetched_stops_the_start(server: Server, tmp_path: Path) -> None:
    server.fail = {"00002.index.npz": 99}
    with pytest.raises(OSError, match="503"):
        ShardIndex(server.url, copies=Copies(str(tmp_path), ALL), strict=False)


def test_samples_far_from_their_shards_turn_are_read_alone(server: Server, shards: Path, tmp_path: Path) -> None:
    index, local = ShardIndex(server.url, copies=Copies(str(tmp_path), ALL)), ShardIndex(str(shards))
    assert np.array_equal(index.image(20, whole=False), local.image(20))
    assert index.text(20, whole=False) == local.text(20)
    assert tars(tmp_path) == []
    assert server.parts == {"00001.tar": 2}


def test_a_server_that_knows_no_ranges_is_read_all_the_same(
    server: Server, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.data.conftest.Handler.do_GET", lambda self: super(type(self), self).do_GET())
    index = ShardIndex(server.url, copies=Copies(str(tmp_path), ALL))
    assert index.text(20, whole=False) == ShardIndex(str(shards)).text(20)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_a_server_shows_what_training_from_a_disk_shows(
    server: Server, shards: Path, tmp_path: Path, workers: int
) -> None:
    settings = {"batch_size": 8, "num_workers": workers, "caption_dropout": 0.3, "shuffle_window": 1}
    shown = []
    for source in ({"train": str(shards)}, {"train": server.url, "shard_cache": str(tmp_path)}):
        data = ShardData(**settings, **source)
        data.setup("fit")
        loader = iter(data.train_dataloader())
        shown.append([(b.key, b.prompt, b.image.sum().item()) for b in itertools.islice(loader, 9)])
    assert shown[0] == shown[1]


def test_without_a_folder_for_copies_the_fix_is_named(server: Server) -> None:
    with pytest.raises(ValueError, match="is remote; set shard_cache to a folder"):
        ShardData(server.url).setup("fit")


def test_a_set_that_does_not_fit_asks_for_a_window_that_does(server: Server, shards: Path, tmp_path: Path) -> None:
    room = sum(size(shards, f"0000{i}.tar") for i in range(4)) - 1
    settings = {"train": server.url, "shard_cache": str(tmp_path), "shard_cache_gb": room / 1e9}
    with pytest.raises(ValueError, match=r"4 remote shards .*raise data.shard_cache_gb"):
        ShardData(**settings).setup("fit")
    settings["shard_cache_gb"] *= 30
    ShardData(**settings).setup("fit")


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_bucket_is_read_like_a_server_or_asks_for_its_package(
    shards: Path, tmp_path: Path, protocol: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, copies = f"{protocol}://bucket/set", Copies(str(tmp_path), ALL)
    if importlib.util.find_spec(package) is None:
        with pytest.raises(ValueError, match=f"{protocol}:// needs a package: pip install {package}"):
            ShardIndex(url, copies=copies)

    class Bucket(MemoryFileSystem):
        """Stands in for the real one: what fsspec promises of every file system."""

        store: dict = {}
        pseudo_dirs = [""]

    Bucket.protocol = (protocol,)
    monkeypatch.setitem(importlib.import_module("fsspec.registry")._registry, protocol, Bucket)
    for path in shards.iterdir():
        Bucket().pipe_file(Bucket._strip_protocol(f"{url}/{path.name}"), path.read_bytes())
    index, local = ShardIndex(url, copies=copies), ShardIndex(str(shards))
    assert index.digest == local.digest
    assert np.array_equal(index.image(30), local.image(30))
    assert np.array_equal(index.image(50, whole=False), local.image(50))
    assert tars(tmp_path) == ["00001.tar"]


def test_a_small_file_is_read(server: Server, shards: Path) -> None:
    name = index_path(shards / "00000.tar").name
    assert read(Url(f"{server.url}/{name}")) == (shards / name).read_bytes()


def test_a_pipe_beside_a_server_is_not_kept(server: Server, shards: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path, ignore_errors=True)
    copies = Copies(str(tmp_path), ALL)
    index = ShardIndex([f"pipe:cat {shards}/00000.tar", f"{server.url}/00001.tar"], True, copies)
    assert [index.text(s) for s in (3, 20)] == [ShardIndex(str(shards)).text(s) for s in (3, 20)]
    assert not list(tmp_path.glob("index-*"))
