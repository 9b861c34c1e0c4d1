"""Sharded checkpoints: whole or not there, for any number of ranks, and exported as one file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lidit import checkpoint
from lidit.cli import main
from lidit.disk.folder import checkpoint_name, checkpoints_in
from lidit.pipeline import Pipeline

pytestmark = pytest.mark.slow

SAVE = {"class_path": "lidit.callbacks.checkpoints.Checkpoints", "init_args": {"every_n_steps": 2, "keep": 2}}
LOSS = 2e-5  # between runs of another number of ranks; on the same number every loss is the same to the last bit


def largest(a: dict, b: dict) -> float:
    """Difference of the losses at the steps that both have."""
    common = a.keys() & b.keys()
    assert common
    return max(abs(a[k] - b[k]) for k in common)


@pytest.fixture
def settings(tmp_path: Path) -> dict:
    return {"trainer__strategy": "sharded", "trainer__callbacks": [SAVE], "trainer__val_check_interval": 4}


@pytest.fixture(scope="module")
def made() -> dict[int, tuple[Path, Path]]:
    """By the number of ranks, a stopped run and what its witness wrote: made once, copied for each test."""
    return {}


@pytest.fixture
def stopped(
    recipe: Callable[..., Path], fit: Callable[..., dict], settings: dict, made: dict, tmp_path: Path
) -> Callable[[int], Path]:
    """Gives a run of its own that stopped after 4 of 8 steps, on some ranks."""

    def make(ranks: int) -> Path:
        if ranks not in made:
            first = recipe(f"first{ranks}", **settings, trainer__max_steps=4)
            fit(first, ranks, "--run", str(tmp_path / "run"))
            made[ranks] = tmp_path / "run", first.with_suffix(".pt")
        run, witnessed = made[ranks]
        (tmp_path / "ended.pt").write_bytes(witnessed.read_bytes())
        return shutil.copytree(run, tmp_path / "own", symlinks=True)

    return make


def test_a_run_goes_on_with_the_losses_of_one_that_never_stopped_on_any_number_of_ranks(
    recipe: Callable[..., Path], fit: Callable[..., dict], settings: dict, stopped: Callable, tmp_path: Path
) -> None:
    whole = fit(recipe("whole", **settings, trainer__max_steps=8), 2)
    folder = stopped(2)
    assert [path.name for path in checkpoints_in(folder / "checkpoints")] == [checkpoint_name(4), checkpoint_name(2)]
    assert (folder / "checkpoints/latest").readlink() == Path(checkpoint_name(4))
    for ranks, allowed in ((2, 0.0), (1, LOSS)):
        again = tmp_path / f"again{ranks}"
        shutil.copytree(folder, again, symlinks=True)
        resumed = fit(
            recipe(f"again{ranks}", **settings, trainer__max_steps=8), ranks, "--run", str(again), "--resume", "auto"
        )
        assert list(resumed["losses"]) == [5, 6, 7, 8]
        assert largest(whole["losses"], resumed["losses"]) <= allowed
        assert largest(whole["validated"], resumed["validated"]) <= allowed
        assert all((whole["average"][n] - resumed["average"][n]).abs().max() <= 50 * allowed for n in whole["average"])


def test_a_run_with_muon_goes_on_on_any_number_of_ranks_and_from_a_file(
    recipe: Callable[..., Path], fit: Callable[..., dict], settings: dict, tmp_path: Path
) -> None:
    settings |= {"model__optimizer": "muon"}
    plain = settings | {"trainer__strategy": "auto"}
    whole = fit(recipe("whole", **settings, trainer__max_steps=8), 2)
    for name, ranks, given in (("sharded", 2, settings), ("file", 1, plain)):
        fit(recipe(name, **given, trainer__max_steps=4), ranks, "--run", str(tmp_path / name))
    for name, ranks, allowed in (("sharded", 2, 0.0), ("sharded", 1, LOSS), ("file", 2, LOSS)):
        again = shutil.copytree(tmp_path / name, tmp_path / f"{name}{ranks}", symlinks=True)
        path = recipe(f"{name}{ranks}", **settings, trainer__max_steps=8)
        resumed = fit(path, ranks, "--run", str(again), "--resume", "auto")
        assert list(resumed["losses"]) == [5, 6, 7, 8]
        assert largest(whole["losses"], resumed["losses"]) <= allowed
        assert largest(whole["validated"], resumed["validated"]) <= allowed


def test_a_run_of_one_rank_goes_on_on_two(
    recipe: Callable[..., Path], fit: Callable[..., dict], settings: dict, stopped: Callable
) -> None:
    whole = fit(recipe("whole", **settings, trainer__max_steps=8), 1)
    folder = stopped(1)
    resumed = fit(recipe("two", **settings, trainer__max_steps=8), 2, "--run", str(folder), "--resume", "auto")
    assert list(resumed["losses"]) == [5, 6, 7, 8]
    assert largest(whole["losses"], resumed["losses"]) <= LOSS


def test_a_file_of_one_process_goes_on_sharded(
    recipe: Callable[..., Path], fit: Callable[..., dict], settings: dict, tmp_path: Path
) -> None:
    plain = settings | {"trainer__strategy": "auto"}
    whole = fit(recipe("whole", **plain, trainer__max_steps=8), 1, "--run", str(tmp_path / "run"))
    assert (tmp_path / "run/checkpoints" / checkpoint_name(6)).is_file()
    shutil.rmtree(tmp_path / "run/checkpoints" / checkpoint_name(8), ignore_errors=True)
    (tmp_path / "run/checkpoints" / checkpoint_name(8)).unlink(missing_ok=True)
    resumed = fit(
        recipe("two", **settings, trainer__max_steps=8), 2, "--run", str(tmp_path / "run"), "--resume", "auto"
    )
    assert list(resumed["losses"]) == [7, 8]
    assert largest(whole["losses"], resumed["losses"]) <= LOSS
    assert largest(whole["validated"], resumed["validated"]) <= LOSS  # of the average


def test_a_sharded_checkpoint_is_exported_as_one_file_and_drawn_from(stopped: Callable, tmp_path: Path) -> None:
    folder = stopped(2)
    ended = torch.load(tmp_path / "ended.pt", weights_only=True)
    latest = folder / "checkpoints/latest"
    for ema, kind in (("true", "average"), ("false", "weights")):
        out = tmp_path / f"export-{kind}"
        assert main(["export", "--checkpoint", str(latest), "--out", str(out), "--ema", ema]) == 0
        weights = load_file(out / "model.safetensors")
        assert weights.keys() == ended["weights"].keys()
        assert all(torch.equal(weights[name], ended[kind][name]) for name in ended[kind])
        assert json.loads((out / "config.json").read_text())["prompts"][0]["layer"] == -3
    drawn = [
        Pipeline.load(str(source))(["a red circle"], [0], (32, 32), steps=2)[0]
        for source in (latest, tmp_path / "export-average")
    ]
    assert (drawn[0] == drawn[1]).all()


def test_what_is_torn_or_of_other_code_is_passed_over_and_named(
    stopped: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    folder = stopped(2) / "checkpoints"
    expected = checkpoint.shapes(folder / "latest")
    assert checkpoint.newest(folder, expected) == folder / checkpoint_name(4)
    assert checkpoint.newest(folder, expected | {"another.weight": (3,)}) is None
    assert f"{checkpoint_name(4)} is of another architecture" in caplog.text
    part = next((folder / checkpoint_name(4)).glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])
    assert checkpoint.newest(folder, expected) == folder / checkpoint_name(2)
    assert f"{checkpoint_name(4)} is not a complete checkpoint" in caplog.text
    (folder / checkpoint_name(2) / checkpoint.COMMITTED).unlink()
    assert checkpoint.newest(folder, expected) is None


def test_an_index_that_could_run_code_is_refused(stopped: Callable, tmp_path: Path) -> None:
    index = stopped(2) / "checkpoints/latest" / checkpoint.COMMITTED
    index.write_bytes(b"cposix\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    with pytest.raises(ValueError, match="could run code"):
        checkpoint.shapes(index.parent)
    assert not (tmp_path / "ran").exists()
