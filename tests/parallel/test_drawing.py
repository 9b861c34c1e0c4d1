"""What is done with the checkpoints of sharded runs: pictures, benchmarks, exports and tables, as with a file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from experiments import setting
from lidit.benchmark import draw
from lidit.checkpoint import shapes
from lidit.cli import main
from lidit.disk.folder import checkpoint_name, checkpoints_in
from lidit.eval.suite import BenchmarkError, Picture, Suite
from lidit.tables import table as verb

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SHARDED = {"trainer__strategy": "sharded", "trainer__val_check_interval": 1000}
SMALL = {"steps": 1, "size": "32x32"}


def save_every(steps: int) -> dict:
    return {"class_path": "lidit.callbacks.checkpoints.Checkpoints", "init_args": {"every_n_steps": steps, "keep": 2}}


@pytest.fixture(scope="module")
def made() -> dict[str, Path]:
    """A run of two ranks, trained once for this file."""
    return {}


@pytest.fixture
def sharded(recipe: Callable[..., Path], fit: Callable[..., dict], made: dict, tmp_path: Path) -> Path:
    """The folder of a run of four steps on two ranks that has saved twice; tests leave it as it is."""
    if "run" not in made:
        run = tmp_path / "run"
        fit(
            recipe("sharded", **SHARDED, trainer__max_steps=4, trainer__callbacks=[save_every(2)]), 2, "--run", str(run)
        )
        assert [path.is_dir() for path in checkpoints_in(run / "checkpoints")] == [True, True]
        made["run"] = run
    return made["run"]


def pixels(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): np.asarray(Image.open(p)).tobytes() for p in sorted(folder.rglob("*.png"))}


def suite() -> Suite:
    return Suite("test", [Picture("a.png", "a red circle"), Picture("b.png", "two blue squares", 1)], {}, {})


def test_a_benchmark_is_drawn_from_a_sharded_checkpoint_its_run_and_its_export_alike(
    sharded: Path, tmp_path: Path
) -> None:
    newest, older = checkpoints_in(sharded / "checkpoints")
    assert main(["export", "--checkpoint", str(sharded), "--out", str(tmp_path / "export")]) == 0
    sources = {
        "folder": newest,
        "run": sharded,
        "latest": sharded / "checkpoints/latest",
        "export": tmp_path / "export",
    }
    for name, source in sources.items():
        draw(suite(), str(tmp_path / name / "drawn"), str(source), **SMALL)
    drawn = {name: pixels(tmp_path / name / "drawn") for name in sources}
    assert list(drawn["folder"]) == ["a.png", "b.png"]
    assert all(found == drawn["folder"] for found in drawn.values())
    draw(suite(), str(tmp_path / "older"), str(older), **SMALL)
    assert pixels(tmp_path / "older") != drawn["folder"]


def test_a_sentence_is_drawn_from_each_of_them_alike(sharded: Path, tmp_path: Path) -> None:
    newest, _ = checkpoints_in(sharded / "checkpoints")
    assert main(["export", "--checkpoint", str(newest), "--out", str(tmp_path / "export")]) == 0
    found = []
    for source in (newest, sharded, tmp_path / "export"):
        out = ["--out", str(tmp_path / "out.png"), "--checkpoint", str(source)]
        assert main(["sample", "a red circle", "--steps", "2", *out]) == 0
        found.append(np.asarray(Image.open(tmp_path / "out.png")))
    assert found[0].shape == (32, 32, 3)  # the training's size, which it records
    assert all(np.array_equal(each, found[0]) for each in found)


def test_a_runs_folder_is_exported_as_its_newest_checkpoint(sharded: Path, tmp_path: Path) -> None:
    for name, source in (("run", sharded), ("newest", checkpoints_in(sharded / "checkpoints")[0])):
        assert main(["export", "--checkpoint", str(source), "--out", str(tmp_path / name)]) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "newest"))
    assert first.keys() == second.keys() == shapes(sharded / "checkpoints/latest").keys()
    assert all((first[name] == second[name]).all() for name in first)
    assert json.loads((tmp_path / "run/config.json").read_text())["precision"] == "32-true"


def test_pictures_of_another_step_of_a_sharded_run_are_not_put_beside_the_first(sharded: Path, tmp_path: Path) -> None:
    run = shutil.copytree(sharded, tmp_path / "run", symlinks=True)
    draw(suite(), str(tmp_path / "drawn"), str(run), **SMALL)
    shutil.rmtree(run / "checkpoints" / checkpoint_name(4))
    (tmp_path / "drawn/a.png").unlink()
    with pytest.raises(BenchmarkError, match=r"begun otherwise.*weights was"):
        draw(suite(), str(tmp_path / "drawn"), str(run), **SMALL)


def test_a_sharded_checkpoint_that_is_torn_draws_nothing_and_is_one_line(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torn = shutil.copytree(checkpoints_in(sharded / "checkpoints")[0], tmp_path / "torn.ckpt")
    part = next(torn.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])
    for words in (["sample", "x"], ["sample", "--benchmark", "scenes-heldout"], ["export"]):
        assert main([*words, "--checkpoint", str(torn), "--out", str(tmp_path / "out")]) == 1
        (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lidit: error: ")]
        assert "is not a complete checkpoint" in message
    assert not (tmp_path / "out").exists()


def test_launched_processes_share_a_benchmark_of_a_sharded_run(sharded: Path, tmp_path: Path) -> None:
    words = ["--benchmark", "scenes-heldout", "--count-per-task", "1", "--checkpoint", str(sharded), "--steps", "1"]
    with warnings.catch_warnings(action="error", category=UserWarning):  # reading in one process is nothing to warn of
        assert main(["sample", *words, "--out", str(tmp_path / "alone")]) == 0
    launch = [sys.executable, "-m", "lidit", "launch", "local", "--gpus-per-node", "0", "--tasks-per-node", "2", "--"]
    done = subprocess.run(
        [*launch, "sample", *words, "--out", str(tmp_path / "two")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 of 2 pictures to draw") == 2
    one, two = pixels(tmp_path / "alone"), pixels(tmp_path / "two")
    assert one.keys() == two.keys()
    assert main(["score", str(tmp_path / "two")]) == 0


def test_a_table_at_paper_scale_draws_and_scores_rows_that_were_trained_sharded(
    recipe: Callable[..., Path],
    fit: Callable[..., dict],
    tiny_llama: Path,
    tiny_qwen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    callbacks = [save_every(4), {"class_path": "lidit.callbacks.provenance.Provenance"}]
    config = recipe("table", trainer__max_steps=4, trainer__val_check_interval=1000, trainer__callbacks=callbacks)
    paper = {"config": str(config), "sample": {"all": "--count_per_task 1 --steps 1"}}
    monkeypatch.setitem(setting.SETTING, "paper", paper)
    monkeypatch.setitem(setting.T2I_AVERAGE, "paper", ("scenes-attributes", "overall", 100))
    monkeypatch.setitem(setting.DPG_AVERAGE, "paper", ("scenes-dense", "overall", 100))
    for name, folder in {"llama": tiny_llama, "llama_base": tiny_llama, "qwen": tiny_qwen}.items():
        monkeypatch.setitem(setting.LLMS[name], "paper", {"name": str(folder), "dtype": "float32"})

    def attended(words: list[str]) -> int:
        if words[1:4] == ["-m", "lidit", "fit"]:
            assert words[4:6] == ["--config", str(config)]
            fit(config, 2, *words[6:])
            return 0
        assert words[1] == "-c"
        return next(filter(None, map(main, json.loads(words[-1]))), 0)

    monkeypatch.setattr(verb, "attended", attended)
    folder = tmp_path / "experiments"
    folder.mkdir()
    file = Path(shutil.copy(ROOT / "experiments/table2_components.py", folder))
    rows = [row.label for row in verb.read_table(file, "paper").rows][:2]
    asked = [str(file), "--scale", "paper", "--runs", str(tmp_path / "runs"), "--rows", json.dumps(rows)]
    asked += ["--options", "--trainer.strategy sharded"]
    assert main(["table", *asked[:1], "run", *asked[1:]]) == 0
    trained = list((tmp_path / "runs/paper").glob("*/seed0"))
    assert len(trained) == 2
    for run in trained:
        assert (run / "checkpoints" / checkpoint_name(4)).is_dir()
        for benchmark in ("scenes-attributes", "scenes-dense"):
            assert pixels(run / benchmark)
            assert json.loads((run / benchmark / "scores.json").read_text())["images_scored"] > 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.png")}
    assert main(["table", *asked[:1], "run", *asked[1:]]) == 0  # nothing is left to do
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.png")}
    assert main(["table", *asked[:1], "score", *asked[1:]]) == 0
    scored = json.loads((folder / "results/table2_components.json").read_text())["runs"]
    assert [(each["scale"], each["steps"]) for each in scored] == [("paper", 4)] * 2
    assert all(set(each["scores"]) == {"T2I-CompBench", "DPG-Bench"} for each in scored)
    assert main(["table", str(file), "report"]) == 0
    assert all(row in (folder / "results/table2_components.md").read_text() for row in rows)
