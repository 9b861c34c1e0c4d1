"""How the reference shows docstrings: a choice that is tagged in one is a paragraph there, no heading."""

from __future__ import annotations

import re

import griffe

HASH = re.compile(r"^# ", re.MULTILINE)


class Choices(griffe.Extension):
    """Takes the hashes from tags, which Markdown would read as titles."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = HASH.sub("", obj.docstring.value)
