"""The shard writer: same bytes for the same arguments, nothing half-written, nothing mixed, nothing lost in silence."""

from __future__ import annotations

import csv
import io
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from jsonargparse import auto_cli
from PIL import Image

from data_prep.images import decode
from data_prep.records import Record, digest
from data_prep.shard import shard, write_tar
from data_prep.sources import Columns, find, scenes
from lidit.data.datamodule import ShardData
from lidit.data.index import ShardIndex, read_index


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
    with pytest.raises(ValueError, match=f"holds other data: {next(iter(change))} was .* and is .* now"):
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
    assert run.stderr.splitlines() == ["error: size '64x' is not of the form WIDTHxHEIGHT in pixels, for example 96x64"]


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


# Collections


def smooth(width: int, height: int, seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(30, 226, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def save(image: Image.Image, kind: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def odd_images() -> dict[str, tuple[bytes, str]]:
    """Every strange file by its name, and why it must be skipped; empty where it must not."""
    plain, exif = smooth(96, 96, 0), Image.Exif()
    exif[0x0112] = 6
    ramp = np.linspace(0, 65535, 96).astype(np.uint16)[None].repeat(96, 0)
    jpeg = save(plain, "JPEG")
    return {
        "plain.jpg": (jpeg, ""),
        "fits.png": (save(smooth(64, 64, 1), "PNG"), ""),
        "cmyk.jpg": (save(plain.convert("CMYK"), "JPEG"), ""),
        "sixteen.png": (save(Image.fromarray(ramp), "PNG"), ""),
        "grey.jpg": (save(plain.convert("L"), "JPEG"), ""),
        "palette.png": (save(plain.convert("P"), "PNG"), ""),
        "alpha.png": (save(plain.convert("RGBA"), "PNG"), ""),
        "rotated.jpg": (save(smooth(96, 144, 2), "JPEG", exif=exif), ""),  # 144x96 once it is upright
        "animated.gif": (save(plain, "GIF", save_all=True, append_images=[smooth(96, 96, 3)]), ""),
        "wide.png": (save(smooth(12_000, 80, 4), "PNG"), ""),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "broken image"),
        "zero.jpg": (b"", "empty file"),
        "pixel.png": (save(Image.new("RGB", (1, 1)), "PNG"), "too small"),
        "page.jpg": (b"<html>404 not found</html>", "not an image"),
        "huge.png": (save(Image.new("1", (20_000, 9_000)), "PNG"), "too many pixels"),
    }


CAPTIONS = {  # caption of one more good image each, as bytes in the table
    "emoji": ("smile \N{GRINNING FACE} \N{SNOWMAN}".encode(), ""),
    "latin": (b"caf\xe9 au lait", "caption is not UTF-8"),
    "empty": (b"", "no caption"),
    "lines": (b'"two\nlines, ""quoted"""', ""),
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder of odd files with a table, and key to reason of what must be skipped (empty: must not)."""
    folder, expected = tmp_path_factory.mktemp("odd"), {}
    lines = [b"id,image,caption"]
    for name, (data, reason) in odd_images().items():
        (folder / name).write_bytes(data)
        key = name.partition(".")[0]
        lines.append(f"{key},{name},a picture of {key}".encode())
        expected[key] = reason
    for key, (caption, reason) in CAPTIONS.items():
        lines.append(f"{key},plain.jpg,".encode() + caption)
        expected[key] = reason
    lines += [b"gone,lost.jpg,a lost picture", b"plain,fits.png,the same key again"]
    (folder / "captions.csv").write_bytes(b"\n".join(lines) + b"\n")
    return folder, expected | {"gone": "no image"}


OPTIONS = {"source": "table", "columns": Columns(key="id"), "sizes": ("64x64", "96x64"), "shard_size": 6, "workers": 1}


def pack(folder: Path, raw: Path, **changes: object) -> Path:
    shard(str(folder), **OPTIONS | {"path": str(raw)} | changes)
    return folder


def skipped(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_odd_files_go_from_raw_to_batches_or_are_named(
    odd: tuple, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    raw, expected = odd
    folder = pack(tmp_path / "s", raw)
    reasons = sorted((line["key"], line["reason"]) for line in skipped(folder))
    assert reasons == sorted([*((k, r) for k, r in expected.items() if r), ("plain", "duplicate key")])
    out = capsys.readouterr().out
    assert f"{len(expected) - len(reasons) + 1} samples; {len(reasons)} records were skipped" in out
    assert "1 too small, for example pixel: 1x1 would have to be enlarged to 64x64" in out

    data = ShardData(str(folder), batch_size=1, caption_dropout=0.0)
    data.setup("fit")
    steps = len(ShardIndex(str(folder)))
    batches = (data.on_after_batch_transfer(b, 0) for b in itertools.islice(data.train_dataloader(), steps))
    seen = {batch.key[0]: batch for batch in batches}
    assert set(seen) == {key for key, reason in expected.items() if not reason}
    assert seen["emoji"].prompt == ["smile \N{GRINNING FACE} \N{SNOWMAN}"]
    assert seen["lines"].prompt == ['two\nlines, "quoted"']
    wide = ("rotated", "wide")
    assert {k: tuple(b.image.shape[2:]) for k, b in seen.items()} == {k: (64, 96 if k in wide else 64) for k in seen}
    for key in seen:
        name = next((name for name in odd_images() if name.startswith(f"{key}.")), "plain.jpg")
        image, (height, width) = decode((raw / name).read_bytes()), seen[key].image.shape[2:]
        scale = min(image.width / width, image.height / height)
        left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
        box = (left, top, left + width * scale, top + height * scale)
        shown = (seen[key].image[0].permute(1, 2, 0).numpy() + 1) * 127.5
        assert np.abs(shown - np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box))).mean() < 6


def test_a_collection_gives_the_same_bytes_with_one_process_or_two(odd: tuple, tmp_path: Path) -> None:
    one, two = pack(tmp_path / "one", odd[0]), pack(tmp_path / "two", odd[0], workers=2)
    assert contents(one) == contents(two)
    assert "00001.skipped.jsonl" in contents(one)


def test_a_collection_that_moved_continues_and_one_that_changed_is_refused(odd: tuple, tmp_path: Path) -> None:
    folder = pack(tmp_path / "s", odd[0])
    before = contents(folder)
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in odd[0].iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    pack(folder, moved)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
    (folder / "00001.tar").unlink()
    (folder / "00001.skipped.jsonl").unlink()
    pack(folder, moved)
    assert contents(folder) == before
    table = (moved / "captions.csv").read_bytes()
    for changed, message in (
        (table + b"new,plain.jpg,one more\n", "records was 21 and is 22 now"),
        (table.replace(b"a picture of grey", b"a picture of gray"), "digest was"),
    ):
        (moved / "captions.csv").write_bytes(changed)
        with pytest.raises(ValueError, match=f"holds other data: {message}"):
            pack(folder, moved)
        assert contents(folder) == before


def plain_folder(folder: Path, count: int = 20, kind: str = "JPEG") -> Path:
    """Pictures of 64x64 in two classes."""
    for i in range(count):
        place = folder / ("cat" if i < count // 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:03d}.jpg").write_bytes(save(smooth(64, 64, i), kind))
    return folder


def keys(folder: Path) -> list[str]:
    index = ShardIndex(str(folder))
    return [index.key(i) for i in range(len(index))]


def test_shuffling_mixes_classes_by_the_seed_and_loses_nothing(tmp_path: Path) -> None:
    raw = plain_folder(tmp_path / "raw")
    options = {"source": "imagenet", "columns": Columns()}
    in_order = keys(pack(tmp_path / "a", raw, shuffle=False, **options))
    mixed, others = (keys(pack(tmp_path / f"m{seed}", raw, seed=seed, **options)) for seed in (0, 1))
    assert in_order == sorted(in_order)
    assert in_order != mixed != others
    assert sorted(mixed) == sorted(others) == in_order
    first = {key.partition("/")[0] for key in mixed[:6]}
    assert first == {"cat", "dog"}


def test_what_fits_is_stored_to_the_byte(tmp_path: Path) -> None:
    raw = plain_folder(tmp_path / "raw", 2)
    folder = pack(tmp_path / "s", raw, source="imagenet", columns=Columns())
    assert (raw / "cat/000.jpg").read_bytes() in (folder / "00000.tar").read_bytes()
    assert sorted(ShardIndex(str(folder)).text(i)["caption"] for i in range(2)) == ["a photo of cat", "a photo of dog"]


def test_count_takes_a_part_of_a_collection(tmp_path: Path) -> None:
    raw = plain_folder(tmp_path / "raw")
    assert len(keys(pack(tmp_path / "s", raw, source="imagenet", columns=Columns(), count=7))) == 7


def test_synthetic_captions_of_a_table_are_kept_beside_the_original(tmp_path: Path) -> None:
    raw = plain_folder(tmp_path / "raw", 2)
    (raw / "c.jsonl").write_text('{"image": "cat/000.jpg", "caption": "short", "long": "long and dense"}\n')
    index = ShardIndex(str(pack(tmp_path / "s", raw, columns=Columns(dense="long"))))
    assert index.text(0) == {"caption": "short", "dense": "long and dense", "width": 64, "height": 64}
    assert index.column("dense_chars").tolist() == [14]


def test_a_shard_of_which_nothing_is_left_is_not_listed(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    plain_folder(raw, 8)
    for i in range(4):
        (raw / "cat" / f"{i:03d}.jpg").write_bytes(b"")
    folder = pack(tmp_path / "s", raw, source="imagenet", columns=Columns(), shard_size=4, shuffle=False)
    assert json.loads((folder / "shards.json").read_text())["tars"] == ["00001.tar"]
    assert len(read_index(folder / "00000.tar")["key"]) == 0
    assert len(ShardIndex(str(folder))) == 4
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    pack(folder, raw, source="imagenet", columns=Columns(), shard_size=4, shuffle=False)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_shard_that_is_written_again_forgets_what_has_been_mended(tmp_path: Path) -> None:
    raw, options = plain_folder(tmp_path / "raw", 4), {"source": "imagenet", "columns": Columns()}
    good = (raw / "cat/000.jpg").read_bytes()
    (raw / "cat/000.jpg").write_bytes(b"")
    folder = pack(tmp_path / "s", raw, **options)
    assert len(skipped(folder)) == 1
    (raw / "cat/000.jpg").write_bytes(good)
    (folder / "00000.tar").unlink()
    pack(folder, raw, **options)
    assert len(ShardIndex(str(folder))) == 4
    assert not list(folder.glob("*skipped*"))


def test_a_collection_without_one_usable_picture_is_an_error(tmp_path: Path) -> None:
    raw = plain_folder(tmp_path / "raw", 4)
    with pytest.raises(ValueError, match=r"no record can be used; .*skipped.jsonl says why"):
        pack(tmp_path / "s", raw, source="imagenet", columns=Columns(), sizes=("128x128",))
    assert [line["reason"] for line in skipped(tmp_path / "s")] == ["too small"] * 4


def kept(path: Path, raw: Path, names: list[str]) -> str:
    lines = [{"collection": digest(find("imagenet", str(raw), Columns()))}, *({"key": name} for name in names)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_only_what_the_filter_keeps_is_written(tmp_path: Path) -> None:
    raw, options = plain_folder(tmp_path / "raw"), {"source": "imagenet", "columns": Columns()}
    names = ["cat/003", "dog/017", "dog/011"]
    keep = kept(tmp_path / "kept.jsonl", raw, names)
    assert sorted(keys(pack(tmp_path / "s", raw, keep=keep, **options))) == sorted(names)
    with pytest.raises(ValueError, match="holds other data: records was 3 and is 2 now"):
        pack(tmp_path / "s", raw, keep=kept(tmp_path / "kept.jsonl", raw, names[:2]), **options)
    with pytest.raises(ValueError, match="keeps nothing"):
        pack(tmp_path / "t", raw, keep=kept(tmp_path / "kept.jsonl", raw, []), **options)
    (raw / "cat/000.jpg").unlink()
    with pytest.raises(
        ValueError, match="does not belong to this collection as it is now; run lidit prep filter again"
    ):
        pack(tmp_path / "t", raw, keep=keep, **options)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "imagenet"}, "source imagenet needs a path"),
        ({"source": "table", "path": "nowhere"}, "nowhere is missing"),
        ({"source": "img2dataset", "path": "nowhere"}, "nowhere is neither a folder nor a file"),
        ({"source": "table", "path": "x", "held": True}, "held is True, which does not belong to source table"),
        ({"path": "x"}, "path is 'x', which does not belong to source scenes"),
        ({"keep": "x"}, "keep is 'x', which does not belong to source scenes"),
        ({"sizes": ("0x64",)}, "WIDTHxHEIGHT"),
    ],
)
def test_arguments_that_do_not_fit_together_leave_nothing_behind(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        shard(str(tmp_path / "s"), **options)
    assert not (tmp_path / "s").exists()


def test_images_inside_parquet_are_read_in_their_order(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"jpg": save(smooth(64, 64, i), "JPEG"), "caption": f"caption {i}"} for i in range(9)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=4)
    options = {"columns": Columns(image="jpg"), "workers": 2}
    with pytest.raises(ValueError, match="set shuffle to false"):
        pack(tmp_path / "s", tmp_path / "t.parquet", **options)
    index = ShardIndex(str(pack(tmp_path / "s", tmp_path / "t.parquet", shuffle=False, **options)))
    assert [index.text(i)["caption"] for i in range(9)] == [f"caption {i}" for i in range(9)]
    assert all((index.image(i) == np.asarray(decode(rows[i]["jpg"]))).all() for i in range(9))


def test_a_collection_is_given_on_the_command_line(tmp_path: Path) -> None:
    raw = plain_folder(tmp_path / "raw", 4)
    with (raw / "c.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "TEXT"], ["cat/000.jpg", "a cat"]])
    arguments = ["--out", str(tmp_path / "s"), "--source", "table", "--path", str(raw), "--workers", "1"]
    auto_cli(shard, as_positional=False, args=[*arguments, "--columns.image", "file", "--columns.caption", "TEXT"])
    assert ShardIndex(str(tmp_path / "s")).text(0)["caption"] == "a cat"
