"""Reads collections: one generator for each kind of source, and all give the same kind of record.

    imagenet     PATH/CLASS/*, PATH/CLASS.tar, or one tar of such tars (ILSVRC2012_img_train.tar); also any other
                 pictures in one folder for each class. The caption is `a photo of {class}`.
    img2dataset  What img2dataset writes, such as CC12M and LAION: tars (--output_format webdataset), or folders of
                 pictures beside parquet files (--output_format files). Each picture KEY.jpg has its caption in KEY.txt
                 and everything else in KEY.json, so the parquet files are not needed. Also any other WebDataset of
                 that form. (--output_format parquet gives a `table` whose image column is `jpg`.)
    table        A CSV, TSV, JSONL or parquet file, or a folder of them: a row has a caption and the path of a picture,
                 relative to the table, or in parquet the picture itself. Parquet needs pyarrow.
    scenes       Drawn scenes of the miniature world.

A record of a collection says where its bytes lie, and they are read when they are used. A record takes about 0.8 kB of
memory, so make a collection of tens of millions into several sets, which training reads as one (`ShardData.train` takes
a list). A record that is known to be unusable is listed, too, with its `problem`, so that it can be counted and named
where it is left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from data_prep.places import Place, files, members, rows, samples, tars
from data_prep.records import Field, Record, safe_key
from lidit.scenes.corpus import examples

Collection = Literal["imagenet", "img2dataset", "table"]
WNID = re.compile(r"n\d{8}")
BROKEN_TAR = "broken tar"


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table, or of the fields of img2dataset's JSON.

    Args:
        image: column with the picture: its path or, in parquet, its bytes. Not for img2dataset.
        caption: column with the original caption; for img2dataset, a JSON field to read instead of KEY.txt.
        dense: column with the synthetic caption; none: there is no synthetic caption.
        key: column that names a row; none: the row's number. Not for img2dataset.
    """

    image: str = "image"
    caption: str = "caption"
    dense: str | None = None
    key: str | None = None


def find(source: Collection, path: str, columns: Columns, class_names: str | None = None) -> list[Record]:
    """All records of a collection. A record whose key an earlier record has gets the problem `duplicate key`.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the path holds no such collection.
    """
    if not Path(path).exists() and not (source == "img2dataset" and tars(path)):
        raise FileNotFoundError(f"{path} is missing")
    if source == "imagenet":
        found = imagenet(path, class_names)
    else:
        found = table(path, columns) if source == "table" else img2dataset(path, columns)
    seen: set[str] = set()
    records = []
    for record in found:
        again = record.key in seen and not record.problem
        records.append(replace(record, problem="duplicate key") if again else record)
        seen.add(record.key)
    if not records:
        raise ValueError(f"{path} holds no records of source {source}; name another source, or the right subfolder")
    return records


def imagenet(path: str, class_names: str | None = None) -> Iterator[Record]:
    """Pictures sorted into classes, with the caption `a photo of {class}`.

    Args:
        path: folder of class folders or class tars, or one tar of class tars.
        class_names: file with lines `n01440764 tench, Tinca tinca`, for folders that are not named for what they show;
            none: WordNet's names for ImageNet's folders, and otherwise the folder's name without underscores.

    Raises:
        ValueError: a class has no name.
    """
    names = _class_names(class_names)
    for label, file, place in _pictures(Path(path)):
        # UNSTATED: the paper does not say which of a synset's names it takes; we take the first that WordNet lists.
        name = names.get(label) or ("" if WNID.fullmatch(label) else label.replace("_", " "))
        if not name and place:
            raise ValueError(f"class {label} of {path} has no name; give one for every class as class_names")
        key = safe_key(f"{label}/{os.path.splitext(file)[0]}")
        yield Record(key, place, f"a photo of {name}", problem="" if place else BROKEN_TAR)


def img2dataset(path: str, columns: Columns = Columns()) -> Iterator[Record]:
    """Pictures with captions beside them under the same name, in tars or folders.

    A truncated tar gives the samples before its end, and one record with the problem `broken tar`.

    Args:
        path: folder of tars or of folders, one tar, or a pattern of tars, `cc12m/000*.tar`.
        columns: names of the fields of KEY.json.
    """
    inside = tars(path)
    named = [(f"{tar.stem}/", members(tar)) for tar in inside] or [("", files(Path(path)))]
    for prefix, content in named:
        for name, parts in samples(content):
            about = parts.get("json")
            caption = parts.get("txt") if columns.caption == Columns.caption else None
            dense = Field(about, columns.dense) if about and columns.dense else ""
            yield Record(
                safe_key(prefix + name),
                parts.get("image"),
                caption or (Field(about, columns.caption) if about else None),
                dense,
                about or {},
                BROKEN_TAR if "broken" in parts else "",
            )


def table(path: str, columns: Columns = Columns()) -> Iterator[Record]:
    """The rows of tables, each with a caption and a picture.

    Args:
        path: a .csv, .tsv, .jsonl or .parquet file, or a folder of them, which are read sorted by name.
        columns: names of the columns.

    Raises:
        ValueError: a table cannot be read or lacks a column, or its images are still to be downloaded.
    """
    checked = None
    for i, (file, row) in enumerate(rows(Path(path), columns.image)):
        if row is None:
            yield Record(f"{i:08d}", None, None, problem="broken row")
            continue
        if file != checked:
            _check_columns(file, row, columns)
            checked = file
        key = row.get(columns.key) if columns.key else None
        image = row.get(columns.image)
        if isinstance(image, str):
            image = Place(str(file.parent / image)) if image else None
        dense = row.get(columns.dense) if columns.dense else ""
        yield Record(
            f"{i:08d}" if key in (None, "") else safe_key(str(key)), image, row.get(columns.caption), dense, row
        )


def scenes(
    count: int, seed: int = 0, width: int = 64, height: int = 64, held: bool = False, start: int = 0
) -> Iterator[Record]:
    """Records `start` to `start + count` of the endless set of drawn scenes that belongs to a seed.

    Record i depends on the seed, the size, `held` and i alone, so any process can draw any part of the set.

    Args:
        count: number of records.
        seed: decides the set, 0 to 2^31.
        width: image width in pixels, 32 to 256.
        height: image height in pixels, 32 to 256.
        held: draw only scenes with looks that training never shows; False draws none of these.
        start: number of the first record.
    """
    for i in range(start, start + count):
        # Each record has a corpus seed of its own, since a corpus can only be drawn from its beginning. The shift makes
        # these seeds other ones than the small seeds that are used elsewhere.
        (example,) = examples(((seed + 1) << 32) + i, 1, width, height, held)
        yield Record(f"{i:08d}", example.image, example.short.text, example.dense.text)


def _pictures(root: Path) -> Iterator[tuple[str, str, Place | None]]:
    """Class, name and place of every picture below a folder or in a tar; at a broken tar's end, place is None."""
    if root.is_file():
        for name, place in members(root):
            if place is None:
                yield root.stem, name, None
            elif name.endswith(".tar"):
                yield from ((Path(name).stem, *picture) for picture in members(root, place))
        return
    for entry in sorted(root.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            for name, place in files(entry):
                if "/" in name:
                    raise ValueError(f"{entry} holds folders itself; name the folder of the class folders as path")
                yield entry.name, name, place
        elif entry.suffix == ".tar":
            yield from ((entry.stem, *picture) for picture in members(entry))


def _class_names(path: str | None) -> dict[str, str]:
    """The first name of each class."""
    if path is None:
        packages = getattr(find_spec("timm"), "submodule_search_locations", None) or [
            ""
        ]  # finds timm without importing torch
        lemmas = Path(packages[0], "data/_info/imagenet_synset_to_lemma.txt")
        text = lemmas.read_text(encoding="utf-8") if lemmas.is_file() else ""
    else:
        text = Path(path).read_text(encoding="utf-8")
    lines = (line.split("\t" if "\t" in line else None, 1) for line in text.splitlines())
    return {line[0]: line[1].partition(",")[0].strip() for line in lines if len(line) == 2}


def _check_columns(file: Path, row: dict[str, Any], columns: Columns) -> None:
    """Refuse a table that lacks a column, or that has links instead of images."""
    for column in (columns.image, columns.caption, columns.dense, columns.key):
        if column is not None and column not in row:
            raise ValueError(f"{file} has no column {column!r}; set columns to some of {', '.join(row)}")
    if str(row[columns.image]).startswith(("http://", "https://")):
        raise ValueError(f"{file} has links in column {columns.image!r}; download them with img2dataset first")
