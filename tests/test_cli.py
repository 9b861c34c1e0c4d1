from __future__ import annotations

import os
import resource
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import lidit
from lidit.arguments import brief
from lidit.cli import main
from lidit.verbs import RECIPES, VERBS

PAINT = '''
"""A module with a verb."""
from __future__ import annotations
import sys
from typing import Literal

CALLS = []

def paint(title: str, times: int = 1, loud: bool = False, sizes: tuple[str, ...] = ("64x64",),
          mode: Literal["oil", "chalk"] | None = None) -> None:
    """Paint a title.

    Args:
        title: what is painted.
        times: how often.
        loud: with music.
        sizes: of the canvas.
        mode: of painting.
    """
    if title == "nothing":
        raise ValueError("nothing cannot be painted;\\n  paint something")
    if title == "file":
        open("there/is/no/such/file")
    if title == "interrupt":
        raise KeyboardInterrupt
    if title == "bug":
        assert times > 1, "a bug of ours"
    if title == "shut down":
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)
    CALLS.append((title, times, loud, sizes, mode))

def doodle(where: str | None = None, times: int = 1) -> None:
    """Doodle."""
    CALLS.append((where, times))
'''


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Two verbs of a module outside lidit, and what their functions were called with."""
    (tmp_path / "painting.py").write_text(PAINT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "painting", raising=False)
    monkeypatch.setitem(VERBS, "paint", ("painting:paint", "paint a title"))
    monkeypatch.setitem(VERBS, "doodle", ("painting:doodle", "doodle"))
    return import_module("painting").CALLS


def complaint(capsys: pytest.CaptureFixture) -> str:
    """The one line on stderr, without its prefix."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("lidit: error: ")
    return lines[0].removeprefix("lidit: error: ")


@pytest.mark.parametrize("argv", [["--help"], ["-h"], [], ["prep", "--help"]])
def test_help_takes_less_than_a_second_and_imports_no_torch(argv: list[str]) -> None:
    code = (
        "import sys; from lidit.cli import main\n"
        f"code = main({argv}); heavy = {{'torch', 'lightning', 'jsonargparse', 'numpy'}} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stderr) == (0, "")
    # processor time: the wall clock of a busy machine says nothing about us
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    listed = [verb for verb in VERBS if not argv or argv[0] != "prep" or verb.startswith("prep ")]
    assert [verb for verb in VERBS if f"lidit {verb} " in done.stdout] == listed


def test_python_m_lidit_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "lidit", "smaple"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "lidit: error: there is no verb 'smaple'; did you mean `lidit sample`?\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_in_the_help_has_its_function(verb: str) -> None:
    module, name = VERBS[verb][0].split(":")
    assert getattr(import_module(module), name).__doc__


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["smaple", "a red circle"], "there is no verb 'smaple'; did you mean `lidit sample`?"),
        (["prep", "sahrd", "--out", "x"], "there is no verb 'prep sahrd'; did you mean `lidit prep shard`?"),
        (["qqqq"], "there is no verb 'qqqq'; `lidit --help` lists the verbs"),
        (["--verbose"], "there is no verb '--verbose'; `lidit --help` lists the verbs"),
    ],
)
def test_an_unknown_verb_is_named_with_the_nearest(argv: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(argv) == 2
    assert complaint(capsys) == said


@pytest.mark.parametrize(
    ("argv", "call"),
    [
        (["a red circle"], ("a red circle", 1, False, ("64x64",), None)),
        (["--title", "a red circle"], ("a red circle", 1, False, ("64x64",), None)),
        (["--times", "3", "a red circle", "--loud=true"], ("a red circle", 3, True, ("64x64",), None)),
        (["a=b: {c}", "--sizes", "[64x64, 96x64]"], ("a=b: {c}", 1, False, ("64x64", "96x64"), None)),
        (["12", "--mode=oil"], ("12", 1, False, ("64x64",), "oil")),
    ],
)
def test_a_typed_function_is_a_verb(argv: list[str], call: tuple, calls: list[tuple]) -> None:
    assert main(["paint", *argv]) == 0
    assert calls == [call]


def test_without_required_arguments_the_first_may_be_bare(calls: list[tuple]) -> None:
    assert [main(["doodle"]), main(["doodle", "here", "--times", "2"])] == [0, 0]
    assert calls == [(None, 1), ("here", 2)]


def test_arguments_may_come_from_a_file(calls: list[tuple], tmp_path: Path) -> None:
    (tmp_path / "paint.yaml").write_text("title: a blue square\ntimes: 4\n")
    assert main(["paint", "--config", str(tmp_path / "paint.yaml"), "--times", "5"]) == 0
    assert calls == [("a blue square", 5, False, ("64x64",), None)]


def test_the_docstring_is_the_help(calls: list[tuple], capsys: pytest.CaptureFixture) -> None:
    assert main(["paint", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Paint a title." in text
    assert "what is painted." in text
    assert calls == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["x", "--tiems=3"], "there is no option --tiems; did you mean --times?"),
        (["x", "--tim", "3"], "there is no option --tim; did you mean --times?"),
        (["x", "--times=many"], "times: expected int, got many"),
        (["x", "--mode=ink"], "mode: expected 'oil' or 'chalk', got ink"),
        (["x", "--sizes=64x64"], "sizes: expected tuple, got 64x64"),
        (["x", "--loud"], "argument --loud: expected one argument"),
        (["x", "--config=/nowhere.yaml"], "config: File does not exist: '/nowhere.yaml'"),
        (["a", "red", "circle"], "'red' is one word too many after title; quote what contains spaces"),
        ([], "missing: title; give it by name or in a --config FILE"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    argv: list[str], said: str, calls: list[tuple], capsys: pytest.CaptureFixture
) -> None:
    assert main(["paint", *argv]) == 2
    assert complaint(capsys) == said
    assert calls == []


@pytest.mark.parametrize(
    ("title", "said"),
    [
        ("nothing", "nothing cannot be painted; paint something"),
        ("file", "[Errno 2] No such file or directory: 'there/is/no/such/file'"),
    ],
)
def test_what_is_wrong_with_the_input_is_one_line(
    title: str, said: str, calls: list[tuple], capsys: pytest.CaptureFixture
) -> None:
    assert main(["paint", title]) == 1
    assert complaint(capsys) == said


def test_a_traceback_is_there_for_who_wants_it(calls: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIDIT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="cannot be painted"):
        main(["paint", "nothing"])


def test_a_bug_of_ours_is_no_error_of_the_user(calls: list[tuple]) -> None:
    with pytest.raises(AssertionError, match="a bug of ours"):
        main(["paint", "bug"])


@pytest.mark.parametrize("title", ["interrupt", "shut down"])  # at once, and after Lightning has put things away
def test_an_interrupt_is_told_by_the_exit_code(title: str, calls: list[tuple]) -> None:
    assert main(["paint", title]) == 130


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trainer.max_stesp": 3}, "there is no option --trainer.max_stesp; did you mean --trainer.max_steps?"),
        ({"trainer.max_st": 3}, "there is no option --trainer.max_st; did you mean --trainer.max_steps?"),
        ({"data.batch_size": "many"}, "data.batch_size: expected int, got many"),
        ({"model.learning_rat": 0.1}, "there is no option --model.learning_rat; did you mean --model.learning_rate?"),
        ({"model.backbone.init_args.widht": 3}, "model.backbone: there is no key 'widht'; did you mean width?"),
        ({"model.backbone.init_args.depth": "x"}, "model.backbone.depth: expected int, got x"),
        ({"model.llms": [{"name": "x", "leyer": 3}]}, "model.llms: there is no key 'leyer'; did you mean layer?"),
        (
            {"model.objective": {"class_path": "lidit.objectives.RectifiedFow"}},
            "model.objective: there is no lidit.objectives.RectifiedFow; did you mean RectifiedFlow?",
        ),
        (
            {"model.objective": "Flow"},
            "model.objective: expected a class by its import path, such as lidit.models.x.Y, got Flow",
        ),
        (
            {"trainer.callbacks": [{"class_path": "lidit.callbacks.ema.EMA", "init_args": {"decya": 0.5}}]},
            "trainer.callbacks: there is no key 'decya'; did you mean decay?",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_before_any_work(
    change: dict, said: str, tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = yaml.safe_load(tiny_recipe.read_text())
    for key, value in change.items():
        *sections, name = key.split(".")
        place = recipe
        for section in sections:
            place = place[section]
        place[name] = value
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert complaint(capsys) == said
    assert os.listdir(tmp_path) == ["recipe.yaml"]


def test_what_a_recipe_lacks_is_listed(capsys: pytest.CaptureFixture) -> None:
    assert main(["fit", "--model.learning_rate=1"]) == 2
    assert complaint(capsys).startswith("missing: model.llms, model.vae, ")


def test_a_recipe_that_cannot_be_honoured_is_an_error_of_the_user(
    tiny_recipe: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["fit", "--config", str(tiny_recipe), "--trainer.val_check_interval=1.5"]) == 1
    assert "val_check_interval" in capsys.readouterr().err


def test_a_run_without_loggers_of_its_own_writes_one_folder(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = yaml.safe_load(tiny_recipe.read_text())
    del recipe["trainer"]["logger"], recipe["trainer"]["callbacks"]
    recipe["trainer"] |= {"max_steps": 1, "limit_val_batches": 0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    for run in ("version_0", "version_1"):
        assert main(["fit", "--config", "recipe.yaml"]) == 0
        assert sorted(os.listdir("runs/fit"))[-1] == run
        names = [name.split(".")[0] for name in os.listdir(f"runs/fit/{run}")]
        assert {"config", "metrics", "events"} <= set(names)


def test_a_recipes_only_logger_writes_into_the_runs_folder(tiny_recipe: Path, tmp_path: Path) -> None:
    short = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]
    assert main(["fit", "--config", str(tiny_recipe), "--run", str(tmp_path / "run"), *short]) == 0
    assert lidit.Run(tmp_path / "run").metrics["train/loss"].notna().any()


def test_a_message_of_another_form_is_kept_in_one_line() -> None:
    assert brief("something\n  unforeseen", []) == "something unforeseen"


def test_the_verbs_of_recipes_are_those_of_the_table() -> None:
    from lidit.fit import RecipeCLI

    assert set(RECIPES) == set(RecipeCLI.subcommands())
