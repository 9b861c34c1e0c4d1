"""A person's way through the page of `lidit serve`, in a real browser, with the bundled model and without a network."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'lidit[dev]'")
Browser, Page = playwright.Browser, playwright.Page

ROOT = Path(__file__).parents[2]
PATIENCE = 120_000  # milliseconds
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 400, "height": 800}
pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def address(tiny_checkpoint: Path) -> Iterator[str]:
    """Of a page with the bundled model and another."""
    pytest.importorskip("gradio", reason="no gradio: pip install 'lidit[serve]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    models = f'["bundled:lidit", "{tiny_checkpoint}"]'
    command = [sys.executable, "-m", "lidit", "serve", "--port", str(port), "--checkpoints", models]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    next(line for line in server.stdout if "Ctrl-C" in line)
    yield f"http://127.0.0.1:{port}"
    server.kill()
    server.communicate()


@pytest.fixture(params=[DESK, PHONE], ids=["desk", "phone"])
def page(browser: Browser, address: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The page opened; what it asks of other hosts is refused and found at the end."""
    elsewhere: list[str] = []
    page = browser.new_context(viewport=request.param).new_page()
    page.set_default_timeout(PATIENCE)
    ours = (address, "data:", "blob:")
    page.on("request", lambda asked: None if asked.url.startswith(ours) else elsewhere.append(asked.url))
    page.goto(address)
    yield page
    page.context.close()
    assert not elsewhere


def test_a_person_writes_a_prompt_and_sees_two_pictures_and_what_was_read(page: Page) -> None:
    prompt = page.get_by_label("Prompt")
    prompt.fill("a green star")
    prompt.press("Enter")
    playwright.expect(page.locator(".drawn img")).to_have_count(4)  # two models, each with the way there
    marked = page.locator(".tokens .kept")
    playwright.expect(marked.filter(has_text="star").first).to_be_visible()
    playwright.expect(page.locator(".tokens .cut").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    if folder := os.environ.get("LIDIT_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/serve-{page.viewport_size['width']}.png", full_page=True)


def test_an_empty_prompt_is_answered_with_what_to_do(page: Page) -> None:
    page.get_by_label("Prompt").fill("   ")
    page.get_by_role("button", name="Draw").click()
    playwright.expect(page.get_by_text("Write what to draw").first).to_be_visible()
