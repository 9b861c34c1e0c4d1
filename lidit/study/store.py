"""A study on disk: pictures that do not reveal their model, pairs of them, raters without names, and every vote.

    STUDY/study.db     SQLite: settings, models, pictures, pairs, raters, votes
    STUDY/pictures/    pixels under random names; the text chunks of the original PNGs would name the checkpoint

A vote is one row, on disk before the next page is sent. Rows of votes are only added: a second answer to the same pair
counts instead of the first, and both stay. One process with one connection serves a study, so writes do not collide.
"""

from __future__ import annotations

import secrets
import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

DATABASE, PICTURES = "study.db", "pictures"
ANSWERS = ("left", "tie", "right")


@dataclass(frozen=True)
class Shown:
    """A picture on a page: the name it is served by, and its size in pixels."""

    id: int
    token: str
    width: int
    height: int


@dataclass(frozen=True)
class Vote:
    """A rater's last answer to a pair.

    Args:
        rater: the rater's number.
        prompt: the pair's prompt.
        a: first model's name.
        b: second model's name.
        a_left: whether the first model's picture was on the left.
        quality: `left`, `tie` or `right`, the answer to the first question.
        alignment: likewise, to the second.
    """

    rater: int
    prompt: str
    a: str
    b: str
    a_left: bool
    quality: str
    alignment: str


class Store:
    """A study that has been begun.

    Args:
        folder: the study's folder.

    Raises:
        ValueError: there is no study in the folder.
    """

    def __init__(self, folder: Path) -> None:
        if not is_begun(folder):
            raise ValueError(f"there is no study in {folder}; `lidit study serve A=FOLDER B=FOLDER --out` begins one")
        self.folder = folder
        self.database = connect(folder)
        self.settings = dict(self.database.execute("SELECT key, value FROM setting").fetchall())

    def close(self) -> None:
        self.database.close()

    def models(self) -> dict[str, str]:
        """Folders by the models' names, in the order in which they were given."""
        return dict(self.database.execute("SELECT name, folder FROM model ORDER BY id").fetchall())

    def begin(self) -> str:
        """Register a new rater and return their secret, of which the study stores only the SHA-256."""
        token = secrets.token_urlsafe(24)
        self.database.execute("INSERT INTO rater (token_sha256, agreed) VALUES (?, ?)", (digest(token), now()))
        return token

    def rater(self, token: str) -> int | None:
        """The number of the rater with this secret; None: nobody has it."""
        return self._one("SELECT id FROM rater WHERE token_sha256 = ?", digest(token))

    def next_pair(self, rater: int) -> int | None:
        """A pair that the rater has not answered, at random from those with the fewest raters; None: none is left."""
        left = self.database.execute(
            """SELECT (SELECT COUNT(DISTINCT rater) FROM vote WHERE pair = pair.id), pair.id FROM pair
               WHERE id NOT IN (SELECT pair FROM vote WHERE rater = ?)""",
            (rater,),
        ).fetchall()
        return min(((raters, self._chance("order", rater, pair), pair) for raters, pair in left), default=(None,))[-1]

    def sides(self, rater: int, pair: int) -> tuple[str, Shown, Shown] | None:
        """Prompt, left and right picture of a pair as a rater sees it; None: there is no such pair.

        Sides are random, but the same whenever the rater sees the pair. They follow from the study's random seed, which
        is never shown, so that a rater cannot work them out.
        """
        found = self.database.execute(
            """SELECT picture.prompt, picture.id, token, width, height FROM pair
               JOIN picture ON picture.id IN (a, b) WHERE pair.id = ? ORDER BY picture.id = b""",
            (pair,),
        ).fetchall()
        if not found:
            return None
        shown = [Shown(*row[1:]) for row in found]
        left, right = shown if self._chance("sides", rater, pair) < 2**255 else shown[::-1]
        return found[0][0], left, right

    def vote(self, rater: int, pair: int, left: int, quality: str, alignment: str) -> None:
        """Store an answer: it is on disk when this returns.

        Args:
            rater: the rater's number.
            pair: the pair's number.
            left: the number of the picture that was on the left.
            quality: `left`, `tie` or `right`, the answer to the first question.
            alignment: likewise, to the second.
        """
        self.database.execute(
            "INSERT INTO vote (rater, pair, on_left, quality, alignment, time) VALUES (?, ?, ?, ?, ?, ?)",
            (rater, pair, left, quality, alignment, now()),
        )

    def answer(self, rater: int, pair: int) -> dict[str, str]:
        """A rater's last answer to a pair, by question; empty: there is none yet."""
        query = "SELECT quality, alignment FROM vote WHERE rater = ? AND pair = ? ORDER BY id DESC"
        found = self.database.execute(query, (rater, pair)).fetchone()
        return dict(zip(("quality", "alignment"), found, strict=True)) if found else {}

    def previous(self, rater: int, pair: int | None = None) -> int | None:
        """The pair that a rater answered before this one (without `pair`: the last one); None: there is none."""
        query = """SELECT pair FROM (SELECT pair, MIN(id) AS first FROM vote WHERE rater = ?1 GROUP BY pair)
                   WHERE first < COALESCE((SELECT MIN(id) FROM vote WHERE rater = ?1 AND pair = ?2), 1e18)
                   ORDER BY first DESC"""
        return self._one(query, rater, pair)

    def progress(self, rater: int) -> tuple[int, int]:
        """How many pairs a rater has answered, and how many there are."""
        done = self._one("SELECT COUNT(DISTINCT pair) FROM vote WHERE rater = ?", rater)
        return done or 0, self._one("SELECT COUNT(*) FROM pair") or 0

    def picture(self, token: str) -> Path | None:
        """The file of the picture with this random name; None: there is none."""
        found = self.database.execute("SELECT token FROM picture WHERE token = ?", (token,)).fetchone()
        return self.folder / PICTURES / f"{found[0]}.png" if found else None

    def votes(self) -> list[Vote]:
        """The last answer of every rater to every pair."""
        rows = self.database.execute(
            """SELECT vote.rater, a.prompt, first.name, second.name, on_left = pair.a, quality, alignment
               FROM vote JOIN pair ON pair.id = vote.pair
               JOIN picture a ON a.id = pair.a JOIN model first ON first.id = a.model
               JOIN picture b ON b.id = pair.b JOIN model second ON second.id = b.model
               WHERE vote.id IN (SELECT MAX(id) FROM vote GROUP BY rater, pair) ORDER BY vote.id"""
        )
        return [Vote(*row[:4], bool(row[4]), *row[5:]) for row in rows]

    def matches(self) -> dict[tuple[str, str], int]:
        """How many pairs every two models have, by the models' names."""
        rows = self.database.execute(
            """SELECT first.name, second.name, COUNT(*) FROM pair
               JOIN picture a ON a.id = pair.a JOIN model first ON first.id = a.model
               JOIN picture b ON b.id = pair.b JOIN model second ON second.id = b.model
               GROUP BY first.id, second.id ORDER BY first.id, second.id"""
        )
        return {(a, b): count for a, b, count in rows}

    def _one(self, query: str, *values: object) -> int | None:
        found = self.database.execute(query, values).fetchone()
        return found[0] if found else None

    def _chance(self, *about: object) -> int:
        """A random number below 2^256 that depends only on the study's seed and on `about`."""
        return int(digest("/".join(map(str, (self.settings["seed"], *about)))), 16)


def connect(folder: Path) -> sqlite3.Connection:
    """Open the database so that each row is on disk as soon as it is written."""
    # isolation_level None: each statement is a transaction; check_same_thread: a server may change threads
    database = sqlite3.connect(folder / DATABASE, isolation_level=None, check_same_thread=False)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute("PRAGMA foreign_keys = ON")
    return database


def is_begun(folder: Path) -> bool:
    """Whether a folder holds a study whose beginning was completed.

    Raises:
        ValueError: its database cannot be read.
    """
    if not (folder / DATABASE).is_file():
        return False
    try:
        database = connect(folder)
        found = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'setting'").fetchone()
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{folder / DATABASE} is not a study ({error}); use another --out, or restore it") from None
    database.close()
    return found is not None


def digest(text: str) -> str:
    """The SHA-256 of a text, in hexadecimal."""
    return sha256(text.encode()).hexdigest()


def now() -> str:
    """The time in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
