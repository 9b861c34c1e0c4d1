"""The wish that a run ends, as Slurm, torchrun or a user signals it: a handler that does nothing but remember it.

Whatever else a handler did, it would do in the middle of anything, such as a collective that other ranks wait in.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)  # Slurm's warning before the time limit; preemption, torchrun, `kill`

_received: list[int] = []
_before: dict[int, object] = {}  # what handled them otherwise; empty: nothing is remembered


@contextmanager
def remembered() -> Iterator[None]:
    """Within this, signals are remembered; begin it before heavy imports, since one that comes earlier kills."""
    _before.update({number: signal.signal(number, _remember) for number in SIGNALS})
    try:
        yield
    finally:
        _restore()


def keep() -> None:
    """Remember, whatever a library has put in place meanwhile (Lightning does; its handler communicates)."""
    for number in _before:
        signal.signal(number, _remember)


def release() -> None:
    """Nobody will look: let signals do what they do otherwise, also those that have come already."""
    received = _received[:1]
    _restore()
    for number in received:
        os.kill(os.getpid(), number)


def received() -> list[str]:
    """The names of the signals that came, in order."""
    return [signal.Signals(number).name for number in _received]


@contextmanager
def passed_on(send: Callable[[int], object]) -> Iterator[list[int]]:
    """Within this, signals are sent on, to a process that does the work; gives those that came, in order."""
    came: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        send(number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _remember(number: int, frame: FrameType | None) -> None:
    _received.append(number)


def _restore() -> None:
    for number, handler in _before.items():
        signal.signal(number, handler)
    _before.clear()
    _received.clear()  # or a later run of this process would take them for its own
