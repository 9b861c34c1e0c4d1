"""What the page does, without the page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lidit.cli import main
from lidit.pipeline import Pipeline
from lidit.serve import MOST_STEPS, STRIP, Studio

SETTINGS = {"steps": 10, "guidance": 3.0, "sampler": None, "width": 32, "height": 32}


@pytest.fixture(scope="module")
def studio(tiny_checkpoint: Path) -> Studio:
    return Studio([str(tiny_checkpoint)], longest_side=64)


def test_it_draws_what_lidit_sample_draws_and_shows_the_way_there(studio: Studio, tiny_checkpoint: Path) -> None:
    (drawn,) = studio.draw("a red circle", 3, **SETTINGS)
    (expected,) = Pipeline.load(str(tiny_checkpoint))(["a red circle"], [3], (32, 32), steps=10)
    assert np.abs(drawn.image.astype(int) - expected).max() <= 1
    assert drawn.strip.shape == (32, 32 * STRIP, 3)
    assert np.array_equal(drawn.strip[:, -32:], drawn.image)  # the last step's clean latent is the picture


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
        ("a", {"width": 33}, "33x32 does not divide by"),
        ("a", {"width": 0}, "0x32 does not divide by"),
        ("a", {"steps": MOST_STEPS + 1}, "Take 1 to 100 steps, not 101"),
        ("a", {"sampler": "ddim"}, "asks for noise and this model predicts velocity"),
    ],
)
def test_what_cannot_be_drawn_gets_a_message(studio: Studio, prompt: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        studio.draw(prompt, 0, **SETTINGS | changes)


def test_tokens_are_marked_as_kept_or_cut_and_are_no_markup(studio: Studio) -> None:
    shown = studio.tokens("a <b>red</b> circle")
    assert "<b>red" not in shown
    assert '<span class="cut">' in shown
    assert '<span class="kept">' in shown
    assert "tokens too long" not in shown
    assert "tokens too long</b>, the end is cut at" in studio.tokens("red " * 400)


def test_three_models_do_not_fit(capsys: pytest.CaptureFixture) -> None:
    assert main(["serve", "--checkpoints", '["a", "b", "c"]']) == 1
    assert "3 models do not fit side by side" in capsys.readouterr().err
