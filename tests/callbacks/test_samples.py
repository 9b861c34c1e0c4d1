"""Pictures drawn during training are those of the checkpoint, and training does not notice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lidit.callbacks.judge import JudgedSamples
from lidit.callbacks.samples import Samples
from lidit.pictures import GAP
from lidit.pipeline import Pipeline
from lidit.scenes import benchmarks

PROMPTS = ["a red circle", "a blue square", "a green star"]
SAMPLES = {
    "class_path": "lidit.callbacks.samples.Samples",
    "init_args": {"prompts": PROMPTS, "every_n_steps": 2, "seed": 7, "size": "32x16", "steps": 2},
}
JUDGED = {
    "class_path": "lidit.callbacks.judge.JudgedSamples",
    "init_args": {"count_per_task": 2, "every_n_steps": 2, "size": "32x32", "steps": 1},
}
EMA = {"class_path": "lidit.callbacks.ema.EMA", "init_args": {"decay": 0.9}}


def tiles(file: Path, count: int, width: int, height: int) -> list[np.ndarray]:
    """The images of a grid."""
    picture = np.asarray(Image.open(file))
    columns = (picture.shape[1] - GAP) // (width + GAP)
    corners = [(GAP + i // columns * (height + GAP), GAP + i % columns * (width + GAP)) for i in range(count)]
    return [picture[y : y + height, x : x + width] for y, x in corners]


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


@pytest.mark.parametrize("ema", [True, False])
def test_a_grid_shows_what_the_checkpoint_of_its_step_draws(
    built: Callable, loader: Callable, tmp_path: Path, ema: bool
) -> None:
    save = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": str(tmp_path), "every_n_train_steps": 2, "filename": "{step}", "save_top_k": -1},
    }
    cli = built(*([EMA] if ema else []), SAMPLES, save, max_steps=4, enable_checkpointing=True)
    cli.trainer.fit(cli.model, loader(4))
    for step in (2, 4):
        (file,) = tmp_path.rglob(f"samples/step-{step:06d}.png")
        drawn = Pipeline.load(str(tmp_path / f"step={step}.ckpt"), ema)(PROMPTS, [7, 8, 9], (32, 16), steps=2)
        assert all(np.array_equal(a, b) for a, b in zip(tiles(file, 3, 32, 16), drawn, strict=True))
        assert Image.open(file).text["prompts"].splitlines() == PROMPTS


class Dice(Samples):
    """Uses up random numbers."""

    def scores(self, images: list[np.ndarray]) -> dict[str, float]:
        return {"dice": float(torch.rand(3).sum() + np.random.rand())}


def test_training_is_bitwise_the_same_with_and_without_samples(built: Callable, loader: Callable) -> None:
    ends = []
    for callbacks in ([EMA, SAMPLES, JUDGED], [EMA]):
        cli = built(*callbacks, max_steps=5)
        if len(callbacks) > 1:
            cli.trainer.callbacks.append(Dice(PROMPTS, every_n_steps=1, size="16x16", steps=1, folder="dice"))
        cli.trainer.fit(cli.model, loader(5))
        ends.append(weights(cli.model))
        assert all(module.training for module in cli.model.modules())
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_samples_come_every_n_steps_and_once_at_the_end(built: Callable, loader: Callable, tmp_path: Path) -> None:
    cli = built(SAMPLES, max_steps=5, accumulate_grad_batches=2)
    cli.trainer.fit(cli.model, loader(10))
    files = sorted(path.name for path in tmp_path.rglob("samples/*"))
    assert files == ["step-000002.png", "step-000004.png", "step-000005.png"]


def test_tensorboard_gets_the_grid_and_the_scores(built: Callable, loader: Callable, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": str(tmp_path)}}
    cli = built(JUDGED, max_steps=2, logger=logger)
    cli.trainer.fit(cli.model, loader(2))
    events = EventAccumulator(cli.trainer.log_dir)
    events.Reload()
    assert [image.step for image in events.Images("judged")] == [2]
    assert [score.step for score in events.Scalars("judge/overall")] == [2]


def test_the_logged_scores_are_those_of_the_images_in_the_grid(
    built: Callable, loader: Callable, logged: Callable, tmp_path: Path
) -> None:
    cli = built(JUDGED, max_steps=2)
    cli.trainer.fit(cli.model, loader(2))
    questions = benchmarks.prompts("heldout", 2, 0)
    (file,) = tmp_path.rglob("judged/step-000002.png")
    scores = benchmarks.score("heldout", questions, tiles(file, len(questions), 32, 32))
    assert set(scores) == {"single", "two", "position", "counting", "overall"}
    assert {name: logged(f"judge/{name}") for name in scores} == {name: {2: value} for name, value in scores.items()}


def test_a_right_picture_is_judged_right() -> None:
    from lidit.scenes.draw import Object, Scene, draw

    callback = JudgedSamples("geneval", count_per_task=1, steps=1)
    (question,) = [q for q in callback.questions if q.task == "colors"]
    look = question.facts[0].look
    right = draw(Scene((Object(look.shape, look.color, "plain", "large", 0, 0),)), 32, 32, seed=0)
    images = [right if q is question else np.zeros((32, 32, 3), np.uint8) for q in callback.questions]
    scores = callback.scores(images)
    assert scores["judge/colors"] == 1
    assert sum(scores.values()) == pytest.approx(1 + 1 / 6)  # the six tasks and their mean


@pytest.mark.parametrize(
    ("wrong", "message"), [({"size": "40x32"}, "40x32 is not divisible by 16"), ({"sampler": "ddim"}, "ddim")]
)
def test_what_the_model_cannot_draw_is_refused_before_training(
    built: Callable, loader: Callable, wrong: dict, message: str
) -> None:
    cli = built({**SAMPLES, "init_args": SAMPLES["init_args"] | wrong}, max_steps=2)
    with pytest.raises(ValueError, match=message):
        cli.trainer.fit(cli.model, loader(2))
    assert cli.trainer.global_step == 0


@pytest.mark.parametrize("wrong", [{"every_n_steps": 0}, {"steps": 0}, {"prompts": []}, {"size": "64"}])
def test_settings_that_make_no_sense_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"at least|WIDTHxHEIGHT"):
        Samples(**{"prompts": PROMPTS} | wrong)


def test_an_option_that_does_not_exist_is_refused(built: Callable, capsys: pytest.CaptureFixture) -> None:
    for callback in (SAMPLES, JUDGED):
        with pytest.raises(SystemExit):
            built({**callback, "init_args": callback["init_args"] | {"evry_n_steps": 5}})
        assert "evry_n_steps" in capsys.readouterr().err
