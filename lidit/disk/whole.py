"""Write files and folders completely or not at all: under a temporary name, which is replaced at the end."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

PARTIAL = ".partial"
WRITER = 8  # letters in a temporary name that tell writers of the same path apart


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write a file or a folder to, which becomes `path` when the block ends.

    If the block fails, `path` stays as it was. Temporary files that killed processes left for the same path are
    removed. Two processes may write the same file at once: each has a temporary name of its own, and the file of the
    last one stays. A folder can take the place only of nothing, or of an empty folder.

    Args:
        path: path of the file or folder; the folder around it is made if it is missing.

    Raises:
        OSError: `path` could not be replaced, or the block wrote nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial(path, uuid.uuid4().hex[:WRITER])
    try:
        yield temporary
        try:
            os.replace(temporary, path)
        except FileNotFoundError:  # another process that finished the same file has removed this one
            if not path.is_file():
                raise
        for left in path.parent.glob(escape(f".{path.name}.") + "?" * WRITER + PARTIAL):
            remove(left)
    finally:
        remove(temporary)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_first(path: Path, text: str) -> None:
    """Write a text file in UTF-8, completely or not at all; if another process was faster, its file stays."""
    temporary = partial(path, uuid.uuid4().hex[:WRITER])
    temporary.write_text(text, encoding="utf-8")
    try:
        os.link(temporary, path)  # unlike a rename it replaces nothing
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        os.replace(temporary, path)
    finally:
        remove(temporary)


def partial(path: Path, writer: str = "") -> Path:
    """The temporary name of a path; `writer` tells processes apart that write at once."""
    return path.with_name(f".{path.name}{'.' if writer else ''}{writer}{PARTIAL}")


def is_partial(path: Path) -> bool:
    """Whether a path has a temporary name."""
    return path.name.startswith(".") and path.name.endswith(PARTIAL)


def remove(path: Path) -> None:
    """Remove a file or folder if it exists; a folder is renamed first, so that nobody sees half of it."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    if not is_partial(path):
        path = path.rename(partial(path, "removed"))
    shutil.rmtree(path)
