"""Golden cases: compares our verdicts on given inputs with those of the benchmarks' official code.

    python -m lidit.eval.golden FOLDER

The `GOLDEN` of a benchmark's `*_golden` module names the files it knows. For each it has a function that takes the
file's content (a list of cases for .jsonl, an object for .json) and gives each case's id with what differs, or None.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

MODULES = ("lidit.eval.geneval_golden", "lidit.eval.dpg_golden", "lidit.eval.t2i_golden")
BAD_CASES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)  # raised by files of an unknown form

Check = Callable[[Any], Iterator[tuple[str, str | None]]]


def checks() -> dict[str, Check]:
    """The check functions of all benchmarks, by the name of their file."""
    return {name: check for module in MODULES for name, check in import_module(module).GOLDEN.items()}


def compare(path: Path, check: Check) -> list[tuple[str, str | None]]:
    """The id of each case in a file with what differs, or None. A case that cannot be run counts as a difference."""
    done: list[tuple[str, str | None]] = []
    try:
        for case in check(decode(path)):
            done.append(case)
    except BAD_CASES as error:
        done.append((f"after {len(done)} cases", f"stopped by {type(error).__name__}: {error}"))
    return done


def decode(path: Path) -> Any:
    """The cases of a .jsonl file, or the object of a .json file.

    Raises:
        ValueError: the content is neither.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def run(folder: Path) -> int:
    """Run the golden cases of a folder, and print the number of cases and the differences of each file.

    Returns:
        0 if at least one case was run and none differs, else 1.
    """
    known = checks()
    files = sorted(path for path in folder.glob("*.json*") if path.is_file())
    passed = failed = 0
    for path in (path for path in files if path.name in known):
        done = compare(path, known[path.name])
        wrong = [(case, difference) for case, difference in done if difference is not None]
        print(f"{path.name}: {len(done)} cases, {len(wrong)} differences")
        for case, difference in wrong:
            print(f"  {case}: {difference}")
        passed, failed = passed + len(done) - len(wrong), failed + len(wrong)
    for path in (path for path in files if path.name not in known):
        print(f"{path.name}: not run, no check knows this file")
    if not passed + failed:
        print(f"{folder} holds no golden cases; they are files such as {next(iter(known))}")
    print(f"{passed} passed, {failed} failed")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m lidit.eval.golden", description=run.__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder of golden files")
    sys.exit(run(parser.parse_args().folder))
