"""The figures that are printed are those of the samples."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.stats import buckets, draw, stats


def write(tar: Path, sizes: list[tuple[int, int]], captions: list[str], dense: list[str]) -> None:
    with tarfile.open(tar, "w") as archive:
        for i, (size, short, long) in enumerate(zip(sizes, captions, dense, strict=True)):
            buffer = io.BytesIO()
            Image.new("RGB", size).save(buffer, "PNG")
            record = json.dumps({"caption": short} | ({"dense": long} if long else {})).encode()
            for name, data in ((f"{i}.png", buffer.getvalue()), (f"{i}.json", record)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    sizes = [(32, 32)] * 3 + [(96, 48)] * 6 + [(48, 96)]
    write(tmp_path / "0.tar", sizes, ["x" * (i + 1) for i in range(10)], ["x" * 500] * 4 + [""] * 6)
    return tmp_path / "0.tar"


def test_buckets_and_lengths_are_counted(tar: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    stats(str(tar), str(tmp_path / "r.png"))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == [f"{tar}:", "10", "samples", "in", "1", "shards"]
    assert rows[3:6] == [
        ["96x48", "2.00", "6", "60.0%"],
        ["32x32", "1.00", "3", "30.0%"],
        ["48x96", "0.50", "1", "10.0%"],
    ]
    assert rows[7:10] == [
        ["characters", "captions", "0%", "5%", "25%", "50%", "75%", "95%", "100%"],
        ["caption", "10", "1", "1", "3", "5", "8", "10", "10"],
        ["dense", "4", *["500"] * 7],
    ]


def test_sets_without_synthetic_captions_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path / "0.tar", [(32, 32)], ["words"], [""])
    stats(str(tmp_path), str(tmp_path / "r.png"))
    assert ["dense", "0"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_many_buckets_are_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sizes = [(16, 16)] * 2 + [(i, 16) for i in range(20, 60)]
    write(tmp_path / "0.tar", sizes, ["words"] * 42, [""] * 42)
    stats(str(tmp_path), str(tmp_path / "r.png"))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[3][:3] == ["16x16", "1.00", "2"]
    assert ["11", "others", "11", "26.2%"] in rows
    assert sum(int(row[2]) for row in rows if row and "x" in row[0] and row[0][0].isdigit()) + 11 == 42


def test_width_and_height_are_not_swapped_however_large() -> None:
    width, height = np.array([12_000, 12_000, 1], np.int32), np.array([1, 1, 12_000], np.int32)
    assert buckets(width, height) == {(12_000, 1): 2, (1, 12_000): 1}


def test_the_picture_is_a_png_and_shows_the_sizes(tmp_path: Path) -> None:
    draw(np.array([64, 64, 96]), np.array([64, 64, 64]), tmp_path / "a.png")
    draw(np.array([64, 96, 96]), np.array([64, 64, 64]), tmp_path / "b.png")
    with Image.open(tmp_path / "a.png") as first, Image.open(tmp_path / "b.png") as second:
        assert first.format == "PNG"
        assert first.size == second.size
        assert not np.array_equal(np.array(first), np.array(second))


def test_a_set_without_samples_is_said_to_be_empty(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", [], [], [])
    with pytest.raises(ValueError, match="holds no samples"):
        stats(str(tmp_path), str(tmp_path / "r.png"))
    assert not (tmp_path / "r.png").exists()
