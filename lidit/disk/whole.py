"""Files and folders that are whole or not there: written under another name, which becomes their own at the end."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

PARTIAL = ".partial"
WRITER = 8  # letters that tell writers of the same path apart


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write a file or a folder to, which becomes `path` when the block ends.

    An error leaves what was there before. What killed processes left of the same path is removed. Two processes that
    write the same file at once do not meet: each has a name of its own, and the last one stays. A folder is published
    only where there is none, or an empty one.

    Args:
        path: of the file or folder; the folder it lies in is made where it is missing.

    Raises:
        OSError: it could not be published, or the block wrote nothing.
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
    """Write a text file in UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_first(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all, unless another process was faster."""
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
    """The temporary name of a path; several processes that write at once name themselves."""
    return path.with_name(f".{path.name}{'.' if writer else ''}{writer}{PARTIAL}")


def is_partial(path: Path) -> bool:
    """Whether this is a temporary name."""
    return path.name.startswith(".") and path.name.endswith(PARTIAL)


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there; a folder loses its name first, so that no half of it is seen."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    if not is_partial(path):
        path = path.rename(partial(path, "removed"))
    shutil.rmtree(path)
