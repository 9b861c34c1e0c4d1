"""People's ways through the pages of `lidit study serve`, in a real browser."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import pytest
from PIL import Image, PngImagePlugin

from lidit.study.begin import begin
from lidit.study.collect import read_competitors
from lidit.study.store import Store

uvicorn = pytest.importorskip("uvicorn", reason="no uvicorn: pip install 'lidit[study]'")
study_page = pytest.importorskip("lidit.study.page", reason="no starlette: pip install 'lidit[study]'")
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'lidit[dev]'")
Browser, Page = playwright.Browser, playwright.Page

PROMPTS = ["a red circle to the left of a blue square", "a hare", "word " * 120]
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 400, "height": 800}
PATIENCE = 60_000  # milliseconds
playwright.expect.set_options(timeout=PATIENCE)
pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture
def study(tmp_path: Path) -> Iterator[tuple[str, Store]]:
    """A study that is served: its address and what it keeps."""
    for name in ("zebra", "quagga"):
        (tmp_path / name).mkdir()
        for i, prompt in enumerate(PROMPTS):
            text = PngImagePlugin.PngInfo()
            text.add_itxt("prompt", prompt)
            Image.new("RGB", (512, 512), (60 * i, 90, 20 * len(name))).save(tmp_path / name / f"{i}.png", pnginfo=text)
    begin(tmp_path / "study", read_competitors([str(tmp_path / "zebra"), str(tmp_path / "quagga")]))
    stores = [Store(tmp_path / "study") for _ in range(2)]  # the server's and the test's
    server = uvicorn.Server(uvicorn.Config(study_page.application(stores[0]), log_level="warning"))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield "http://{}:{}/".format(*listening.getsockname()), stores[1]
    server.should_exit = True
    thread.join()
    for store in stores:
        store.close()


@pytest.fixture
def opened(browser: Browser, study: tuple[str, Store]) -> Iterator[Callable[..., Page]]:
    """Opens the study as somebody new; whatever goes wrong in a page is found at the end."""
    wrong, pages = [], []

    def open_page(size: dict[str, int] = DESK, **options: object) -> Page:
        page = browser.new_context(viewport=size, **options).new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: None if asked.url.startswith(study[0]) else wrong.append(asked.url))
        page.goto(study[0])
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.context.close()
    assert not wrong


def shown(page: Page, text: str) -> None:
    """Waits for a page with a text, its style and its script: until then keys are lost."""
    playwright.expect(page.get_by_text(text)).to_be_visible()
    page.wait_for_load_state()


def agree(page: Page) -> None:
    page.get_by_role("checkbox").check()
    page.get_by_role("button", name="Begin").click()
    shown(page, "0 of 3 answered")


def choose(page: Page, question: str, answer: str) -> None:
    page.get_by_role("group", name=question).get_by_role("radio", name=answer).check()


def said(store: Store) -> list[tuple[str, str]]:
    return [(vote.quality, vote.alignment) for vote in store.votes()]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.one_of_each),
        {"java_script_enabled": False},
        {"size": PHONE, "has_touch": True},
    ],
)
def test_a_person_opens_the_study_and_votes_to_the_end(opened: Callable, study: tuple, options: dict) -> None:
    page = opened(**options)
    agree(page)
    for i in range(len(PROMPTS)):
        shown(page, f"{i} of 3 answered")
        choose(page, "better picture", "Left")
        choose(page, "fits the text", "No difference")
        page.get_by_role("button", name="Next").click()
    playwright.expect(page.get_by_role("heading", name="Thank you")).to_be_visible()
    assert said(study[1]) == [("left", "tie")] * 3


def test_a_person_votes_by_keyboard_alone(opened: Callable, study: tuple) -> None:
    page = opened()
    for key in ("Tab", "Space", "Tab", "Enter"):  # agree, begin
        page.keyboard.press(key)
    for i in range(len(PROMPTS)):
        shown(page, f"{i} of 3 answered")
        for key in ("1", "6", "3", "Enter"):  # 3 in place of 1
            page.keyboard.press(key)
    playwright.expect(page.get_by_role("heading", name="Thank you")).to_be_visible()
    assert said(study[1]) == [("right", "right")] * 3


def test_enter_is_no_vote_before_both_questions_are_answered(opened: Callable, study: tuple) -> None:
    page = opened()
    agree(page)
    page.keyboard.press("2")
    page.keyboard.press("Enter")
    shown(page, "0 of 3 answered")
    assert said(study[1]) == []


def test_a_person_goes_back_and_answers_otherwise(opened: Callable, study: tuple) -> None:
    page = opened()
    agree(page)
    for key in ("1", "4", "Enter"):
        page.keyboard.press(key)
    page.get_by_role("link", name="Back").click()
    playwright.expect(page.locator("input:checked")).to_have_count(2)
    choose(page, "fits the text", "Right")
    page.get_by_role("button", name="Change the answer").click()
    shown(page, "1 of 3 answered")
    assert said(study[1]) == [("left", "right")]
    assert study[1].database.execute("SELECT COUNT(*) FROM vote").fetchone() == (2,)


def test_a_picture_enlarges_and_keys_do_not_vote_meanwhile(opened: Callable) -> None:
    page = opened()
    agree(page)
    page.get_by_role("link", name="Enlarge the left picture").click()
    large = page.get_by_role("dialog")
    playwright.expect(large.get_by_text("left picture")).to_be_visible()
    page.keyboard.press("ArrowRight")
    playwright.expect(large.get_by_text("right picture")).to_be_visible()
    page.keyboard.press("1")
    page.keyboard.press("Escape")
    playwright.expect(large).to_be_hidden()
    playwright.expect(page.locator("input:checked")).to_have_count(0)


def test_a_person_goes_on_by_their_link_on_another_device(opened: Callable) -> None:
    desk, phone = opened(), opened(PHONE)
    agree(desk)
    for key in ("1", "4", "Enter"):
        desk.keyboard.press(key)
    playwright.expect(desk.get_by_text("1 of 3 answered")).to_be_visible()
    desk.get_by_text("Stop here").click()
    phone.goto(desk.get_by_label("Your link").input_value())
    playwright.expect(phone.get_by_text("1 of 3 answered")).to_be_visible()
    desk.get_by_role("button", name="Leave this device").click()
    playwright.expect(desk.get_by_role("button", name="Begin")).to_be_visible()


@pytest.mark.parametrize("width", [320, 400, 1280])
def test_a_page_fits_its_screen(opened: Callable, width: int) -> None:
    page = opened({"width": width, "height": 800})
    agree(page)
    for i in range(len(PROMPTS)):
        shown(page, f"{i} of 3 answered")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for picture in page.locator(".pictures img").all():  # both in view, beside each other
            box = picture.bounding_box()
            assert box["width"] > 130
            assert box["y"] + box["height"] < 800
        for key in ("2", "5", "Enter"):
            page.keyboard.press(key)
