"""Repeats a read that may have failed for a moment only: from a network, or from a network file system."""

from __future__ import annotations

import logging
import random
import sys
import time
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further attempt, times a random number from 0.5 to 1.5
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # trying again does not help
OTHERS = {  # errors of libraries that are not OSErrors; looked up where the library has been imported
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
}
_chance = random.SystemRandom()  # leaves the generator that a run has seeded as it is


def patiently(attempt: Callable[[], T], what: str) -> T:
    """The result of the first attempt that succeeds.

    Args:
        attempt: called, and called again after each of `PAUSES`, so that a failing server is not overrun.
        what: what is read, named in the log.

    Raises:
        OSError: every attempt failed, or one failed for a reason that stays (the file is missing or forbidden).
    """
    for pause in (*PAUSES, None):
        try:
            return attempt()
        except failures() as error:
            if pause is None or _is_final(error):
                raise error if isinstance(error, OSError) else OSError(_brief(error))  # noqa: B904
            wait = pause * _chance.uniform(0.5, 1.5)
            log.warning("%s: %s; trying again in %.1f s", what, _brief(error), wait)
            time.sleep(wait)
    raise AssertionError


def failures() -> tuple[type[Exception], ...]:
    """The errors that reading may raise, of every library in use."""
    found = [getattr(sys.modules[m], n, None) for m, names in OTHERS.items() if m in sys.modules for n in names]
    return (OSError, *(error for error in found if error is not None))


def _is_final(error: Exception) -> bool:
    status = getattr(error, "status", None) or 0  # of a web server's answer; 408 and 429 ask for another attempt later
    return isinstance(error, FINAL) or (400 <= status < 500 and status not in (408, 429))


def _brief(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()
