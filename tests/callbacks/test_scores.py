"""CLIP and SigLIP scores in training are those of the checkpoint's pictures, and training does not notice."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import open_clip
import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file

from lidit.callbacks.scores import CLIPScoreCallback, SigLIPScoreCallback
from lidit.eval.metrics import CLIPScore
from lidit.eval.openclip import OpenCLIP
from lidit.module import TextToImage
from lidit.pipeline import Pipeline

SETS = {"colors": ["a red circle", "a blue square"], "counts": ["three green stars"]}
EMA = {"class_path": "lidit.callbacks.ema.EMA", "init_args": {"decay": 0.9}}
VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 16, "width": 32, "heads": 2, "layers": 1, "vocab_size": 49408}


def encoder(folder: Path, bias: float | None) -> str:
    """A folder with a CLIP of random weights, or with a logit bias a SigLIP."""
    folder.mkdir()
    torch.manual_seed(0)
    config = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT} | (
        {} if bias is None else {"init_logit_bias": bias}
    )
    weights = {name: p.contiguous() for name, p in open_clip.CLIP(**config).state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return str(folder)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("encoders")
    return encoder(folder / "clip", None), encoder(folder / "siglip", -10.0)


def callbacks(encoders: tuple[str, str], **settings: object) -> list[dict]:
    drawn = {"prompt_sets": SETS, "every_n_steps": 2, "seed": 7, "size": "32x16", "steps": 2, **settings}
    names = ("CLIPScoreCallback", "SigLIPScoreCallback")
    return [
        {"class_path": f"lidit.callbacks.scores.{name}", "init_args": {"pretrained": folder, **drawn}}
        for name, folder in zip(names, encoders, strict=True)
    ]


def logged(folder: Path, column: str) -> dict[int, float]:
    (metrics,) = folder.rglob("metrics.csv")
    with metrics.open() as file:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row.get(column)}


@pytest.fixture
def trained(built: Callable, loader: Callable, tmp_path: Path, encoders: tuple[str, str], monkeypatch, caplog):
    """A run of five steps with both callbacks, and how often pictures were drawn."""
    drawings = []
    original = Pipeline.__call__
    monkeypatch.setattr(Pipeline, "__call__", lambda self, *a, **k: drawings.append(1) or original(self, *a, **k))
    save = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": str(tmp_path), "every_n_train_steps": 2, "filename": "{step}", "save_top_k": -1},
    }
    cli = built(EMA, *callbacks(encoders), save, max_steps=5, enable_checkpointing=True)
    with caplog.at_level("INFO"):
        cli.trainer.fit(cli.model, loader(5))
    return SimpleNamespace(folder=tmp_path, drawings=len(drawings), said=caplog.text, encoders=encoders)


def test_the_scores_are_those_of_the_checkpoints_pictures_by_set(trained: SimpleNamespace) -> None:
    pipeline = Pipeline.load(str(trained.folder / "step=4.ckpt"))
    images = pipeline([p for prompts in SETS.values() for p in prompts], [7, 8, 9], (32, 16), steps=2)
    metric = CLIPScore(OpenCLIP(pretrained=trained.encoders[0]))
    for which, found in (("colors", images[:2]), ("counts", images[2:])):
        metric.reset()
        metric.update(found, SETS[which])
        assert logged(trained.folder, f"clip_score/{which}")[4] == pytest.approx(float(metric.compute()), abs=1e-4)


def test_both_scores_come_every_n_steps_and_at_the_end_from_one_drawing(trained: SimpleNamespace) -> None:
    for name in ("clip_score/colors", "clip_score/counts", "siglip_score/colors", "siglip_score/counts"):
        assert list(logged(trained.folder, name)) == [2, 4, 5]
    assert trained.drawings == 3


def test_the_cost_is_told_at_the_end(trained: SimpleNamespace) -> None:
    assert "clip_score: scored 3 times in " in trained.said
    assert "siglip_score: scored 3 times in " in trained.said
    assert "% of the training time; every_n_steps is 2" in trained.said


def test_no_checkpoint_mentions_a_scorer(trained: SimpleNamespace) -> None:
    checkpoint = torch.load(trained.folder / "step=4.ckpt", weights_only=True)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"prompt_encoder", "backbone"}
    assert not any("Score" in name for name in checkpoint["callbacks"])


def test_training_is_bitwise_the_same_with_scores(built: Callable, loader: Callable, encoders: tuple[str, str]) -> None:
    ends = []
    for scored in ([], callbacks(encoders)):
        cli = built(EMA, *scored, max_steps=4)
        cli.trainer.fit(cli.model, loader(4))
        ends.append([p.detach().clone() for p in cli.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_callbacks_that_draw_otherwise_share_nothing(encoders: tuple[str, str]) -> None:
    first = CLIPScoreCallback(SETS, pretrained=encoders[0], steps=2)
    assert first.same_images(SigLIPScoreCallback(SETS, pretrained=encoders[1], steps=2, every_n_steps=7))
    for other in ({"steps": 3}, {"seed": 1}, {"size": "32x32"}, {"guidance": 1.0}):
        assert not first.same_images(SigLIPScoreCallback(SETS, pretrained=encoders[1], **{"steps": 2, **other}))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_ranks_draw_equally_many_and_each_prompt_is_scored_once(encoders: tuple[str, str], world: int) -> None:
    callback = CLIPScoreCallback({"a": [f"{i} stars" for i in range(5)]}, pretrained=encoders[0])
    drawn, kept = [], []

    def draw(trainer: object, module: object, which: list[int]) -> list[np.ndarray]:
        drawn.append(len(which))
        return [np.full((2, 2, 3), i, np.uint8) for i in which]

    callback.draw = draw
    for rank in range(world):
        share = callback._share(Mock(spec=Trainer, world_size=world, global_rank=rank), Mock(spec=TextToImage))
        assert all(image[0, 0, 0] == i for i, image in share.items())
        kept += share
    assert len(set(drawn)) == 1
    assert sorted(kept) == list(range(5))


def test_an_empty_set_is_refused(encoders: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="prompt set 'b' of CLIPScoreCallback is empty"):
        CLIPScoreCallback({"a": ["a star"], "b": []}, pretrained=encoders[0])
