"""What MkDocs puts into pages when it builds them: the choices, read from the code, and the README's paper map."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("lidit", "data_prep", "experiments")  # as `make choices`
TAG = re.compile(r"# (UNSTATED|DEVIATION): ?(.*)")
COMMENT = re.compile(r"\s*# ?(.*)")
MARKDOWN = re.compile(r"([\\`*_{}\[\]|])")


def on_page_markdown(markdown: str, **_: object) -> str:
    """A page with what belongs in place of its marks."""
    for mark, made in {"<!-- choices -->": choices, "<!-- paper map -->": paper_map}.items():
        if mark in markdown:
            markdown = markdown.replace(mark, made())
    return markdown


def paper_map() -> str:
    """The section of the README, without its title; links are from docs instead of the root."""
    section = (ROOT / "README.md").read_text().split("\n## Paper map\n")[1].split("\n## ")[0]
    return section.replace("](docs/", "](")


def choices() -> str:
    """A table of each kind of choice: file, line, and what is said there."""
    titles = {"UNSTATED": "What the paper does not say", "DEVIATION": "Where we do otherwise"}
    text = []
    for tag, title in titles.items():
        rows = [f"| `{place}` | {said} |" for kind, place, said in tagged() if kind == tag]
        text += [f"## {title}", "", "| where | what |", "|---|---|", *rows, ""]
    return "\n".join(text)


def plain(text: str) -> str:
    """Text that stays as it is in Markdown."""
    return MARKDOWN.sub(r"\\\1", escape(text, quote=False))


def tagged() -> Iterator[tuple[str, str, str]]:
    """Kind, place and text of each choice: the code that it stands beside, or what follows in the same comment."""
    files = [path for folder in FOLDERS for kind in ("py", "yaml") for path in (ROOT / folder).rglob(f"*.{kind}")]
    for path in sorted(files):
        lines = path.read_text().splitlines()
        for i, line in enumerate(lines):
            if found := TAG.search(line):
                code = line[: found.start()].strip().removesuffix(":")
                said = plain(" ".join([found[2], *([] if code else continued(lines[i + 1 :]))]))
                yield found[1], f"{path.relative_to(ROOT)}:{i + 1}", f"`{code}`: {said}" if code else said


def continued(lines: list[str]) -> list[str]:
    """The text of the comment lines that these begin with, up to one with a tag of its own."""
    said = []
    for line in lines:
        comment = COMMENT.fullmatch(line)
        if not comment or TAG.search(line):
            break
        said.append(comment[1])
    return said
