"""Two raw sets, drawn scenes and a folder of odd files, to a trained step by the documented commands alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from lidit.cli import main

GOOD = 12


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A table of pictures, some of them odd."""
    folder, rng = tmp_path / "raw", np.random.default_rng(0)
    folder.mkdir()
    lines = ["image,caption"]
    for i in range(GOOD):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,picture number {i}")
    (folder / "half.png").write_bytes((folder / "0.png").read_bytes()[:900])
    (folder / "zero.png").write_bytes(b"")
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    odd = ["half.png,half of one", "zero.png,nothing", "pixel.png,one pixel", "0.png,the same file again"]
    odd += ["1.png,see www.shop.com for more", "lost.png,not there"]
    (folder / "captions.csv").write_text("\n".join([*lines, *odd]) + "\n")
    return folder


def test_the_documented_commands_go_from_raw_to_training(
    raw: Path, tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    table = ["--source=table", f"--path={raw}"]
    rules = ["--rules.remove_urls=true", "--rules.remove_duplicates=true", "--workers=1"]
    assert main(["prep", "filter", *table, f"--out={tmp_path / 'kept'}", *rules]) == 0
    assert f"6 of {GOOD + 6} records" not in capsys.readouterr().out  # one pixel is small, but no rule says so
    report = json.loads((tmp_path / "kept" / "report.json").read_text())
    removed = {"broken image": 1, "empty file": 1, "no image": 1, "remove_duplicates": 1, "remove_urls": 1}
    assert {rule: count for rule, count in report["removed"].items() if count} == removed

    web, scenes, cache = tmp_path / "web", tmp_path / "scenes", tmp_path / "cache"
    given = [f"--keep={tmp_path / 'kept' / 'kept.jsonl'}", "--sizes=[32x32]", "--workers=1"]
    assert main(["prep", "shard", *table, *given, f"--out={web}", "--shard_size=8"]) == 0
    assert "1 too small, for example 00000014: 1x1" in capsys.readouterr().out
    assert main(["prep", "shard", f"--out={scenes}", "--count=16", "--sizes=[32x32]", "--workers=1"]) == 0
    for folder in (web, scenes):
        assert main(["prep", "check", str(folder), "--workers=1"]) == 0
    assert main(["prep", "stats", str(web), f"--png={tmp_path / 'web.png'}"]) == 0
    assert f"32x32    1.00{GOOD:>12}" in capsys.readouterr().out

    recipe = yaml.safe_load(tiny_recipe.read_text())
    vae = recipe["model"]["vae"]["name"]
    both = json.dumps([str(web), str(scenes)])
    assert main(["prep", "precompute", f"--shards={both}", f"--out={cache}", f"--vae={vae}"]) == 0
    recipe["data"] |= {"batch_size": 7, "dense_probability": 0.0, "cache": str(cache)}
    recipe["data"]["train"] = [{"shards": str(web), "weight": 1.0}, {"shards": str(scenes), "weight": 3.0}]
    recipe["trainer"] |= {"max_steps": 4, "callbacks": [], "enable_checkpointing": False}
    recipe["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path / "logs")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", f"--config={tmp_path / 'recipe.yaml'}"]) == 0
    (metrics,) = (tmp_path / "logs").rglob("metrics.csv")
    assert [row["step"] for row in csv.DictReader(metrics.open()) if row["train/loss"]] == ["0", "1", "2", "3"]


def test_a_damaged_shard_is_found_by_check_and_skipped_by_training(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shards = tmp_path / "shards"
    main(["prep", "shard", f"--out={shards}", "--count=32", "--sizes=[32x32]", "--shard_size=16", "--workers=1"])
    data = bytearray((shards / "00001.tar").read_bytes())
    data[600:700] = bytes(100)  # inside the first image
    (shards / "00001.tar").write_bytes(data)
    assert main(["prep", "check", str(shards), "--workers=1"]) == 1
    said = capsys.readouterr()
    assert "00001.tar" in said.err
    assert "00000016" in said.out

    recipe = yaml.safe_load(tiny_recipe.read_text())
    recipe["data"] = {"train": str(shards), "batch_size": 16, "max_skipped": 0.05}
    recipe["trainer"] |= {"max_steps": 2, "callbacks": [], "enable_checkpointing": False}
    recipe["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path / "logs")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", f"--config={tmp_path / 'recipe.yaml'}"]) == 0
    assert main(["fit", f"--config={tmp_path / 'recipe.yaml'}", "--data.max_skipped=0.01"]) == 1
    assert "1 samples of this rank could not be read, more than 1.00%" in capsys.readouterr().err
