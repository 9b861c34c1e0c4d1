"""What an installation holds: its version, its files, and that Python finds it wherever it is started."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

import lidit

ROOT = Path(__file__).parents[1]


def python(code: str, folder: Path, *options: str) -> str:
    """What a process says that runs some code in a folder and is told of no other."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *options, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of this repository in a folder called lidit."""
    folder = tmp_path / "lidit"
    folder.mkdir()
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.suffix != ".egg-info":
            (folder / path.name).symlink_to(path)
    return folder


def test_an_editable_install_is_found_from_the_folder_that_holds_the_clone(clone: Path) -> None:
    python("from setuptools import build_meta; build_meta.build_editable('..')", clone)
    (wheel,) = clone.parent.glob("*.whl")
    with ZipFile(wheel) as file:
        file.extractall(clone.parent / "site")
    assert wheel.name.startswith(f"lidit-{lidit.__version__}-")
    code = "import site; site.addsitedir('site'); import lidit; print(lidit.__file__)"
    found = python(code, clone.parent, "-S")  # no other installation
    assert Path(found.strip()) == clone / "lidit/__init__.py"


def test_every_file_of_the_package_is_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    installed = {
        path
        for package, patterns in setup["options.package_data"].items()
        for pattern in patterns.split(", ")
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    files = {path for path in (ROOT / "lidit").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert ROOT / "lidit/py.typed" in files, "without it, type checkers do not look at lidit's types"
    assert files <= installed


def test_the_citation_names_the_version_that_is_installed() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == lidit.__version__


@pytest.mark.parametrize("argument", ["--version", "version"])
def test_the_version_is_printed_without_importing_torch(argument: str) -> None:
    code = f"import sys; from lidit.cli import main; main([{argument!r}]); assert 'torch' not in sys.modules"
    assert python(code, ROOT) == f"lidit {lidit.__version__}\n"


def test_the_hall_has_few_doors() -> None:
    assert len(list((ROOT / "lidit").glob("*.py"))) <= 25
