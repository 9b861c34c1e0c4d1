"""What plain `pytest` runs of the tests, and what it says of the others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = """
import pytest

def test_fast(): pass

@pytest.mark.slow
def test_slow(): pass

@pytest.mark.slow
@pytest.mark.one_of_each
def test_kill(): pass
"""


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A folder with our settings of pytest and three tests."""
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_few.py").write_text(TESTS)
    return tmp_path


def said(folder: Path, *arguments: str) -> str:
    """What pytest prints there."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-v", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", [[], ["-n0"], ["tests/test_few.py"]])
def test_plain_pytest_runs_one_slow_test_of_each_kind_and_names_the_command_for_all(
    few: Path, arguments: list[str]
) -> None:
    out = said(few, *arguments)
    assert [name for name in ("fast", "slow", "kill") if f"test_{name}" in out] == ["fast", "kill"]
    assert "\nslow tests left out: 1; `make test-all` runs every test\n" in out
    assert out.splitlines()[-1].strip("= ").startswith("2 passed")


def test_an_empty_choice_of_marks_is_every_test(few: Path) -> None:
    out = said(few, "-m", "")
    assert "3 passed" in out
    assert "left out" not in out


def test_all_tests_are_shared_among_processes_and_a_file_is_not(few: Path) -> None:
    if len(os.sched_getaffinity(0)) > 1:
        assert "[gw" in said(few)  # whichever is ready first takes the file
    assert "[gw" not in said(few, "tests/test_few.py")
