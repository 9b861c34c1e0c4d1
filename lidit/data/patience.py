"""Trying again what may have failed for a moment: reading from a network, or from a file system over one."""

from __future__ import annotations

import logging
import random
import sys
import time
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further attempt, half as long or half again at random
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # trying again does not help
OTHERS = {  # what libraries raise that is no OSError; they are looked up where they have been imported
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
}
_chance = random.SystemRandom()  # draws nothing from the generator that a run has seeded


def patiently(attempt: Callable[[], T], what: str) -> T:
    """What an attempt gives, at the latest the last of several.

    Args:
        attempt: done once more after each of `PAUSES`, so that a failing server is not overrun.
        what: is read, for the log.

    Raises:
        OSError: what the last attempt raised, or the first that trying again cannot mend (missing, forbidden).
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
    """The errors of reading, of every library in use."""
    found = [getattr(sys.modules[m], n, None) for m, names in OTHERS.items() if m in sys.modules for n in names]
    return (OSError, *(error for error in found if error is not None))


def _is_final(error: Exception) -> bool:
    status = getattr(error, "status", None) or 0  # of a web server; 408 and 429 ask to come back later
    return isinstance(error, FINAL) or (400 <= status < 500 and status not in (408, 429))


def _brief(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()
