"""What MkDocs puts into pages when it builds them: the choices, read from the code, and the README's paper map.

Run as a program (`make choices`), it prints the choices.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDERS = ("lidit", "data_prep", "experiments")
TAG = re.compile(r"\b(UNSTATED|DEVIATION): (.+)")  # in a comment or in a docstring
COMMENT = re.compile(r"\s*# ?(.*)")
END = re.compile(r'"""|\n\s*\n')  # of a paragraph in a docstring
ARGUMENT = re.compile(r"\s+(\w+): ")  # the start of a line under Args
MARKDOWN = re.compile(r"([\\`*_{}\[\]|])")


class Choice(NamedTuple):
    """One tag: its kind, where it stands, the code that it is about (may be empty) and what it says."""

    kind: str
    place: str
    code: str
    said: str


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
        rows = [
            f"| `{found.place}` | {f'`{found.code}`: ' * bool(found.code)}{plain(found.said)} |"
            for found in tagged()
            if found.kind == tag
        ]
        text += [f"## {title}", "", "| where | what |", "|---|---|", *rows, ""]
    return "\n".join(text)


def plain(text: str) -> str:
    """Text that stays as it is in Markdown."""
    return MARKDOWN.sub(r"\\\1", escape(text, quote=False))


def files() -> list[Path]:
    """The files whose tags are listed."""
    return sorted(path for folder in FOLDERS for kind in ("py", "yaml") for path in (ROOT / folder).rglob(f"*.{kind}"))


def tagged() -> Iterator[Choice]:
    """Every tag of the files, in their order."""
    for path in files():
        lines = path.read_text().splitlines()
        for i, line in enumerate(lines):
            if tag := TAG.search(line):
                code, said = told(line[: tag.start()], tag[2], lines[i + 1 :])
                yield Choice(tag[1], f"{path.relative_to(ROOT)}:{i + 1}", code, said)


def told(before: str, said: str, after: list[str]) -> tuple[str, str]:
    """What a tag is about and all that it says.

    Args:
        before: the line up to the tag: code and `#`, the start of a comment, or part of a docstring.
        said: the rest of the line.
        after: the lines that follow.

    Returns:
        The code before the comment, or the argument that the docstring describes, or nothing; and the text, with the
        lines in which it goes on. A comment that follows code ends with its line.
    """
    code, comment, _ = before.rpartition("#")
    if code.strip():
        return code.strip().removesuffix(":"), said
    if comment:
        return "", " ".join([said, *continued(after)])
    argument = ARGUMENT.match(before)
    return argument[1] if argument else "", paragraph("\n".join([said, *after]))


def continued(lines: list[str]) -> list[str]:
    """The text of the comment lines that these begin with, up to one with a tag of its own."""
    said = []
    for line in lines:
        comment = COMMENT.fullmatch(line)
        if not comment or TAG.search(line):
            break
        said.append(comment[1])
    return said


def paragraph(text: str) -> str:
    """The text, in one line, up to the end of its docstring, an empty line, the next argument or the next tag."""
    first, *lines = END.split(text)[0].splitlines()
    lines = takewhile(lambda line: not ARGUMENT.match(line) and not TAG.search(line), lines)
    return " ".join([first, *map(str.strip, lines)])


def main() -> None:
    """Print every choice on a line of its own."""
    for kind, place, code, said in tagged():
        print(f"{place}: {kind}{f' [{code}]' * bool(code)}: {said}")


if __name__ == "__main__":
    main()
