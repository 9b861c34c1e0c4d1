from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments.speed_denoiser import MODELS, Size, computed, counted, reached, run
from lidit.models.contracts import Text
from lidit.plan import operations

SIZE = Size(depth=2, width=64, heads=4, side=8)


@pytest.fixture
def inputs() -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 16, 8, 8), torch.rand(2), torch.randn(2, 120, 64)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_predicts_from_the_same_input(name: str, inputs: tuple[torch.Tensor, ...]) -> None:
    model = MODELS[name](SIZE)
    assert computed(model, inputs, "float32").shape == inputs[0].shape
    row = counted(model, inputs, "float32")
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    assert row["peak_mb"] > 16e-6 * row["parameters"]


def test_operations_are_those_of_the_backbone_alone(inputs: tuple[torch.Tensor, ...]) -> None:
    model = MODELS["LIDiT"](SIZE)
    x, t, text = inputs
    read = Text(text, torch.ones(2, 120, dtype=torch.bool), text.mean(1))
    _, expected = operations.counted(lambda: model.model(x, t, read))
    assert counted(model, inputs, "float32")["forward_gflop"] * 1e9 == expected > 0


def test_what_is_reached_is_reached_at_every_size() -> None:
    theirs = {"model": "PixArt", "training_over_pixart": 1.0, "peak_mb": 10}
    good = {"model": "LIDiT", "training_over_pixart": 1.2, "peak_mb": 10}
    assert all(reached([good, theirs, good, theirs]).values())
    assert list(reached([good, theirs, {**good, "training_over_pixart": 1.1, "peak_mb": 11}, theirs]).values()) == [
        False,
        False,
    ]
    assert len(reached([{**good, "peak_mb": None}, {**theirs, "peak_mb": None}])) == 1


@pytest.mark.slow
def test_all_are_timed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "speed.json"
    threads = torch.get_num_threads()
    with torch.compiler.set_stance("force_eager"):  # a C++ compiler may be missing here
        run(str(out), sizes=[(2, 64, 4, 8)], batch_size=1, rounds=2, dtypes=["float32"], compiled=[False, True])
    torch.set_num_threads(threads)
    found = json.loads(out.read_text())
    assert [row["model"] for row in found["rows"]] == 2 * list(MODELS)
    assert [row["peak_mb"] is None for row in found["rows"]] == [row["compiled"] for row in found["rows"]]
    assert found["rows"][1]["training_over_pixart"] == 1
    assert all(row["inference_gflops"] > 0 for row in found["rows"])
    assert "| LIDiT | 2 x 64 |" in capsys.readouterr().out
