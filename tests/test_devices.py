"""Drawing on the device and in the precision that is asked for, or else in that of the training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lidit.benchmark import draw
from lidit.cli import main
from lidit.devices import Compute, Machine, chosen
from lidit.eval.suite import Picture, Suite
from lidit.export import export
from lidit.pages.serve import Studio
from lidit.pipeline import Pipeline

HALF, WHOLE = torch.bfloat16, torch.float32
NO_GPU, OLD_GPU, TWO_GPUS = Machine(), Machine(1, bfloat16=False), Machine(2)


@pytest.mark.parametrize(
    ("asked", "trained", "machine", "device", "dtype", "said"),
    [
        (("auto", "auto"), "bf16-mixed", NO_GPU, "cpu", WHOLE, ""),
        (("auto", "auto"), None, NO_GPU, "cpu", WHOLE, ""),
        (("cpu", "auto"), "bf16-mixed", TWO_GPUS, "cpu", WHOLE, ""),
        (("cpu", "bfloat16"), "32-true", TWO_GPUS, "cpu", HALF, ""),
        (("auto", "auto"), "bf16-mixed", TWO_GPUS, "cuda:0", HALF, ""),
        (("cuda", "auto"), "bf16-true", TWO_GPUS, "cuda:0", HALF, ""),
        (("cuda:1", "auto"), "32-true", TWO_GPUS, "cuda:1", WHOLE, ""),
        (("auto", "float32"), "bf16-mixed", TWO_GPUS, "cuda:0", WHOLE, ""),
        (("auto", "bfloat16"), None, TWO_GPUS, "cuda:0", HALF, ""),
        (("auto", "auto"), None, TWO_GPUS, "cuda:0", WHOLE, "does not record in which precision it was trained"),
        (("auto", "auto"), "16-mixed", TWO_GPUS, "cuda:0", WHOLE, "was trained in 16-mixed: it draws in float32"),
        (("auto", "auto"), "bf16-mixed", OLD_GPU, "cuda:0", WHOLE, "which this GPU only emulates"),
        (("auto", "bfloat16"), "bf16-mixed", OLD_GPU, "cuda:0", HALF, ""),
    ],
)
def test_it_draws_as_it_was_trained_unless_something_else_is_asked_for(
    asked: tuple, trained: str | None, machine: Machine, device: str, dtype: torch.dtype, said: str
) -> None:
    found = chosen(*asked, trained, machine)
    assert (found.device, found.dtype) == (torch.device(device), dtype)
    assert said in found.note
    assert bool(found.note) == bool(said)
    assert "\n" not in found.note


def test_processes_of_a_machine_take_its_gpus_in_turn() -> None:
    found = [chosen("auto", "auto", None, Machine(2, local=i)).device.index for i in range(4)]
    assert found == [0, 1, 0, 1]
    assert chosen("cuda:1", "auto", None, Machine(2, local=0)).device.index == 1


@pytest.mark.parametrize(
    ("asked", "machine", "message"),
    [
        ("cuda", NO_GPU, "torch sees no GPU here; say --device cpu"),
        ("cuda:0", NO_GPU, "torch sees no GPU here"),
        ("cuda:2", TWO_GPUS, "there is no such GPU; torch sees cuda:0 to cuda:1"),
        ("cuda:1", OLD_GPU, "torch sees cuda:0 alone"),
        ("tpu", TWO_GPUS, "say auto, cpu, cuda, or cuda:1"),
        ("cuda:", TWO_GPUS, "say auto, cpu, cuda, or cuda:1"),
        ("cuda:-1", TWO_GPUS, "say auto, cpu, cuda, or cuda:1"),
        ("cuda1", TWO_GPUS, "say auto, cpu, cuda, or cuda:1"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_the_fix(asked: str, machine: Machine, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chosen(asked, "auto", None, machine)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("verb", ["sample x", "sample --benchmark scenes-heldout", "serve --port 0"])
@pytest.mark.parametrize("device", ["cuda", "tpu"])
def test_every_verb_that_draws_refuses_it_in_one_line(
    verb: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    if verb.startswith("serve"):
        pytest.importorskip("gradio")
    monkeypatch.chdir(tmp_path)
    out = [] if verb.startswith("serve") else ["--out", "out"]
    assert main([*verb.split(), *out, "--device", device]) == 1
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lidit: error: ")]
    assert f"--device {device}" in message
    assert list(tmp_path.iterdir()) == []


def test_only_a_gpu_lets_float32_products_use_tf32(caplog: pytest.LogCaptureFixture) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        Compute(torch.device("cpu")).prepare()
        assert torch.get_float32_matmul_precision() == before == "highest"
        assert not caplog.records
        Compute(torch.device("cuda", 0), note="told").prepare()
        assert torch.get_float32_matmul_precision() == "high"
        assert [record.message for record in caplog.records] == ["told"]
    finally:
        torch.set_float32_matmul_precision(before)


def seen(pipeline: Pipeline) -> tuple[set[torch.dtype], np.ndarray]:
    """The dtypes that a linear layer of a block gives while a picture is drawn, and the picture."""
    found = set()
    layer = pipeline.model.backbone.blocks[0].mlp[0]
    hook = layer.register_forward_hook(lambda module, inputs, output: found.add(output.dtype))
    (image,) = pipeline(["a red circle"], [0], (32, 32), steps=3)
    hook.remove()
    return found, image


def test_in_bfloat16_blocks_compute_in_it_and_weights_and_latents_stay(tiny_checkpoint: Path) -> None:
    half = Pipeline.load(str(tiny_checkpoint), device="cpu", dtype="bfloat16")
    found, image = seen(half)
    assert found == {HALF}
    assert {p.dtype for p in half.model.parameters()} == {WHOLE}
    assert half.latents(["x"], half.noise([0], 32, 32), steps=1).dtype == WHOLE
    found, expected = seen(Pipeline.load(str(tiny_checkpoint), device="cpu"))
    assert found == {WHOLE}
    difference = np.abs(image.astype(int) - expected)
    assert 0 < difference.max() < 32
    assert not torch.is_autocast_enabled("cpu")


def test_on_a_cpu_the_default_draws_bit_for_bit_in_float32_also_what_was_trained_in_bfloat16(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    content = torch.load(tiny_checkpoint, weights_only=True)
    assert content["precision"] == "32-true"
    torch.save(content | {"precision": "bf16-mixed"}, tmp_path / "half.ckpt")
    torch.save({k: v for k, v in content.items() if k != "precision"}, tmp_path / "older.ckpt")
    found, expected = seen(Pipeline.load(str(tiny_checkpoint), device="cpu", dtype="float32"))
    assert found == {WHOLE}
    for name in ("half", "older"):
        found, image = seen(Pipeline.load(str(tmp_path / f"{name}.ckpt"), device="cpu"))
        assert found == {WHOLE}
        assert np.array_equal(image, expected)


def test_an_export_keeps_the_precision_of_the_training_or_that_it_is_unknown(
    tiny_checkpoint: Path, exported: Path, tmp_path: Path
) -> None:
    assert json.loads((exported / "config.json").read_text())["precision"] == "32-true"
    content = torch.load(tiny_checkpoint, weights_only=True)
    del content["precision"]
    torch.save(content, tmp_path / "older.ckpt")
    export(str(tmp_path / "older.ckpt"), str(tmp_path / "out"))
    assert "precision" not in json.loads((tmp_path / "out/config.json").read_text())


def test_a_picture_says_its_precision(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    options = ["--steps", "1", "--size", "16x16", "--device", "cpu", "--dtype", "bfloat16"]
    assert main(["sample", "x", "--out", str(out), "--checkpoint", str(tiny_checkpoint), *options]) == 0
    assert Image.open(out).text["dtype"] == "bfloat16"


def test_pictures_of_a_benchmark_are_all_in_one_precision(tiny_checkpoint: Path, tmp_path: Path) -> None:
    suite = Suite("test", [Picture("a.png", "a red circle")], {}, {})
    settings = {"checkpoint": str(tiny_checkpoint), "steps": 1, "size": "32x32", "device": "cpu"}
    draw(suite, str(tmp_path / "run"), **settings)
    provenance = tmp_path / "run/provenance.json"
    said = json.loads(provenance.read_text())
    assert said.pop("dtype") == "float32"
    with pytest.raises(ValueError, match=r"begun otherwise.*dtype was 'float32' and is 'bfloat16'"):
        draw(suite, str(tmp_path / "run"), dtype="bfloat16", **settings)
    provenance.write_text(json.dumps(said))  # as earlier versions wrote it
    draw(suite, str(tmp_path / "run"), **settings)
    draw(suite, str(tmp_path / "half"), dtype="bfloat16", **settings)
    first, second = ((tmp_path / name / "a.png").read_bytes() for name in ("run", "half"))
    assert first != second


def test_the_page_draws_in_the_precision_that_is_asked_for(tiny_checkpoint: Path) -> None:
    studio = Studio([str(tiny_checkpoint)], 64, device="cpu", dtype="bfloat16")
    (pipeline,) = studio.pipelines.values()
    (expected,) = pipeline(["a red circle"], [3], (32, 32), steps=2)
    (drawn,) = studio.draw("a red circle", 3, 2, 3.0, None, 32, 32)
    assert pipeline.dtype == HALF
    assert np.abs(drawn.image.astype(int) - expected.astype(int)).max() <= 1  # the page decodes every step
    (exact,) = Pipeline.load(str(tiny_checkpoint), device="cpu")(["a red circle"], [3], (32, 32), steps=2)
    assert not np.array_equal(drawn.image, exact)
