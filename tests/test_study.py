from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, OpenerDirector, build_opener

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from lidit.cli import main
from lidit.study.begin import begin
from lidit.study.collect import describe, read_competitors
from lidit.study.report import bootstrap, compare, fleiss_kappa, report
from lidit.study.serve import serve
from lidit.study.store import Store, connect, is_begun

testclient = pytest.importorskip("starlette.testclient")

ROOT = Path(__file__).parents[1]
PROMPTS = ["a red circle", "a blue square", 'two "stars" & a <b>cube</b>', "a hare"]
VOTE = {"quality": "left", "alignment": "tie"}


def paint(folder: Path, prompts: list[str], size: int = 16, **facts: object) -> Path:
    """A folder as `lidit sample --prompts` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, prompt in enumerate(prompts):
        text = PngImagePlugin.PngInfo()
        for key, value in {"prompt": prompt, "checkpoint": f"runs/{folder.name}.ckpt", **facts}.items():
            text.add_itxt(key, str(value))
        shade = sum(folder.name.encode()) % 256
        Image.new("RGB", (size, size), (shade, 60 * i, size)).save(folder / f"{len(prompts)}-{i}.png", pnginfo=text)
    return folder


def begun(out: Path, *names: str, against: str = "all") -> Path:
    """A study of models that drew the same prompts."""
    folders = [f"{name}={paint(out.parent / name, PROMPTS)}" for name in names]
    begin(out, read_competitors(folders), against)
    return out


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(begun(tmp_path / "study", "zebra", "quagga"))
    yield store
    store.close()


@pytest.fixture
def browser(store: Store) -> Callable[[], testclient.TestClient]:
    """Makes a browser that knows nothing yet."""
    from lidit.study.page import application

    return lambda: testclient.TestClient(application(store))


def agreed(browser: testclient.TestClient) -> testclient.TestClient:
    """The same browser, of somebody who has agreed."""
    assert browser.post("/", data={"agree": "yes"}).status_code == 200
    return browser


def names_in(browser: testclient.TestClient, pair: int) -> list[str]:
    """The addresses of the two pictures of a pair."""
    page = browser.get(f"/pair/{pair}").text
    return [part.split('"')[0] for part in page.split('src="/picture/')[1:3]]


def vote(store: Store, rater: int, pair: int, wins: str | None, question: str = "quality") -> None:
    """A rater's answer: which model is better, None: neither."""
    _, left, _ = store.sides(rater, pair)
    model = store.database.execute(
        "SELECT name FROM picture JOIN model ON model.id = model WHERE picture.id = ?", (left.id,)
    ).fetchone()[0]
    said = "tie" if wins is None else "left" if model == wins else "right"
    store.vote(rater, pair, left.id, *((said, "tie") if question == "quality" else ("tie", said)))


@contextmanager
def served(*arguments: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A process of `lidit study serve`, and the address that it prints."""
    command = [sys.executable, "-m", "lidit", "study", "serve", *arguments, "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = next((line for line in process.stdout if "raters open" in line), None)
        assert line is not None, process.stderr.read()
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()


def begin_over(address: str) -> tuple[OpenerDirector, str]:
    """A browser over the network that has agreed, and the first pair's address."""
    opener = build_opener(HTTPCookieProcessor())
    return opener, opener.open(address, urlencode({"agree": "yes"}).encode()).url


def test_a_vote_survives_kill_9(tmp_path: Path) -> None:
    folders = [f"{name}={paint(tmp_path / name, PROMPTS)}" for name in ("zebra", "quagga")]
    with served(*folders, "--out", str(tmp_path / "study")) as (process, address):
        opener, pair = begin_over(address)
        opener.open(pair, urlencode(VOTE).encode()).read()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert [(vote.quality, vote.alignment) for vote in Store(tmp_path / "study").votes()] == [("left", "tie")]
    with served("--out", str(tmp_path / "study")) as (_, again):  # and the rater goes on
        page = opener.open(pair.replace(address, again)).read().decode()
        assert "1 of 4 answered" in page
        assert page.count(" checked") == 2


def test_the_study_imports_no_torch() -> None:
    code = "import sys, lidit.study.serve, lidit.study.page, lidit.study.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 0


# folders


def test_the_first_sample_of_a_prompt_is_taken(tmp_path: Path) -> None:
    for sample in (10, 2):
        paint(tmp_path / "a" / str(sample), PROMPTS, sample=sample)
    (only, _) = read_competitors([f"a={tmp_path / 'a'}", f"b={paint(tmp_path / 'b', PROMPTS)}"])
    assert {picture.facts["sample"] for picture in only.pictures.values()} == {"2"}
    assert only.spare == len(PROMPTS)


def test_a_picture_of_another_system_has_its_prompt_beside_it(tmp_path: Path) -> None:
    paint(tmp_path / "ours", PROMPTS)
    (tmp_path / "theirs").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "theirs" / "1.jpg")
    beside = tmp_path / "theirs" / "1.txt"
    for encoding in ("utf-8", "utf-8-sig"):
        beside.write_text("a café\n", encoding=encoding)
        theirs = read_competitors([str(tmp_path / "theirs"), str(tmp_path / "ours")])[0]
        assert (theirs.name, list(theirs.pictures)) == ("theirs", ["a café"])
    beside.write_text("a café\n", encoding="latin-1")
    with pytest.raises(ValueError, match=re.escape(f"{beside} is not UTF-8 (byte 5); save it")):
        read_competitors([str(tmp_path / "theirs"), str(tmp_path / "ours")])


def test_a_folder_may_have_an_equals_sign(tmp_path: Path) -> None:
    folders = [paint(tmp_path / name, PROMPTS) for name in ("lr=1e-4", "other")]
    assert [each.name for each in read_competitors(list(map(str, folders)))] == ["lr=1e-4", "other"]


def test_prompts_that_do_not_match_are_said_in_one_message(tmp_path: Path) -> None:
    drawn = {"a": PROMPTS, "b": PROMPTS[:3], "c": [*PROMPTS[:2], "a moon"]}
    said = describe(read_competitors([f"{name}={paint(tmp_path / name, texts)}" for name, texts in drawn.items()]))
    assert said == (
        "2 prompts in all of a, b, c; 1 in some of them, compared between those; "
        "1 only in a, left out (such as 'a hare'); 1 only in c, left out (such as 'a moon')"
    )


def test_pictures_that_differ_in_size_are_pointed_out(tmp_path: Path) -> None:
    paint(tmp_path / "large", PROMPTS, size=32)
    paint(tmp_path / "small", PROMPTS)
    assert "raters can tell them apart" in describe(read_competitors([f"{tmp_path}/large", f"{tmp_path}/small"]))


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ([], "two or more folders"),
        (["a=here", "a=there"], "two folders are called 'a'"),
        (["=here", "b=there"], "empty name"),
        (["a=here", "b=there"], "here is not a folder"),
        (["a=blank", "b=full"], "none of 1 pictures"),
        (["a=full", "b=other"], "no prompt in common"),
        (["a=torn", "b=full"], "is not a PNG file, or is damaged"),
    ],
)
def test_folders_that_cannot_be_compared_are_refused(
    words: list[str], wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    paint(Path("full"), PROMPTS)
    paint(Path("other"), ["a moon"])
    paint(Path("blank"), [""])
    paint(Path("torn"), [])
    (tmp_path / "torn" / "1.png").write_bytes(b"nothing")
    assert main(["study", "serve", *words, "--port", "0", "--out", "study"]) == 1
    assert wrong in capsys.readouterr().err
    assert not is_begun(Path("study"))


def test_a_study_is_gone_on_with_by_its_own_folders_only(store: Store, tmp_path: Path) -> None:
    paint(tmp_path / "lion", PROMPTS)
    with pytest.raises(ValueError, match="was begun with zebra="):
        serve([f"zebra={tmp_path / 'zebra'}", f"lion={tmp_path / 'lion'}"], str(store.folder), port=0)
    with pytest.raises(ValueError, match="was begun with --against all"):
        serve(out=str(store.folder), port=0, against="first")


def test_a_taken_port_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from socket import create_server

    with create_server(("127.0.0.1", 0)) as taken:
        code = main(["study", "serve", "--port", str(taken.getsockname()[1]), "--out", str(tmp_path / "study")])
    assert code == 1
    assert "take another --port" in capsys.readouterr().err


# what is kept


def test_pictures_are_kept_without_what_their_files_said(store: Store) -> None:
    files = list((store.folder / "pictures").iterdir())
    assert len(files) == 2 * len(PROMPTS)
    for file in files:
        assert b"ckpt" not in file.read_bytes()
        with Image.open(file) as image:
            assert (image.size, image.text) == ((16, 16), {})


def test_a_database_that_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "study.db").write_text("this is no database, whatever its name says")
    assert main(["study", "report", str(tmp_path)]) == 1
    assert "study.db is not a study (file is not a database)" in capsys.readouterr().err


def test_a_study_stopped_while_it_began_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "study" / "pictures").mkdir(parents=True)
    connect(tmp_path / "study").close()
    assert not is_begun(tmp_path / "study")
    assert is_begun(begun(tmp_path / "study", "zebra", "quagga"))


def test_pairs_with_the_fewest_raters_come_first(store: Store) -> None:
    first, second = (store.rater(store.begin()) for _ in range(2))
    seen = [store.next_pair(first)]
    vote(store, first, seen[0], None)
    for _ in range(3):
        seen.append(store.next_pair(second))
        vote(store, second, seen[-1], None)
    assert sorted(seen) == [1, 2, 3, 4]
    assert store.next_pair(second) == seen[0]


def test_sides_stay_for_a_rater_and_differ_between_raters(store: Store) -> None:
    shown = [[store.sides(rater, pair)[1].token for pair in range(1, 5)] for rater in range(40)]
    assert shown == [[store.sides(rater, pair)[1].token for pair in range(1, 5)] for rater in range(40)]
    assert all(len(set(column)) == 2 for column in zip(*shown, strict=True))


def test_a_second_answer_counts_and_both_are_kept(store: Store) -> None:
    rater = store.rater(store.begin())
    for wins in ("zebra", "quagga"):
        vote(store, rater, 1, wins)
    results = compare(store.votes(), "zebra", "quagga", 4, seed=0, resamples=10)
    assert results[0].counts == (0, 0, 1)
    assert store.database.execute("SELECT COUNT(*) FROM vote").fetchone() == (2,)


@pytest.mark.parametrize(
    ("statement", "refused"),
    [("DELETE FROM vote", "cannot be deleted"), ("UPDATE vote SET quality = 'tie'", "cannot be changed")],
)
def test_a_vote_is_neither_changed_nor_deleted(store: Store, statement: str, refused: str) -> None:
    vote(store, store.rater(store.begin()), 1, "zebra")
    with pytest.raises(sqlite3.IntegrityError, match=refused):
        store.database.execute(statement)


def test_a_rater_is_a_random_number_and_a_time(store: Store) -> None:
    token = store.begin()
    (row,) = store.database.execute("SELECT * FROM rater").fetchall()
    assert (row[0], token in row, len(row)) == (1, False, 3)
    assert row[2].endswith("+00:00")


# pages: tests/browser has a person's way through them


def test_no_page_nor_address_names_a_model(browser: Callable, store: Store) -> None:
    person = agreed(browser())
    pages = [person.get(path) for path in ("/", "/next", "/pair/1", "/pair/2", "/thanks", "/nowhere")]
    pages += [person.get(f"/picture/{name}") for name in names_in(person, 1)]
    for page in pages:
        said = page.content + str(page.headers).encode() + str(page.url).encode()
        assert not [word for word in (b"zebra", b"quagga", b"ckpt", bytes(store.folder)) if word in said]


def test_a_prompt_is_text_not_markup(browser: Callable, store: Store) -> None:
    (pair,) = store.database.execute(
        "SELECT pair.id FROM pair JOIN picture ON picture.id = a WHERE prompt = ?", (PROMPTS[2],)
    ).fetchone()
    assert "two &#34;stars&#34; &amp; a &lt;b&gt;cube&lt;/b&gt;" in agreed(browser()).get(f"/pair/{pair}").text


def test_nobody_votes_without_having_agreed(browser: Callable, store: Store) -> None:
    assert browser().post("/", data={}).status_code == 400
    assert browser().post("/pair/1", data=VOTE).status_code == 403
    guess = agreed(browser())
    (name,) = guess.cookies
    assert browser().get("/next", headers={"Cookie": f"{name}=guess"}).status_code == 403
    assert store.database.execute("SELECT COUNT(*) FROM rater").fetchone() == (1,)


@pytest.mark.parametrize("said", [{}, {"quality": "left"}, {"quality": "both", "alignment": "tie"}, {"x": "y" * 9999}])
def test_an_answer_that_is_none_is_refused(browser: Callable, store: Store, said: dict[str, str]) -> None:
    assert agreed(browser()).post("/pair/1", data=said).status_code in (400, 413)
    assert store.votes() == []


def test_a_vote_that_could_not_be_kept_is_said(
    browser: Callable, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    person = agreed(browser())
    monkeypatch.setattr(Store, "vote", full)
    said = person.post("/pair/1", data=VOTE)
    assert said.status_code == 503
    assert "What you sent could not be saved." in said.text
    assert "database or disk is full" in capsys.readouterr().err


def test_there_is_no_vote_on_a_pair_that_is_none(browser: Callable, store: Store) -> None:
    person = agreed(browser())
    for pair in ("5", "-1", str(2**70), "9" * 5000, "1.5", "one"):
        assert person.post(f"/pair/{pair}", data=VOTE).status_code == 404
    assert store.votes() == []


@pytest.mark.parametrize(
    "path",
    [
        *("/picture/study.db", "/picture/..%2Fstudy.db", "/picture/%2e%2e%2fstudy.db", "/picture/' OR 1=1 --"),
        *("/study.db", "/../study.db", "/..%2f..%2fstudy%2fpage.py", "/page.py", "/welcome.html", "/pictures/"),
        *("/picture/%2Fetc%2Fpasswd", "/picture/", "/go-on/..%2Fthanks"),
    ],
)
def test_no_path_leads_out_of_the_study(browser: Callable, path: str) -> None:
    assert agreed(browser()).get(path).status_code == 404


def test_a_rater_sees_no_other_raters_votes(browser: Callable) -> None:
    one, other = agreed(browser()), agreed(browser())
    one.post("/pair/1", data=VOTE)
    assert one.get("/pair/1").text.count(" checked") == 2
    assert " checked" not in other.get("/pair/1").text
    assert "0 of 4 answered" in other.get("/pair/1").text


def test_a_raters_own_link_goes_on_in_another_browser(browser: Callable) -> None:
    phone, desk = agreed(browser()), browser()
    phone.post("/pair/1", data=VOTE)
    link = phone.get("/pair/2").text.split('readonly value="')[1].split('"')[0]
    assert "1 of 4 answered" in desk.get(link).text
    assert names_in(desk, 1) == names_in(phone, 1)
    assert desk.get("/go-on/another").status_code == 404


def test_pages_load_nothing_from_elsewhere(browser: Callable) -> None:
    page = agreed(browser()).get("/next")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["referrer-policy"] == "no-referrer"
    assert page.headers["cache-control"] == "no-store"


# report


def test_fleiss_kappa_is_that_of_the_textbook() -> None:
    diagnoses = [  # 10 subjects, 14 raters, 5 categories: kappa 0.210
        *([0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1]),
        *([7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]),
    ]
    assert fleiss_kappa(np.array(diagnoses)) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa(np.array([[3, 0, 0], [0, 2, 0], [1, 0, 0]])) == 1
    assert np.isnan(fleiss_kappa(np.array([[1, 0, 0], [0, 0, 1]])))
    assert np.isnan(fleiss_kappa(np.array([[3, 0, 0]])))


def test_a_tie_is_half_a_win_and_the_interval_is_of_prompts() -> None:
    share, low, high = bootstrap(np.array([[2, 1, 0]] * 50 + [[0, 1, 2]] * 50), seed=0, resamples=10_000)
    assert share == 0.5
    assert high - low == pytest.approx(2 * 1.96 * (1 / 3) / 10, rel=0.05)  # standard deviation 1/3 over 100 prompts
    assert (share, low, high) == bootstrap(np.array([[2, 1, 0]] * 50 + [[0, 1, 2]] * 50), 0, 10_000)
    assert np.isnan(bootstrap(np.array([[1, 0, 0]]), 0, 10)[1])


@pytest.mark.parametrize(("prompts", "truth"), [(5, 0.7), (10, 0.9), (20, 0.95), (50, 0.97), (50, 0.7)])
def test_the_interval_holds_the_truth_19_times_of_20(prompts: int, truth: float) -> None:
    drawn = np.random.default_rng(0).random((400, prompts)) < truth
    counts = np.stack([drawn, np.zeros_like(drawn), ~drawn], -1).astype(int)
    intervals = [bootstrap(each, 0, 500)[1:] for each in counts]
    assert np.mean([low <= truth <= high for low, high in intervals]) >= 0.92  # of 400
    assert all(low < high for low, high in intervals)


def test_every_two_models_are_compared_or_the_first_with_each(tmp_path: Path) -> None:
    every = Store(begun(tmp_path / "all", "zebra", "quagga", "kiang")).matches()
    assert every == {("zebra", "quagga"): 4, ("zebra", "kiang"): 4, ("quagga", "kiang"): 4}
    first = Store(begun(tmp_path / "first", "zebra", "quagga", "kiang", against="first")).matches()
    assert first == {("zebra", "quagga"): 4, ("zebra", "kiang"): 4}


def test_a_report_counts_wins_whatever_the_sides(store: Store, capsys: pytest.CaptureFixture) -> None:
    for wins in ("zebra", "zebra", None):
        rater = store.rater(store.begin())
        for pair in (1, 2, 3):
            vote(store, rater, pair, wins)
            vote(store, rater, pair, wins)
    report(str(store.folder), resamples=100)
    text = (store.folder / "report.md").read_text()
    assert "| zebra | quagga | 6 | 3 | 0 | 83.3 % | 33.3 % to 91.7 % | -0.50 |" in text
    assert "| zebra | quagga | 0 | 9 | 0 | 50.0 % | 20.0 % to 80.0 % | – |" in text
    assert "1 of 4 pairs of zebra and quagga have fewer than 3 raters" in text
    assert text == capsys.readouterr().out
    with Image.open(store.folder / "figure6.png") as figure:
        assert figure.width > 1000
    assert len((store.folder / "votes.csv").read_text().splitlines()) == 10


def test_a_report_of_nothing_says_so(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nobody has voted"):
        report(str(store.folder))
    with pytest.raises(ValueError, match="there is no study"):
        report(str(tmp_path))
