"""Commands are played to their end, and one that fails or hangs is explained in a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lidit.rehearsal.play import Failed, Player, last_error

CALLBACKS = """
import faulthandler, time
from lightning.pytorch import Callback

class Sleeps(Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_rank == 1:
            time.sleep(600)

class Breaks(Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_rank == 1:
            raise RuntimeError("a wire is loose")
"""


@pytest.fixture
def player(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Player:
    (tmp_path / "own_callbacks.py").write_text(CALLBACKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return Player(tmp_path / "logs", timeout=20.0)


def test_what_a_command_prints_is_in_its_log(player: Player) -> None:
    assert player("version", ["--version"]).read_text().startswith("lidit ")


def test_an_error_of_a_command_is_told_with_its_place(player: Player) -> None:
    with pytest.raises(
        Failed, match=r"ValueError: --n is 0: draw at least one image.* at sample\.py:\d+ \[sample\.log\]"
    ):
        player("sample", ["sample", "a dog", "--n", "0"])


def test_another_exit_code_than_expected_is_told(player: Player) -> None:
    with pytest.raises(Failed, match="exit code 0"):
        player("version", ["--version"], expected=75)


@pytest.mark.slow
def test_a_run_that_hangs_is_ended_and_every_rank_says_where_it_stands(player: Player, tiny_recipe: Path) -> None:
    more = ["--trainer.callbacks+", "own_callbacks.Sleeps", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    with pytest.raises(Failed, match="hangs: ended after 20 s; the stacks of all ranks are in"):
        player("hang", ["fit", "--config", str(tiny_recipe), "--trainer.callbacks", "[]", *more], ranks=2)
    said = [(player.logs / f"hang-rank-{rank}.log").read_text() for rank in (0, 1)]
    assert "most recent call first" in said[0]
    assert "most recent call first" in said[1]
    assert "own_callbacks.py" in said[1]
    assert "own_callbacks.py" not in said[0]


@pytest.mark.slow
def test_of_several_ranks_the_one_that_failed_is_told(player: Player, tiny_recipe: Path) -> None:
    more = ["--trainer.callbacks+", "own_callbacks.Breaks", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    with pytest.raises(Failed, match=r"RuntimeError: a wire is loose at own_callbacks\.py:13 \[break-rank-1\.log\]"):
        player("break", ["fit", "--config", str(tiny_recipe), "--trainer.callbacks", "[]", *more], ranks=2)


def test_the_last_error_of_a_log_has_the_line_of_our_own_code() -> None:
    lines = [
        "Traceback (most recent call last):",
        '  File "/home/me/mine/net.py", line 12, in forward',
        '  File "/venv/lib/python3.11/site-packages/torch/nn/modules/linear.py", line 7, in forward',
        "RuntimeError: mat1 and mat2 must have the same dtype, but got Float and BFloat16",
    ]
    assert last_error(lines) == (lines[-1], " at net.py:12")
    assert last_error(["all is well"]) == ("", "")
