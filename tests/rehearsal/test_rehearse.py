"""The recipes of this project are rehearsed as they stand, and a fault is told in the stage in which it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lidit.cli import main
from lidit.rehearsal.rehearse import new_folder

CONFIGS = Path("experiments/configs")
BELOW = {  # recipe: the ones it is laid over, and the side of its pictures
    "lidit_1b": ([], 256),
    "lidit_1b_512": (["lidit_1b"], 512),
    "lidit_1b_1024": (["lidit_1b"], 1024),
    "lidit_10b": ([], 512),
    "lidit_10b_1024": (["lidit_10b"], 1024),
    "ablation": ([], 256),
}
WITHOUT_OVERLAY = {
    "llmdiff_sd15": 512,
    "demo": 64,
    "mini": 64,
    "mini_ablation": 64,
    "mini_unet": 64,
    "llmdiff_mini": 64,
}
STAGES = [(["lidit_1b", name, "cluster/lidit_1b"], px) for name, px in (("lidit_1b_512", 512), ("lidit_1b_1024", 1024))]
COMPILED = "cluster/lidit_1b_64gpu"  # tracing takes two minutes of four; the others are played uncompiled
PLAIN = ("cluster/lidit_1b", "cluster/lidit_10b_1024")  # one of the 1B and one of the 10B in plain pytest
OWN = """
import torch
from lightning.pytorch import Callback
from torch import nn
from lidit.callbacks.samples import Samples

class Smudges(Samples):
    def draw(self, *args, **kwargs):
        raise RuntimeError("the ink is dry")

class Forgets(Callback):  # that there were steps before is in no checkpoint
    first = True
    def on_before_optimizer_step(self, trainer, module, optimizer):
        if self.first:
            for p in module.parameters():
                p.grad.zero_()
        self.first = False

class Hall(nn.Module):
    def __init__(self, channels: int, rooms: int = 3000):
        super().__init__()
        self.width, self.patch, self.blocks = rooms, 1, nn.ModuleList()
        self.enter, self.stay = nn.Linear(channels, rooms), nn.ModuleList(nn.Linear(rooms, rooms) for _ in range(3))
        self.leave = nn.Linear(rooms, channels)

    def forward(self, x, t, text):
        words = (text.tokens * text.mask[..., None]).sum(1)  # a mean that counts padding would depend on the batch
        z = self.enter(x.movedim(1, -1)) + (text.pooled + words + t[:, None])[:, None, None]
        for each in self.stay:
            z = z + each(z).tanh()
        return self.leave(z).movedim(-1, 1)
"""


def cases() -> list:
    """Every recipe with each of its overlays, and those that have none."""
    found = []
    for path in sorted((CONFIGS / "cluster").glob("*.yaml")):
        recipe = max((name for name in BELOW if path.stem.startswith(name)), key=len)
        below, pixels = BELOW[recipe]
        found.append(([*below, recipe, f"cluster/{path.stem}"], pixels))
    found += STAGES
    found += [([name], pixels) for name, pixels in WITHOUT_OVERLAY.items()]
    marks: dict[bool, list] = {True: [pytest.mark.slow, pytest.mark.one_of_each], False: [pytest.mark.slow]}
    return [
        pytest.param(files, px, id="+".join(files), marks=marks[files[-1] in PLAIN and (files, px) not in STAGES])
        for files, px in found
    ]


def test_every_recipe_of_lidit_fit_is_rehearsed() -> None:
    trained = {path.stem for path in CONFIGS.glob("*.yaml") if "\nmodel:" in path.read_text()}
    of_open_clip = {"mini_clip", "mini_siglip"}
    assert trained - of_open_clip <= {file for case in cases() for file in case.values[0]}


@pytest.mark.parametrize(("files", "pixels"), cases())
def test_a_recipe_is_played_from_its_first_step_to_its_scores(
    files: list[str], pixels: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [word for file in files for word in ("--config", str(CONFIGS / f"{file}.yaml"))]
    compiled = [] if files[-1] == COMPILED else ["--parallel.compile", "false"]
    code = main(["rehearse", *argv, *compiled, "--pixels", str(pixels), "--keep", str(tmp_path / "kept")])
    said = capsys.readouterr()
    assert code == 0, said.out + said.err
    assert "Every stage passed." in said.out


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_recipe: Path) -> Path:
    """The tiny recipe on one rank, beside a module of one's own that can be imported."""
    (tmp_path / "own_parts.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = yaml.safe_load(tiny_recipe.read_text())
    recipe["trainer"] |= {"devices": 1, "callbacks": recipe["trainer"]["callbacks"][:1]}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def rehearsed(recipe: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, str], str]:
    """The exit code, the line of each stage, and what stderr says."""
    code = main(["rehearse", "--config", str(recipe), "--pixels", "32", *more])
    said = capsys.readouterr()
    rows = [line for line in said.out.splitlines() if " s  " in line]
    return code, {row[:34].strip(): row[35:] for row in rows}, said.err


@pytest.mark.slow
def test_a_drawing_that_fails_is_told_where_it_draws(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smudges = '{class_path: own_parts.Smudges, init_args: {prompts: ["a dog"]}}'
    code, stages, error = rehearsed(own, capsys, "--trainer.callbacks+", smudges)
    assert code == 1
    assert stages["first steps"].startswith("passed")
    assert stages["draw"].startswith("FAILED")
    assert "RuntimeError: the ink is dry at own_parts.py:9" in stages["draw"]
    assert "not reached: draw failed" in stages["checkpoint"]
    assert "draw: RuntimeError: the ink is dry" in error


@pytest.mark.slow
def test_a_run_that_forgets_is_found_by_its_losses(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, stages, error = rehearsed(own, capsys, "--trainer.callbacks+", "own_parts.Forgets")
    assert code == 1
    assert stages["stop signal, requeue, resume"].startswith("passed")
    assert stages["same losses as uninterrupted"].startswith("FAILED")
    assert "same losses as uninterrupted: losses differ by" in error


@pytest.mark.slow
def test_a_backbone_of_one_s_own_is_played_with_the_sizes_that_one_gives(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hall = ("--model.backbone", "own_parts.Hall")
    code, _, error = rehearsed(own, capsys, *hall)
    assert code == 1
    assert "model.backbone (own_parts.Hall) has 27M parameters with small sizes" in error
    assert "give small ones in a file with --small" in error
    (tmp_path / "sizes.yaml").write_text("model: {backbone: {class_path: own_parts.Hall, init_args: {rooms: 32}}}")
    small = ("--small", str(tmp_path / "sizes.yaml"))
    code, stages, error = rehearsed(own, capsys, *hall, *small, "--trainer.callbacks", "[]")  # and without an average
    assert code == 0, error
    assert stages["sample --benchmark, score"].startswith("passed")


def test_gpus_that_are_not_there_are_told(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = rehearsed(own, capsys, "--gpus", "99")
    assert code == 1
    assert "--gpus 99: this machine shows 0 GPUs" in error


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ValueError, match="--keep .* holds something already"):
        new_folder(str(tmp_path))


def test_too_little_disk_is_said_before_anything_is_played(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lidit.rehearsal.rehearse.DISK", 1e18)
    code, stages, error = rehearsed(own, capsys)
    assert code == 1
    assert list(stages) == ["parse"]
    assert "a rehearsal needs 1000000000.0 GB of disk" in error


def test_a_key_that_nobody_knows_is_told_in_one_line(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, stages, error = rehearsed(own, capsys, "--model.learning_rat", "1")
    assert (code, stages) == (2, {})
    assert len(error.splitlines()) == 1
