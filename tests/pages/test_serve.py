"""What the page does, without the page."""

from __future__ import annotations

from pathlib import Path
from socket import create_server

import numpy as np
import pytest

from lidit.cli import main
from lidit.pages.serve import MOST_STEPS, STRIP, Studio, ends, page
from lidit.pipeline import Pipeline

SETTINGS = {"steps": 10, "guidance": 3.0, "sampler": None, "width": 32, "height": 32}


@pytest.fixture(scope="module")
def studio(tiny_checkpoint: Path) -> Studio:
    return Studio([str(tiny_checkpoint)], longest_side=64)


def test_it_draws_what_lidit_sample_draws_and_shows_the_way_there(studio: Studio, tiny_checkpoint: Path) -> None:
    (drawn,) = studio.draw("a red circle", 3, **SETTINGS)
    (expected,) = Pipeline.load(str(tiny_checkpoint))(["a red circle"], [3], (32, 32), steps=10)
    assert np.abs(drawn.image.astype(int) - expected).max() <= 1
    assert drawn.strip.shape == (32, 32 * STRIP, 3)
    last = drawn.strip[:, -32:].astype(int)  # the last step's clean latent is the picture
    assert np.abs(last - drawn.image).max() <= 1  # decoded in one batch, equal latents may round otherwise


def test_two_models_draw_from_the_same_noise(studio: Studio, tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "same.ckpt"
    copy.write_bytes(tiny_checkpoint.read_bytes())
    one, two = Studio([str(tiny_checkpoint), str(copy)], 64).draw("a red circle", 3, **SETTINGS)
    assert np.array_equal(one.image, two.image)


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ("  ", {}, "Write what to draw"),
        ("a" * 2001, {}, "has 2001 characters; write at most 2000"),
        ("a", {"width": 96}, "96x32 is too large; no side may be above 64 pixels"),
        ("a", {"width": 33}, "33x32 is not divisible by"),
        ("a", {"width": 0}, "0x32 is not divisible by"),
        ("a", {"steps": MOST_STEPS + 1}, "Take 1 to 100 steps, not 101"),
        ("a", {"seed": -1}, r"Take a seed from 0 to 2\^63, not -1"),
        ("a", {"seed": 10**30}, r"Take a seed from 0 to 2\^63, not 1000000"),
        ("a", {"sampler": "ddim"}, "needs noise and this model predicts velocity"),
    ],
)
def test_what_cannot_be_drawn_gets_a_message(studio: Studio, prompt: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        studio.draw(prompt, **{"seed": 0} | SETTINGS | changes)


def test_tokens_are_marked_as_kept_or_cut_and_are_no_markup(studio: Studio) -> None:
    shown = studio.tokens("a <b>red</b> circle")
    assert "<b>red" not in shown
    assert '<span class="cut">' in shown
    assert '<span class="kept">' in shown
    assert "tokens too long" not in shown
    assert "tokens too long</b>, the end is cut at" in studio.tokens("red " * 400)


@pytest.mark.parametrize(
    ("paths", "shown"),
    [
        (["bundled:lidit"], ["bundled:lidit"]),
        (["runs/a.ckpt", "runs/b.ckpt"], ["a.ckpt", "b.ckpt"]),
        (["runs/a/checkpoints/latest", "runs/b/checkpoints/latest"], ["a/checkpoints/latest", "b/checkpoints/latest"]),
        (["a/latest", "latest"], ["a/latest", "latest"]),
    ],
)
def test_models_are_named_by_what_tells_them_apart(paths: list[str], shown: list[str]) -> None:
    assert ends(paths) == shown


def test_nothing_passes_by_the_queue_and_an_empty_field_gets_a_message(studio: Studio) -> None:
    gradio = pytest.importorskip("gradio", reason="no gradio: pip install 'lidit[serve]'")
    from gradio.routes import App
    from starlette.testclient import TestClient

    blocks = page(studio, queue=2)
    with TestClient(App.create_app(blocks)) as client:
        given = {"data": ["a red circle", 0, 2, 3, "euler", 32, 32]}
        said = client.post("/gradio_api/run/draw", json=given)
    assert said.status_code >= 400, "one that does not wait in the queue is let through"
    (draw,) = (each.fn for each in blocks.fns.values() if each.api_name == "draw")
    with pytest.raises(gradio.Error, match="one of them is empty"):
        draw("a red circle", 0, 2, 3, "euler", None, 32)


def test_a_taken_port_is_one_line(capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("gradio", reason="no gradio: pip install 'lidit[serve]'")
    with create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 1
    assert f"cannot listen on port {port} of 127.0.0.1" in capsys.readouterr().err


def test_three_models_do_not_fit(capsys: pytest.CaptureFixture) -> None:
    assert main(["serve", "--checkpoints", '["a", "b", "c"]']) == 1
    assert "3 models do not fit side by side" in capsys.readouterr().err
