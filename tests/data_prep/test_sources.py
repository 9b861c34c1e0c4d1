"""Collections as they lie on disk: every sample is found once, what is not usable is found too, and named."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.images import Unusable, decode
from data_prep.places import Place
from data_prep.records import Record, digest, safe_key
from data_prep.sources import Columns, find, imagenet, img2dataset, scenes, table


def jpeg(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    colour = tuple(np.random.default_rng(seed).integers(0, 256, 3).tolist())
    Image.new("RGB", (8, 8), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def summary(records: list[Record]) -> list[tuple[str, str, bytes]]:
    return [(r.key, r.texts()[0], r.data()) for r in records]


def why(record: Record) -> str:
    """Why a record cannot be used; empty where it can."""
    try:
        record.texts()
        decode(record.data())
    except Unusable as reason:
        return reason.reason
    return ""


# ImageNet

TENCH, GOLDFISH = "n01440764", "n01443537"
CLASSES = {
    f"{TENCH}/{TENCH}_1.JPEG": jpeg(1),
    f"{TENCH}/{TENCH}_2.JPEG": jpeg(2),
    f"{GOLDFISH}/{GOLDFISH}_1.JPEG": jpeg(3),
}
EXPECTED = [
    (f"{TENCH}/{TENCH}_1", "a photo of tench", jpeg(1)),
    (f"{TENCH}/{TENCH}_2", "a photo of tench", jpeg(2)),
    (f"{GOLDFISH}/{GOLDFISH}_1", "a photo of goldfish", jpeg(3)),
]


def class_tar(path: Path, label: str, within: str = "") -> Path:
    return tar(path, [(within + n.partition("/")[2], d) for n, d in CLASSES.items() if n.startswith(label)])


def as_folders(root: Path) -> Path:
    put(root, CLASSES)
    return put(root, {".DS_Store": b"", f"{TENCH}/._{TENCH}_1.JPEG": b"", "LOC_synset_mapping.txt": b"of Kaggle"})


def as_tars(root: Path) -> Path:
    class_tar(root / f"{TENCH}.tar", TENCH)
    class_tar(root / f"{GOLDFISH}.tar", GOLDFISH, "./")
    return root


def as_one_tar(root: Path) -> Path:
    parts = [class_tar(root / f"{label}.tar", label) for label in (TENCH, GOLDFISH)]
    return tar(root / "ILSVRC2012_img_train.tar", [(part.name, part.read_bytes()) for part in parts])


@pytest.mark.parametrize("layout", [as_folders, as_tars, as_one_tar])
def test_imagenet_has_the_papers_captions_however_it_lies(layout: object, tmp_path: Path) -> None:
    found = find("imagenet", str(layout(tmp_path / "raw")), Columns())
    assert summary(found) == EXPECTED


def test_other_classes_are_named_for_their_folders(tmp_path: Path) -> None:
    put(tmp_path, {"golden_retriever/1.jpg": jpeg(), "café/1.jpg": jpeg()})
    assert [r.caption for r in imagenet(str(tmp_path))] == ["a photo of café", "a photo of golden retriever"]


def test_class_names_may_be_given(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text(f"{TENCH} big fish, Tinca tinca\n{GOLDFISH}\torange fish\n\n")
    found = imagenet(str(as_folders(tmp_path / "raw")), str(names))
    assert [r.caption for r in found] == ["a photo of big fish"] * 2 + ["a photo of orange fish"]


def test_a_class_without_a_name_is_refused(tmp_path: Path) -> None:
    put(tmp_path, {"n99999999/1.jpg": jpeg()})
    with pytest.raises(ValueError, match="class n99999999 of .* has no name; give one"):
        list(imagenet(str(tmp_path)))


def test_a_folder_too_high_is_not_taken_for_classes(tmp_path: Path) -> None:
    as_folders(tmp_path / "train")
    with pytest.raises(ValueError, match="train holds folders itself; name the folder of the class folders"):
        list(imagenet(str(tmp_path)))


def test_a_class_tar_that_breaks_off_inside_the_outer_one_does_not_reach_into_the_next(tmp_path: Path) -> None:
    whole = class_tar(tmp_path / f"{TENCH}.tar", TENCH).read_bytes()
    second = 512 + -(-len(jpeg(1)) // 512) * 512  # where its second picture's header lies
    other = class_tar(tmp_path / f"{GOLDFISH}.tar", GOLDFISH).read_bytes()
    outer = tar(tmp_path / "all.tar", [(f"{TENCH}.tar", whole[:second]), (f"{GOLDFISH}.tar", other)])
    found = list(imagenet(str(outer)))
    assert summary([r for r in found if not r.problem]) == [EXPECTED[0], EXPECTED[2]]
    assert [r.problem for r in found] == ["", "broken tar", ""]


# img2dataset


def sample(number: int, caption: bytes | None = None, **fields: object) -> list[tuple[str, bytes]]:
    key = f"{number:09d}"
    about = {"key": key, "status": "success", "url": f"https://x.org/{number}", "caption": f"told {number}"} | fields
    text = f"caption {number}".encode() if caption is None else caption
    return [(f"{key}.jpg", jpeg(number)), (f"{key}.txt", text), (f"{key}.json", json.dumps(about).encode())]


def downloaded(root: Path, kind: str) -> Path:
    """Two of img2dataset's shards, of two samples and one."""
    for shard, numbers in (("00000", (0, 1)), ("00001", (10000,))):
        content = [file for number in numbers for file in sample(number)]
        if kind == "tars":
            tar(root / f"{shard}.tar", content)
        else:
            put(root / shard, dict(content))
        put(root, {f"{shard}.parquet": b"PAR1", f"{shard}_stats.json": b'{"count": 3, "successes": 2}'})
    return root


@pytest.mark.parametrize("kind", ["tars", "folders"])
def test_what_img2dataset_writes_is_read(kind: str, tmp_path: Path) -> None:
    found = find("img2dataset", str(downloaded(tmp_path, kind)), Columns())
    assert summary(found) == [
        ("00000/000000000", "caption 0", jpeg(0)),
        ("00000/000000001", "caption 1", jpeg(1)),
        ("00001/000010000", "caption 10000", jpeg(10000)),
    ]
    assert found[2].columns()["url"] == "https://x.org/10000"


def test_one_tar_or_a_pattern_of_tars_is_read_too(tmp_path: Path) -> None:
    downloaded(tmp_path, "tars")
    assert len(list(img2dataset(str(tmp_path / "00001.tar")))) == 1
    assert len(list(img2dataset(str(tmp_path / "0000*.tar")))) == 3


def test_captions_may_come_from_the_json(tmp_path: Path) -> None:
    tar(
        tmp_path / "0.tar",
        sample(0, vlm="dense 0") + sample(1, vlm=None) + [(n, d) for n, d in sample(2) if n[-3:] != "txt"],
    )
    found = list(img2dataset(str(tmp_path), Columns(dense="vlm")))
    assert [r.texts() for r in found] == [("caption 0", "dense 0"), ("caption 1", ""), ("told 2", "")]
    assert [r.texts()[0] for r in img2dataset(str(tmp_path), Columns(caption="url"))][1] == "https://x.org/1"


def test_what_is_not_usable_in_a_tar_is_named(tmp_path: Path) -> None:
    odd = [
        *sample(0),
        *sample(1, b"\xff\xfe latin"),
        *sample(2, "smile 😀".encode()),
        *sample(3, b""),
        ("000000004.txt", b"no picture"),
        ("000000005.jpg", jpeg()),
        ("000000006.jpg", jpeg()),
        ("000000006.json", b"{broken"),
        *sample(7, b" told with spaces \n")[:2],
        *sample(7)[:2],
        *sample(0),
    ]
    tar(tmp_path / "0.tar", odd)
    found = find("img2dataset", str(tmp_path), Columns())
    assert [why(r) for r in found] == [
        *("", "caption is not UTF-8", "", "no caption", "no image", "no caption", "broken JSON", ""),
        *("duplicate key", "duplicate key"),
    ]
    assert found[7].texts()[0] == "told with spaces"
    assert found[2].texts()[0] == "smile 😀"
    assert found[0].key == found[-1].key == "0/000000000"


def test_a_tar_that_breaks_off_anywhere_gives_what_is_before_and_says_so(tmp_path: Path) -> None:
    whole = tar(tmp_path / "whole.tar", [file for i in range(3) for file in sample(i)]).read_bytes()
    content = 3 * 3 * 1024  # each file is a header and less than 512 bytes, or a JPEG of two blocks
    with tarfile.open(tmp_path / "whole.tar") as archive:
        ends = [m.offset_data + m.size for m in archive if m.name.endswith(".json")]
    for cut in (0, 1, 511, 512, 700, *(end + more for end in ends for more in (-1, 0, 400)), len(whole) - 10_000):
        (tmp_path / "cut.tar").write_bytes(whole[:cut] if cut < content else whole[: ends[-1]])
        *usable, last = list(img2dataset(str(tmp_path / "cut.tar")))
        assert last.problem == "broken tar"
        complete = sum(end <= cut for end in ends)
        assert [r.texts()[0] for r in usable if not why(r)][:complete] == [f"caption {i}" for i in range(complete)]
        assert len(usable) <= complete + 1
    assert not any(r.problem for r in img2dataset(str(tmp_path / "whole.tar")))


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b\x08 of gzip", b"<html>404</html>" * 100])
def test_what_is_no_tar_is_named(content: bytes, tmp_path: Path) -> None:
    put(tmp_path, {"00000.tar": content})
    (only,) = find("img2dataset", str(tmp_path), Columns())
    assert only.problem == "broken tar"
    assert only.key.startswith("00000/")


def test_an_empty_tar_is_whole_and_holds_nothing(tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", [])
    tar(tmp_path / "1.tar", sample(1))
    assert [r.key for r in find("img2dataset", str(tmp_path), Columns())] == ["1/000000001"]


# tables

ROWS = [
    {"image": "a.jpg", "caption": 'a "red" circle, alone', "score": 4.5},
    {"image": "sub/b.jpg", "caption": "two lines\nand 😀", "score": None},
]


def write_table(folder: Path, kind: str, rows: list[dict] = ROWS) -> Path:
    put(folder, {"a.jpg": jpeg(1), "sub/b.jpg": jpeg(2)})
    path = folder / f"captions.{kind}"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=1)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        separator = "\t" if kind == "tsv" else ","
        quoted = [['"' + str("" if v is None else v).replace('"', '""') + '"' for v in row.values()] for row in rows]
        path.write_text(
            "\n".join(separator.join(line) for line in [list(rows[0]), *quoted]) + "\n", encoding="utf-8-sig"
        )
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("by", ["file", "folder"])
def test_tables_of_every_kind_give_the_same(kind: str, by: str, tmp_path: Path) -> None:
    path = write_table(tmp_path, kind)
    found = find("table", str(path if by == "file" else tmp_path), Columns())
    assert summary(found) == [
        ("00000000", 'a "red" circle, alone', jpeg(1)),
        ("00000001", "two lines\nand 😀", jpeg(2)),
    ]
    assert [float(r.columns()["score"]) for r in found[:1]] == [4.5]
    assert found[1].columns()["score"] in (None, "")


def test_columns_may_be_called_anything(tmp_path: Path) -> None:
    rows = [{"file_name": "a.jpg", "TEXT": "short", "long": "very long", "id": "x1"}]
    columns = Columns("file_name", "TEXT", "long", "id")
    (found,) = table(str(write_table(tmp_path, "jsonl", rows)), columns)
    assert (found.key, *found.texts()) == ("x1", "short", "very long")
    assert found.data() == jpeg(1)


@pytest.mark.parametrize("struct", [True, False])
def test_images_may_lie_in_parquet_itself(struct: bool, tmp_path: Path) -> None:
    def cell(data: bytes | None) -> object:
        return {"bytes": data, "path": "x.jpg"} if struct else data

    rows = [{"jpg": cell(jpeg(i) if i != 3 else None), "caption": f"caption {i}"} for i in range(5)]
    path = write_table(tmp_path, "parquet", rows)
    found = list(table(str(path), Columns(image="jpg")))
    assert [why(r) for r in found] == ["", "", "", "no image", ""]
    assert [found[i].data() for i in (4, 0, 2)] == [jpeg(4), jpeg(0), jpeg(2)]
    assert pickle.loads(pickle.dumps(found[1])).data() == jpeg(1)


def test_several_tables_count_on(tmp_path: Path) -> None:
    write_table(tmp_path, "csv")
    (tmp_path / "captions.csv").rename(tmp_path / "0.csv")
    write_table(tmp_path, "jsonl")
    assert [r.key for r in table(str(tmp_path))] == [f"{i:08d}" for i in range(4)]


def test_broken_rows_are_named_and_the_others_read(tmp_path: Path) -> None:
    write_table(tmp_path, "jsonl")
    lines = [
        b'{"image": "a.jpg", "caption": "good"}',
        b'{"image": "a.jpg", "caption": ',
        b'["a list"]',
        b"",
        b'{"image": "a.jpg", "caption": "caf\xe9"}',
        b'{"image": "a.jpg", "caption": "half a \\ud83d smile"}',
        b'{"image": "a.jpg", "caption": NaN}',
        b'{"image": "a.jpg", "caption": 7}',
        b'{"image": "a.jpg"}',
        b'{"caption": "no image"}',
        b'{"image": "lost.jpg", "caption": "x"}',
        b'{"image": "sub", "caption": "a folder"}',
        b'{"image": "a\\u0000.jpg", "caption": "x"}',
        b'{"image": "' + b"a" * 5000 + b'", "caption": "x"}',
        '{"image": "sub/b.jpg", "caption": "good\u2028still 😀"}'.encode(),
    ]
    (tmp_path / "captions.jsonl").write_bytes(b"\n".join(lines))
    found = list(table(str(tmp_path / "captions.jsonl")))
    assert [why(r) for r in found] == [
        *("", "broken row", "broken row", "caption is not UTF-8", "caption is not UTF-8"),
        *("no caption", "caption is no text", "no caption"),
        *("no image", "no image", "no image", "no image", "no image", ""),
    ]


def test_a_csv_in_another_encoding_loses_only_what_it_cannot_say(tmp_path: Path) -> None:
    put(tmp_path, {"a.jpg": jpeg()})
    (tmp_path / "c.csv").write_bytes("image,caption\na.jpg,plain\na.jpg,café\na.jpg,plain too\n".encode("latin-1"))
    assert [why(r) for r in table(str(tmp_path))] == ["", "caption is not UTF-8", ""]


def test_rows_with_the_same_key_are_named(tmp_path: Path) -> None:
    rows = [{"image": "a.jpg", "caption": f"c{i}", "id": key} for i, key in enumerate(["x", "y", "x", "", None])]
    found = find("table", str(write_table(tmp_path, "jsonl", rows)), Columns(key="id"))
    assert [(r.key, r.problem) for r in found] == [
        *(("x", ""), ("y", ""), ("x", "duplicate key"), ("00000003", ""), ("00000004", "")),
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns(image="picture"), "has no column 'picture'; set columns to some of image, caption, score"),
        (Columns(caption="text"), "has no column 'text'"),
        (Columns(dense="long"), "has no column 'long'"),
        (Columns(key="id"), "has no column 'id'"),
    ],
)
def test_a_column_that_is_not_there_is_named(columns: Columns, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        list(table(str(write_table(tmp_path, "csv")), columns))


def test_links_are_not_downloaded(tmp_path: Path) -> None:
    rows = [{"image": "https://x.org/a.jpg", "caption": "x"}]
    with pytest.raises(ValueError, match="links in column 'image'; download them with img2dataset"):
        list(table(str(write_table(tmp_path, "csv", rows))))


def test_a_quote_that_never_closes_is_found(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text('image,caption\na.jpg,"open\n' + "b.jpg,x\n" * 30_000)
    with pytest.raises(ValueError, match=r"c.csv, line \d+, cannot be read: .*is a quote missing"):
        list(table(str(tmp_path)))


# all of them


@pytest.mark.parametrize("source", ["imagenet", "img2dataset", "table"])
def test_what_is_missing_or_empty_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing_here"):
        find(source, str(tmp_path / "nothing_here"), Columns())
    with pytest.raises(ValueError, match="holds no records of source|does not hold a table"):
        find(source, str(tmp_path), Columns())


def test_every_source_yields_the_same_record(tmp_path: Path) -> None:
    sources = [
        imagenet(str(as_folders(tmp_path / "i"))),
        img2dataset(str(downloaded(tmp_path / "d", "tars"))),
        table(str(write_table(tmp_path / "t", "csv"))),
        scenes(2),
    ]
    for found in map(list, sources):
        assert found
        for record in found:
            assert type(record) is Record
            assert safe_key(record.key) == record.key
            assert all(isinstance(text, str) for text in record.texts())
            assert isinstance(record.image, (Place, np.ndarray))
            assert isinstance(record.columns(), dict)


def test_keys_are_safe_in_a_tar_and_stay_apart() -> None:
    odd = [
        "a.b",
        "a_b",
        "a b",
        "ä",
        "ö",
        "😀",
        "\udcff",
        "\ud83d",
        "../../etc/passwd",
        "/a",
        "a",
        "x" * 300,
        "x" * 301,
        "",
        ".",
    ]
    keys = [safe_key(name) for name in odd]
    assert len(set(keys)) == len(odd)
    assert all(len(key.encode("ascii")) <= 80 and "." not in key and key.strip("/") == key and key for key in keys)
    assert safe_key("n01/n01_5-x") == "n01/n01_5-x"


def test_file_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "cat")
    os.mkdir(folder)
    try:
        with open(folder + b"/\xff.jpg", "wb") as file:
            file.write(jpeg(5))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (found,) = find("imagenet", str(tmp_path), Columns())
    assert found.data() == jpeg(5)
    assert digest([found])


def test_the_digest_is_of_what_was_found_not_of_where(tmp_path: Path) -> None:
    one, two = (find("imagenet", str(as_folders(tmp_path / name)), Columns()) for name in ("one", "two"))
    assert digest(one) == digest(two)
    put(tmp_path / "two", {f"{TENCH}/{TENCH}_9.JPEG": jpeg(9)})
    assert digest(one) != digest(find("imagenet", str(tmp_path / "two"), Columns()))


def test_a_disk_that_fails_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.open", failing)
    with pytest.raises(OSError, match="Input/output error"):
        Place("a.jpg").read()
