"""What may pass is tried again, what cannot is not, and the end is always an OSError."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from aiohttp import ClientPayloadError, ClientResponseError, RequestInfo
from yarl import URL

from lidit.data import patience
from lidit.data.patience import patiently


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", waited.append)
    return waited


def failing(*errors: Exception) -> Callable[[], str]:
    """Raises these one after the other, then succeeds."""
    rest = list(errors)

    def attempt() -> str:
        if rest:
            raise rest.pop(0)
        return "read"

    return attempt


def status(code: int) -> ClientResponseError:
    return ClientResponseError(RequestInfo(URL("http://host/x"), "GET", {}, URL("http://host/x")), (), status=code)


def test_it_tries_again_and_waits_longer_each_time(pauses: list[float], caplog: pytest.LogCaptureFixture) -> None:
    errors = [OSError("reset"), TimeoutError(), ClientPayloadError("broken off"), status(503), status(429)]
    assert patiently(failing(*errors), "s3://b/0.tar") == "read"
    assert len(pauses) == 5
    assert all(0.5 * p <= waited <= 1.5 * p for p, waited in zip(patience.PAUSES, pauses, strict=True))
    assert "s3://b/0.tar: OSError reset; trying again in" in caplog.text


def test_what_succeeds_waits_for_nothing(pauses: list[float]) -> None:
    assert patiently(failing(), "x") == "read"
    assert pauses == []


def test_it_gives_up_with_the_last_error(pauses: list[float]) -> None:
    with pytest.raises(OSError, match="number 5"):
        patiently(failing(*(OSError(f"number {i}") for i in range(9))), "x")
    assert len(pauses) == len(patience.PAUSES) == 5


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), PermissionError("no"), status(403), status(410)])
def test_what_cannot_pass_is_not_tried_again(pauses: list[float], error: Exception) -> None:
    with pytest.raises(OSError, match=r"gone|no|403|410"):
        patiently(failing(error), "x")
    assert pauses == []


def test_an_error_of_a_library_ends_as_an_os_error(pauses: list[float]) -> None:
    with pytest.raises(OSError, match="ClientPayloadError broken off"):
        patiently(failing(*[ClientPayloadError("broken off")] * 9), "x")


def test_a_mistake_of_ours_is_not_tried_again(pauses: list[float]) -> None:
    with pytest.raises(ZeroDivisionError):
        patiently(failing(ZeroDivisionError()), "x")
    assert pauses == []
