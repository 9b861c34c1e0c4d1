"""Commands on pages are understood by lidit, and those that need nothing special are run.

A comment before a block says what its commands need (`<!-- needs: gpu, network -->`) or that it is a file for later
ones (`<!-- file: mine.yaml -->`). A page's blocks without needs are run in order, as one script, in an empty folder.
"""

from __future__ import annotations

import configparser
import os
import re
import shlex
import subprocess
import sys
from argparse import ArgumentError
from importlib.util import find_spec
from pathlib import Path

import pytest

from lidit import arguments, benchmark, cli, fit, sample, verbs
from lidit.arguments import parse_functions, take
from lidit.plan import plan
from tests.docs.conftest import NEEDS, PAGES, ROOT, Block, blocks

SCRIPT = 'set -e\nlidit() { "$PYTHON" -m lidit "$@"; }\npython() { "$PYTHON" "$@"; }\n'
NAMES = [page.name for page in PAGES]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands of a page are run: nothing but the recipes is there."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verbs are parsed alone."""
    parse = lambda function, prog, argv: parse_functions([function], prog, argv)  # noqa: E731
    for module in (arguments, sample):  # both imported before: what is imported later would keep what is put here
        monkeypatch.setattr(module, "call", parse)
    for verb in verbs.RECIPES:
        monkeypatch.setattr(fit, verb, lambda argv, verb=verb: fit.read_recipe(argv, verb=verb))
    monkeypatch.setattr(plan, "main", plan.read)
    monkeypatch.setattr(
        benchmark, "sample", lambda argv, name: parse_functions(of_benchmark(name), "", argv, {"suite"})
    )
    monkeypatch.setattr(benchmark, "score", lambda argv: parse_score(argv))
    monkeypatch.setattr("lidit.doctor.doctor", lambda: None)


def of_benchmark(name: str) -> list:
    return [benchmark.load(name).suite, benchmark.draw]


def parse_score(argv: list[str]) -> None:
    name, rest = take(argv, "--benchmark")
    parse_functions([benchmark.load(name or "scenes-heldout").score], "", rest)


def understand(words: list[str]) -> None:
    """See that a command is one: a verb of lidit with its arguments, a module, an extra, a target."""
    program, *rest = words
    if program == "lidit":
        understand_lidit(rest)
    elif program == "python":
        assert rest[0] == "-m"
        assert find_spec(rest[1]), f"there is no module {rest[1]}"
        assert all(Path(word).exists() for word in rest if word.startswith("experiments/"))
    elif program == "pip":
        assert rest[0] == "install"
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        for extra in re.findall(r"\[(\w+)]", " ".join(rest)):
            assert extra in setup["options.extras_require"]
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    else:
        assert program == "pytest", f"no test knows the program {program}"


def understand_lidit(argv: list[str]) -> None:
    """Parse a verb's arguments; of a launched command, launch's and its own."""
    if argv[:2] == ["prep", "precompute"]:
        assert {"--vae", "--config"} & set(argv), "it does not say which VAE"
    if argv[0] == "launch":
        at = argv.index("--") if "--" in argv else len(argv)
        dry = [] if "--dry-run" in argv else ["--dry-run"]
        cli.run([*argv[:2], *dry, *argv[2:]])
        if argv[at + 1 :]:
            understand_lidit(argv[at + 1 :])
    else:
        cli.run(argv)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_of_a_page_is_understood(page: Path, folder: Path) -> None:
    for block in blocks(page):
        if block.file:
            (folder / block.file).write_text(block.text)
        for words in block.commands if block.is_shell or block.is_rows else ():
            try:
                understand(words)
            except (ArgumentError, AssertionError, ValueError, OSError) as error:
                pytest.fail(f"{block.place}: {' '.join(words)}: {error}", pytrace=False)


@pytest.mark.parametrize(
    "line",
    [
        "lidit smaple 'a red circle'",
        "lidit sample 'a red circle' --stpes 3",
        "lidit sample --benchmark geneval --out x --prompts x",
        "lidit fit --config experiments/configs/mini.yaml --model.lerning_rate 1",
        "lidit fit --config experiments/configs/nothing.yaml",
        "lidit launch slurm -- fit --config experiments/configs/mini.yaml --data.batch_size many",
        "lidit prep precompute --shards shards/small --out cache/small",
        "python -m experiments.nothing",
        "pip install 'lidit[nothing]'",
        "conda install lidit",
    ],
)
def test_a_command_that_is_wrong_is_found_out(line: str, folder: Path) -> None:
    with pytest.raises((ArgumentError, AssertionError)):
        understand(shlex.split(line))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_what_a_page_says_its_commands_need_is_one_of_few_things(page: Path) -> None:
    for block in blocks(page):
        assert block.needs <= NEEDS, block.place
        assert block.is_shell or not block.needs, f"{block.place}: no commands, and yet they need something"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_verb_that_a_page_names_is_there(page: Path) -> None:
    for named in re.findall(r"`lidit ([a-z][^`]*)`", page.read_text()):
        words = named.split()
        assert verbs.find(words) or any(verb.startswith(f"{words[0]} ") for verb in verbs.VERBS), (
            f"{page.name}: {named}"
        )


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.is_shell and not block.needs]


def marked(page: Path) -> object:  # the shortest stands for all
    return pytest.param(page, id=page.name, marks=pytest.mark.one_of_each if page.stem == "tables" else ())


@pytest.mark.slow
@pytest.mark.parametrize("page", [marked(page) for page in PAGES if runnable(page)])
def test_the_commands_of_a_page_that_need_nothing_run(page: Path, folder: Path) -> None:
    for block in blocks(page):
        if block.file:
            (folder / block.file).write_text(block.text)
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    script = SCRIPT + "".join(block.text for block in runnable(page))
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{page.name}:\n{done.stdout}\n{done.stderr}"
