"""The pages of docs/, the README and CONTRIBUTING.md, taken apart."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
MANUAL = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *MANUAL]
NEEDS = {"cluster", "data", "gpu", "hours", "minutes", "network"}
BLOCK = re.compile(
    r"(?P<notes>(?:^<!-- [^\n]* -->\n+)*)^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
NOTE = re.compile(r"<!-- (needs|file): (.*) -->")
PROGRAMS = ("lidit ", "make ", "pip ", "python ")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        place: page and line.
        language: what stands after the fence.
        text: what is in it.
        needs: what a machine must have for its commands.
        file: the name under which it is a file for later commands of the page, empty: it is none.
    """

    place: str
    language: str
    text: str
    needs: frozenset[str] = frozenset()
    file: str = ""

    @property
    def is_shell(self) -> bool:
        plain = self.language == "" and self.text.startswith(PROGRAMS)
        return not self.file and (plain or self.language in ("bash", "console", "sh", "shell"))

    @property
    def commands(self) -> list[list[str]]:
        """Its command lines in words, without comments; of a file of rows, each row as a command."""
        text = re.sub(r"^(?=.)", "lidit ", self.text, flags=re.MULTILINE) if self.is_rows else self.text
        text = re.sub(r"\s# .*$", "", text.replace("\\\n", " "), flags=re.MULTILINE)
        lexer = shlex.shlex(text, posix=True, punctuation_chars="&\n")
        lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
        commands: list[list[str]] = [[]]
        for word in lexer:
            if set(word) <= {"&", "\n"}:
                commands.append([])
            else:
                commands[-1].append(word)
        return [words for words in commands if words]

    @property
    def is_rows(self) -> bool:
        return self.file.endswith("rows.txt")


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, each with the notes that stand right before it."""
    text, found = page.read_text(), []
    for match in BLOCK.finditer(text):
        notes = dict(NOTE.findall(match["notes"]))
        needs = frozenset(re.findall(r"\w+", notes.get("needs", "")))
        line = text.count("\n", 0, match.start("language")) + 1
        place = f"{page.relative_to(ROOT)}:{line}"
        found.append(Block(place, match["language"], match["text"], needs, notes.get("file", "")))
    return found
