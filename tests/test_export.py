"""From a checkpoint to an exported folder: the same pictures, averaged or trained weights, in either precision."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lidit.cli import main
from lidit.export import export
from lidit.pipeline import Pipeline


def draw(source: Path, ema: bool = True) -> np.ndarray:
    """Three pictures (3 h w 3) of a checkpoint or an exported folder."""
    prompts = ["a red circle", "a blue square above two green stars and a yellow triangle", ""]
    return np.stack(Pipeline.load(str(source), ema)(prompts, [0, 1, 2], (32, 32), steps=3))


def test_an_export_draws_the_picture_of_its_checkpoint(exported: Path, tiny_checkpoint: Path) -> None:
    assert np.array_equal(draw(exported), draw(tiny_checkpoint))
    assert sorted(path.name for path in exported.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]


def test_everybody_may_read_an_export_whom_the_umask_lets(exported: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert exported.stat().st_mode & 0o777 == 0o777 & ~mask
    assert {path.stat().st_mode & 0o777 for path in exported.iterdir()} == {0o666 & ~mask}


def test_average_and_trained_weights_are_two_models(tiny_checkpoint: Path, exported: Path) -> None:
    saved = torch.load(tiny_checkpoint, weights_only=True)
    average, weights = saved["callbacks"]["EMA"]["average"], saved["state_dict"]
    stored = load_file(exported / "model.safetensors")
    assert all(torch.equal(stored[name], p) for name, p in average.items())
    assert not all(torch.equal(stored[name], p) for name, p in weights.items())
    assert not np.array_equal(draw(tiny_checkpoint), draw(tiny_checkpoint, ema=False))


def test_an_export_in_bfloat16_is_half_as_large_and_draws(
    tiny_checkpoint: Path, exported: Path, tmp_path: Path
) -> None:
    export(str(tiny_checkpoint), str(tmp_path / "half"), dtype="bfloat16")
    full, half = (load_file(folder / "model.safetensors") for folder in (exported, tmp_path / "half"))
    statistics = {name for name in full if name.endswith(("batches", "center", "second_moment", "rotate"))}
    assert all(torch.equal(half[name], p if name in statistics else p.bfloat16()) for name, p in full.items())
    assert draw(tmp_path / "half").shape == (3, 32, 32, 3)


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [("", "exists; choose another folder"), ("no.ckpt", "no checkpoint, exported folder or run at")],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(
    checkpoint: str, said: str, tiny_checkpoint: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [checkpoint, str(tmp_path / "out")] if checkpoint else [str(tiny_checkpoint), str(exported)]
    capsys.readouterr()
    assert main(["export", *words]) == 1
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lidit: error: ")]
    assert said in message
    assert list(tmp_path.iterdir()) == []
