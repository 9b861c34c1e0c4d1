"""The benchmarks by name, and how a name becomes the two functions of a benchmark.

The miniature world's stand here as text, which import-linter does not see: with demo and callbacks/judge.py this is the
only place outside of it where the package knows that there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Protocol, runtime_checkable

from lidit.eval.suite import Suite

BENCHMARKS = {  # name: the module, or object in a module, with suite() and score()
    "geneval": "lidit.eval.geneval",
    "t2i-compbench": "lidit.eval.t2i_compbench",
    "dpg-bench": "lidit.eval.dpg_bench",
    "positional-bias": "lidit.eval.positional_bias",
    "scenes-heldout": "lidit.scenes.suites:HELDOUT",
    "scenes-attributes": "lidit.scenes.suites:ATTRIBUTES",
    "scenes-geneval": "lidit.scenes.suites:GENEVAL",
    "scenes-positional-bias": "lidit.scenes.suites:POSITIONAL_BIAS",
    "scenes-dense": "lidit.scenes.suites:DENSE",
}


@runtime_checkable
class Benchmark(Protocol):
    """A module of `lidit.eval`, or an object like one."""

    suite: Callable[..., Suite]
    score: Callable[..., dict]


def load(name: str) -> Benchmark:
    """A benchmark's two functions.

    Raises:
        ValueError: there is no such benchmark.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    module, _, attribute = BENCHMARKS[name].partition(":")
    return getattr(import_module(module), attribute) if attribute else import_module(module)
