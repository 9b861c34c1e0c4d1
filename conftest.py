"""How many of the tests plain `pytest` runs, in how many processes, and what it says of the others."""

from __future__ import annotations

import os
from typing import Any

import pytest

WORKERS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
LEFT_OUT = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)  # before xdist, which is told here
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Share all tests among the cores; a part of them, or a command line with -n or --pdb, is run as it says."""
    option = config.option
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    if hasattr(config, "workerinput") or not whole or option.usepdb:  # a worker has no workers of its own
        return
    if getattr(option, "numprocesses", 0) is None and WORKERS > 1:
        option.numprocesses, option.dist = WORKERS, "loadfile"


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Count the slow tests that are left out."""
    for item in items:
        if "slow" in item.keywords:
            item.config.stash[LEFT_OUT] = item.config.stash.get(LEFT_OUT, 0) + 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the process that prints; each worker has seen all tests."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)  # of xdist
def pytest_testnodedown(node: Any) -> None:
    """Hear from a worker."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say how to run what was left out."""
    if count := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"slow tests left out: {count}; `make test-all` runs every test")
