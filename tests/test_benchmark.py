"""Sample, score and report: a folder between them, resumable, split over processes, and nothing drawn otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lidit.benchmark import draw, report
from lidit.cli import main
from lidit.eval.suite import Picture, Suite
from lidit.eval.suites import BENCHMARKS
from lidit.pictures import tiled

SMALL = {"steps": 1, "size": "32x32"}


def suite(**changes: object) -> Suite:
    pictures = [Picture("a/0.png", "a red circle"), Picture("a/1.png", "a red circle", 1), Picture("b.png", "", 0, 4)]
    return Suite(
        **{"name": "test", "pictures": pictures, "sources": {"p.txt": "00"}, "files": {"a/list.txt": "x\n"}} | changes
    )


def pixels(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): np.asarray(Image.open(p)).tobytes() for p in sorted(folder.rglob("*.png"))}


@pytest.fixture(scope="module")
def drawn(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    draw(suite(), str(folder), str(tiny_checkpoint), **SMALL)
    return folder


def test_every_picture_is_drawn_and_the_folder_says_how(drawn: Path) -> None:
    assert list(pixels(drawn)) == ["a/0.png", "a/1.png", "b.png"]
    assert (drawn / "a/list.txt").read_text() == "x\n"
    said = json.loads((drawn / "provenance.json").read_text())
    assert said["sources"] == {"p.txt": "00"}
    assert said["steps"] == 1
    assert len(said["weights"]) == 64
    assert Image.open(drawn / "b.png").size == (64, 64)  # four tiles
    assert not list(drawn.rglob("*.partial"))


def test_samples_of_a_prompt_differ_and_tiles_are_its_samples(
    drawn: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    found = pixels(drawn)
    assert found["a/0.png"] != found["a/1.png"]
    singles = suite(pictures=[Picture(f"{i}.png", "", i) for i in range(4)])
    draw(singles, str(tmp_path / "run"), str(tiny_checkpoint), **SMALL)
    images = [np.asarray(Image.open(tmp_path / "run" / f"{i}.png")) for i in range(4)]
    difference = tiled(images).astype(int) - np.asarray(Image.open(drawn / "b.png"))
    assert np.abs(difference).max() <= 1  # another batch may round otherwise


def test_a_stopped_run_goes_on_where_it_stood(drawn: Path, tiny_checkpoint: Path, tmp_path: Path, capsys) -> None:
    whole = tmp_path / "run"
    draw(suite(), str(whole), str(tiny_checkpoint), **SMALL)
    (whole / "a/1.png").unlink()
    stamp = (whole / "a/0.png").stat().st_mtime_ns
    draw(suite(), str(whole), str(tiny_checkpoint), **SMALL)
    assert "1 of 3 pictures to draw" in capsys.readouterr().out
    assert (whole / "a/0.png").stat().st_mtime_ns == stamp
    assert pixels(whole).keys() == pixels(drawn).keys()


def test_processes_share_the_work(drawn: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        draw(suite(), str(tmp_path / "run"), str(tiny_checkpoint), **SMALL)
        assert len(pixels(tmp_path / "run")) == (2, 3)[rank]
    assert pixels(tmp_path / "run").keys() == pixels(drawn).keys()


@pytest.mark.parametrize(
    ("asked", "settings", "named"),
    [
        ({}, {"steps": 2}, "steps was 1 and is 2"),
        ({"sources": {"p.txt": "11"}}, {}, "sources was"),
        ({"pictures": [Picture("a/0.png", "a blue circle")]}, {}, "prompts was"),
    ],
)
def test_a_run_that_was_begun_otherwise_is_refused(
    drawn: Path, tiny_checkpoint: Path, asked: dict, settings: dict, named: str
) -> None:
    with pytest.raises(ValueError, match=f"begun otherwise.*{named}.*another folder"):
        draw(suite(**asked), str(drawn), str(tiny_checkpoint), **SMALL | settings)


def test_a_folder_of_other_things_is_not_written_to(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="take a new folder"):
        draw(suite(), str(tmp_path), str(tiny_checkpoint), **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_its_two_commands(name: str, capsys) -> None:
    assert main(["sample", "--benchmark", name, "--help"]) == 0
    assert main(["score", "--benchmark", name, "--help"]) == 0
    said = capsys.readouterr().out
    assert "--guidance" in said
    assert "--allow_missing" in said


@pytest.fixture(scope="module")
def twin(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twin") / "run"
    command = f"sample --benchmark scenes-heldout --count-per-task 2 --out {folder} --checkpoint {tiny_checkpoint}"
    assert main([*command.split(), "--steps=1"]) == 0
    return folder


def test_a_twin_goes_through_the_three_commands(twin: Path, tmp_path: Path, capsys) -> None:
    assert main(["score", str(twin)]) == 0
    scores = json.loads((twin / "scores.json").read_text())
    assert set(scores["scores"]) == {"single", "two", "position", "counting", "overall"}
    assert (scores["images_scored"], scores["images_demanded"]) == (8, 8)
    capsys.readouterr()
    assert main(["report", str(twin), "--out", str(tmp_path / "table.md")]) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"| {twin} | 0.0000") == 1
    assert (tmp_path / "table.md").read_text() == printed


def test_fewer_images_than_asked_are_scored_only_on_demand_and_it_is_said(twin: Path, capsys) -> None:
    (twin / "two/00002.png").rename(twin / "kept")
    assert main(["score", str(twin)]) == 1
    assert "7 of 8 images; the first missing one is two/00002.png" in capsys.readouterr().err
    assert main(["score", str(twin), "--allow-missing", "true"]) == 0
    assert json.loads((twin / "scores.json").read_text())["images_scored"] == 7
    (twin / "kept").rename(twin / "two/00002.png")


def test_an_image_that_cannot_be_read_is_named(twin: Path, capsys) -> None:
    image = twin / "single/00000.png"
    content = image.read_bytes()
    image.write_bytes(content[:60])
    assert main(["score", str(twin)]) == 1
    assert f"{image} cannot be read as an image" in capsys.readouterr().err
    image.write_bytes(content)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("sample --benchmark none --out x", "there is no benchmark 'none'; there are geneval"),
        ("score nothing", "which benchmark?"),
        ("score --benchmark", "--benchmark needs a value"),
        ("report nothing", "there is no nothing/scores.json; `lidit score nothing` writes it"),
    ],
)
def test_a_mistake_is_one_line(command: str, said: str, capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) in (1, 2)
    assert said in capsys.readouterr().err


def test_a_run_is_scored_by_its_own_benchmark_alone(twin: Path, capsys) -> None:
    assert main(["score", "--benchmark", "scenes-dense", str(twin)]) == 1
    assert "holds pictures of scenes-heldout, not of scenes-dense" in capsys.readouterr().err


def test_reports_of_several_benchmarks_are_tables_of_their_own(tmp_path: Path, capsys) -> None:
    for run, name in (("a", "one"), ("b", "two")):
        (tmp_path / run).mkdir()
        scores = {"name": name, "scores": {"x": 0.5}, "images_scored": 1, "images_demanded": 1}
        (tmp_path / run / "scores.json").write_text(json.dumps(scores))
    report([str(tmp_path / "a"), str(tmp_path / "b")])
    first, second = capsys.readouterr().out.split("\n\n")
    assert first.startswith("| one | x |")
    assert second.startswith("| two | x |")
