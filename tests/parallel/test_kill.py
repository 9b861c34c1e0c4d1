"""A run that is killed again and again, while it trains and while it saves, is the run that never was."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from lidit.checkpoint import check_whole
from lidit.data.datamodule import Batch
from lidit.disk.folder import checkpoints_in

pytestmark = pytest.mark.slow

RANKS = 2
PATIENCE = 120  # seconds for a step of a life


class Diary(Callback):
    """Each rank writes a line after each step: its number, the loss, the samples."""

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: dict, batch: Batch, *args: object
    ) -> None:
        line = f"{trainer.global_step} {outputs['loss'].item():.9g} {' '.join(batch.key)}\n"
        with (self.folder / f"{trainer.global_rank}.txt").open("a") as file:
            file.write(line)


def lines(folder: Path, rank: int) -> list[tuple[int, str]]:
    """What a rank wrote down in all its lives; a kill may have left half a line."""
    file = folder / f"{rank}.txt"
    whole = (
        [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")] if file.exists() else []
    )
    return [(int(step), rest) for step, _, rest in (line.partition(" ") for line in whole)]


def reached(folder: Path) -> int:
    """The last step that a rank has done."""
    return max((step for step, _ in lines(folder, 0)), default=0)


@pytest.fixture
def diary_recipe(recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Makes a recipe that saves every second step and writes a diary, and the diary's folder."""

    def make(name: str, steps: int, optimizer: str = "adamw") -> tuple[Path, Path]:
        folder = tmp_path / f"diary-{name}"
        folder.mkdir()
        callbacks = [
            {"class_path": "lidit.callbacks.checkpoints.Checkpoints", "init_args": {"every_n_steps": 2, "keep": 2}},
            {"class_path": f"{__name__}.Diary", "init_args": {"folder": str(folder)}},
        ]
        changes = {"trainer__strategy": "sharded", "trainer__max_steps": steps, "trainer__val_check_interval": 1000}
        path = recipe(name, **changes, trainer__callbacks=callbacks)
        content = yaml.safe_load(path.read_text())  # small: a life is mostly its start
        content["model"]["llms"] = content["model"]["llms"][:1]
        content["model"]["optimizer"] = optimizer
        content["model"]["prompt_encoder"]["init_args"]["refiner_depth"] = 1
        content["model"]["backbone"]["init_args"]["depth"] = 1
        path.write_text(yaml.safe_dump(content))
        return path, folder

    return make


@pytest.mark.parametrize(
    ("kills", "steps", "optimizer"),
    [pytest.param(3, 14, "adamw", marks=pytest.mark.one_of_each), (3, 14, "muon"), (20, 70, "adamw")],
)
def test_kills_lose_no_sample_and_change_no_loss(
    kills: int, steps: int, optimizer: str, diary_recipe: Callable, begin: Callable, fit: Callable, tmp_path: Path
) -> None:
    chance = random.Random(0)
    path, whole = diary_recipe("whole", steps, optimizer)
    fit(path, RANKS)
    path, killed = diary_recipe("killed", steps, optimizer)
    command = (path, RANKS, "--run", str(tmp_path / "run"), "--resume", "auto")
    for _ in range(kills):
        goal, life = reached(killed) + chance.randint(1, 2), begin(*command)
        deadline = time.monotonic() + PATIENCE
        while reached(killed) < goal:
            assert time.monotonic() < deadline, "it does not go on"
            assert all(process.is_alive() for process in life.processes), "it ended by itself"
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.2))
        for process in chance.sample(life.processes, RANKS):
            process.kill()
        for process in life.processes:
            process.join()
        for checkpoint in checkpoints_in(tmp_path / "run/checkpoints"):
            check_whole(checkpoint)
    assert reached(killed) < steps
    fit(*command)
    for rank in range(RANKS):
        expected, found = lines(whole, rank), lines(killed, rank)
        assert [step for step, _ in expected] == list(range(1, steps + 1))
        assert len(found) > len(expected)  # some steps were done twice, always with the same samples and loss
        assert set(found) == set(expected)
    assert list((tmp_path / "run/checkpoints").glob(".*")) == []
