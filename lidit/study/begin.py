"""Begin a study: copy the pictures under random names, and write down which pairs are compared."""

from __future__ import annotations

import json
import random
import secrets
import sqlite3
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from lidit.study.collect import Competitor, matches
from lidit.study.store import PICTURES, connect, now

SCHEMA = (
    "CREATE TABLE setting (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE model (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, folder TEXT NOT NULL, provenance TEXT)",
    """CREATE TABLE picture (id INTEGER PRIMARY KEY, model INTEGER NOT NULL REFERENCES model, prompt TEXT NOT NULL,
       token TEXT NOT NULL UNIQUE, width INTEGER NOT NULL, height INTEGER NOT NULL, file TEXT NOT NULL,
       sha256 TEXT NOT NULL, facts TEXT NOT NULL, UNIQUE (model, prompt))""",
    """CREATE TABLE pair (id INTEGER PRIMARY KEY, a INTEGER NOT NULL REFERENCES picture,
       b INTEGER NOT NULL REFERENCES picture)""",
    "CREATE TABLE rater (id INTEGER PRIMARY KEY, token_sha256 TEXT NOT NULL UNIQUE, agreed TEXT NOT NULL)",
    """CREATE TABLE vote (id INTEGER PRIMARY KEY, rater INTEGER NOT NULL REFERENCES rater,
       pair INTEGER NOT NULL REFERENCES pair, on_left INTEGER NOT NULL REFERENCES picture,
       quality TEXT NOT NULL CHECK (quality IN ('left', 'tie', 'right')),
       alignment TEXT NOT NULL CHECK (alignment IN ('left', 'tie', 'right')), time TEXT NOT NULL)""",
    "CREATE INDEX vote_of ON vote (pair, rater)",
    "CREATE TRIGGER no_deletion BEFORE DELETE ON vote BEGIN SELECT RAISE(ABORT, 'a vote cannot be deleted'); END",
    "CREATE TRIGGER no_change BEFORE UPDATE ON vote BEGIN SELECT RAISE(ABORT, 'a vote cannot be changed'); END",
)


def begin(folder: Path, competitors: list[Competitor], against: Literal["all", "first"] = "all") -> None:
    """Copy the pictures and write the pairs in random order. If this is stopped midway, there is no study.

    Args:
        folder: where the study is stored.
        competitors: the models with their pictures.
        against: `all` compares every two models, `first` only the first model with each other one.

    Raises:
        ValueError: no two models have a prompt in common, or a picture is damaged.
    """
    compared = list(matches(competitors, every=against == "all"))
    if not compared:
        names = ", ".join(each.name for each in competitors)
        raise ValueError(f"{names} have no prompt in common; draw the same file of prompts with each model")
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    random.SystemRandom().shuffle(compared)  # raters see a pair's number, which must not reveal the models
    settings = {"seed": secrets.token_hex(16), "begun": now(), "against": against}
    database = connect(folder)
    with database:  # one transaction: all rows or none
        database.execute("BEGIN IMMEDIATE")
        for statement in SCHEMA:
            database.execute(statement)
        database.executemany("INSERT INTO setting VALUES (?, ?)", settings.items())
        models = {each.name: _add_model(database, each) for each in competitors}
        pictures: dict[tuple[str, str], int] = {}
        for prompt, *sides in compared:
            for side in sides:
                if (side.name, prompt) not in pictures:
                    pictures[side.name, prompt] = _add_picture(database, folder, models[side.name], side, prompt)
            ids = [pictures[side.name, prompt] for side in sides]
            database.execute("INSERT INTO pair (a, b) VALUES (?, ?)", ids)
    database.close()


def _add_model(database: sqlite3.Connection, competitor: Competitor) -> int:
    row = (competitor.name, str(competitor.folder.resolve()), competitor.provenance)
    return _id(database.execute("INSERT INTO model (name, folder, provenance) VALUES (?, ?, ?)", row))


def _add_picture(database: sqlite3.Connection, folder: Path, model: int, competitor: Competitor, prompt: str) -> int:
    """Copy a picture's pixels, without its text chunks, and write down where they came from."""
    picture, token = competitor.pictures[prompt], secrets.token_hex(16)
    try:
        with Image.open(picture.path) as image:
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except OSError as error:
        raise ValueError(f"{picture.path} is damaged ({error}); remove it or draw it again") from None
    Image.fromarray(pixels).save(folder / PICTURES / f"{token}.png")
    checksum = sha256(picture.path.read_bytes()).hexdigest()
    height, width = pixels.shape[:2]
    row = (model, prompt, token, width, height, str(picture.path), checksum, json.dumps(picture.facts))
    columns = "model, prompt, token, width, height, file, sha256, facts"
    return _id(database.execute(f"INSERT INTO picture ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row))


def _id(cursor: sqlite3.Cursor) -> int:
    return cursor.lastrowid or 0
