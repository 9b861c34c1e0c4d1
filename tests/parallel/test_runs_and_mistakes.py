"""What a user meets: a strategy that is chosen and said, a run's folder, and mistakes that end in one line."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.multiprocessing import ProcessRaisedException

from lidit.callbacks.ema import EMA
from lidit.cli import main
from lidit.disk.folder import checkpoint_name
from lidit.pipeline import Pipeline
from lidit.strategy import chosen_strategy

pytestmark = pytest.mark.slow

IMPORTS = os.pathsep.join(map(str, (Path(__file__).parents[2], *sys.path)))
SAVE = {"class_path": "lidit.callbacks.checkpoints.Checkpoints", "init_args": {"every_n_steps": 2, "keep": 2}}


class FullDisk(Callback):
    """From a step on, one rank can write no file larger than a few bytes, as on a disk that is full."""

    def __init__(self, step: int, rank: int):
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def full_disk(step: int, rank: int) -> dict:
    return {"class_path": f"{__name__}.FullDisk", "init_args": {"step": step, "rank": rank}}


def test_ddp_is_chosen_for_what_fits_and_the_reason_is_said(
    tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Pipeline.load(str(tiny_checkpoint)).model
    trainer = Namespace(strategy="auto", accelerator="cpu", devices=2, num_nodes=1, callbacks=[EMA()])
    given = Namespace(trainer=trainer, ckpt_path=None, data=Namespace(cache=None, val=None))
    with caplog.at_level("INFO"):
        assert chosen_strategy(model, given) == {"strategy": "ddp"}
    assert (
        "Strategy ddp: weights, gradients, AdamW, EMA of 0.2M parameters and frozen models take 0.0 GB" in caplog.text
    )
    trainer.devices = 1
    assert chosen_strategy(model, given) == {}


@pytest.mark.parametrize("strategy", ["auto", "sharded"])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_says_so(
    strategy: str, recipe: Callable[..., Path], fit: Callable[..., dict], tmp_path: Path
) -> None:
    ranks = 1 if strategy == "auto" else 2
    callbacks = [SAVE, full_disk(step=3, rank=ranks - 1)]
    with pytest.raises(ProcessRaisedException, match="could not be written") as caught:
        fit(
            recipe("full", trainer__strategy=strategy, trainer__max_steps=6, trainer__callbacks=callbacks),
            ranks,
            "--run",
            str(tmp_path / "run"),
        )
    assert "earlier checkpoints are as they were: make room, then resume from the latest" in str(caught.value)
    folder = tmp_path / "run/checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", checkpoint_name(2)]
    resumed = recipe("room", trainer__strategy=strategy, trainer__max_steps=6, trainer__callbacks=[SAVE])
    assert list(fit(resumed, ranks, "--run", str(tmp_path / "run"), "--resume", "auto")["losses"]) == [3, 4, 5, 6]


def test_a_sharded_run_is_gone_on_with_and_measured_by_one_process_that_is_told_nothing(
    recipe: Callable[..., Path], fit: Callable[..., dict], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, saving = str(tmp_path / "run"), {"trainer__callbacks": [SAVE]}
    fit(recipe("first", **saving, trainer__strategy="sharded", trainer__max_steps=2), 2, "--run", run)
    alone = recipe("alone", **saving, trainer__max_steps=4)
    shutil.copytree(run, tmp_path / "copy", symlinks=True)
    assert list(fit(alone, 1, "--run", run, "--resume", "auto")["losses"]) == [3, 4]
    latest = str(tmp_path / "copy/checkpoints/latest")
    validate = [sys.executable, "-m", "lidit", "validate", "--config", str(alone), "--ckpt_path", latest]
    ended = subprocess.run(validate, cwd=tmp_path, env=os.environ | {"PYTHONPATH": IMPORTS}, capture_output=True)
    assert ended.returncode == 0, ended.stderr.decode()
    assert b"val/loss" in ended.stdout
    assert main(["fit", "--config", str(alone), "--ckpt_path", latest, "--trainer.strategy", "ddp"]) == 1
    assert "is of sharded weights; say --trainer.strategy sharded" in capsys.readouterr().err


def test_a_run_is_not_begun_over_another_and_resume_needs_a_run(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = recipe("run", trainer__max_steps=2, trainer__callbacks=[SAVE])
    folder = tmp_path / "run"
    command = ["fit", "--config", str(path), "--run", str(folder)]
    assert main(command) == 0
    before = torch.load(path.with_suffix(".pt"), weights_only=True)["weights"]
    assert main(command) == 1
    assert f"{folder} has checkpoints ({checkpoint_name(2)}); say --resume auto" in capsys.readouterr().err
    assert main([*command, "--resume", "auto"]) == 0  # it is at its end already
    after = torch.load(folder / "checkpoints/latest", weights_only=True)["state_dict"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert main(["fit", "--config", str(path), "--resume", "auto"]) == 1
    assert "name its folder, such as --run runs/first" in capsys.readouterr().err
    assert main([*command, "--resume", "auto", "--ckpt_path", str(folder / "checkpoints/latest")]) == 1
    assert "give one of them" in capsys.readouterr().err
    assert main([*command[:3], "--run", str(tmp_path / "new"), "--resume", "never"]) == 2


MISTAKES = {
    "more ranks than samples": ({"data__batch_size": 1}, "batch_size is the global batch, 1, and 2 ranks do not"),
    "fewer samples than a batch": ({"data__batch_size": 32}, "batch_size"),
}


@pytest.mark.parametrize(("changes", "message"), MISTAKES.values(), ids=MISTAKES)
def test_what_does_not_divide_over_the_ranks_is_refused(
    changes: dict, message: str, recipe: Callable[..., Path], fit: Callable[..., dict]
) -> None:
    with pytest.raises(ProcessRaisedException, match=message):
        fit(recipe("wrong", **changes, trainer__max_steps=1, trainer__strategy="ddp"), 2)


def test_a_recipe_for_gpus_on_a_machine_without_one_is_one_line(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    changed = yaml.safe_load(tiny_recipe.read_text())
    changed["trainer"] |= {"accelerator": "gpu", "devices": 8}
    (tmp_path / "gpu.yaml").write_text(yaml.safe_dump(changed))
    assert main(["fit", "--config", str(tmp_path / "gpu.yaml")]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("lidit: error: ")
    assert "gpu" in line.lower()
    print(line)


@pytest.mark.parametrize("argument", ["every_n_steps", "keep"])
def test_checkpoints_must_be_written_and_kept(
    argument: str, recipe: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    wrong = {"class_path": SAVE["class_path"], "init_args": {argument: 0}}
    assert main(["fit", "--config", str(recipe("wrong", trainer__callbacks=[wrong]))]) in (1, 2)
    assert f"{argument} of Checkpoints is 0; it must be at least 1" in capsys.readouterr().err
