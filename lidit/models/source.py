"""Where the files of a frozen model are, and what identifies their content.

A model is named by a Hugging Face id, a folder, or `bundled:NAME`. A cache of features or latents is valid for one
content of these files only, so their fingerprint is made of the content and not of names or dates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from lidit.assets import PREFIX, resolve

SHIPPED = Path(__file__).parent / "shipped"  # OWNER--NAME/config.json: sizes of the models that our recipes name
CHUNK = 1 << 22  # bytes read at the start, middle and end of a large file
WEIGHTS = ("*.safetensors", "*.bin")
_sizes_alone: ContextVar[list[str] | None] = ContextVar("_sizes_alone", default=None)


@contextmanager
def sizes_alone() -> Iterator[list[str]]:
    """While nothing but a model's sizes is asked, take its config from this package where no cache has it.

    Yields:
        The names of the models whose config was taken so, each once; the list grows as they are asked for.
    """
    taken: list[str] = []
    token = _sizes_alone.set(taken)
    try:
        yield taken
    finally:
        _sizes_alone.reset(token)


def find_file(name: str, wanted: str, revision: str | None = None) -> Path:
    """The local path of a model's file, which is downloaded if the name is a Hugging Face id.

    Raises:
        FileNotFoundError: there is no such folder or file, or the hub does not give the file.
    """
    folder = Path(resolve(name)).expanduser()
    if folder.is_dir():
        if not (folder / wanted).is_file():
            raise FileNotFoundError(f"{name} is a folder without {wanted}; name the folder that holds it")
        return folder / wanted
    shipped = SHIPPED / name.replace("/", "--") / wanted
    taken = _sizes_alone.get()
    if taken is not None and shipped.is_file():
        found = try_to_load_from_cache(name, wanted, revision=revision)
        if isinstance(found, str):
            return Path(found)
        taken += [name] if name not in taken else []
        return shipped
    try:
        return Path(hf_hub_download(name, wanted, revision=revision))
    except HFValidationError:
        raise FileNotFoundError(
            f"{name}: there is no such folder, and it is no Hugging Face id (owner/name); correct the name"
        ) from None
    except (OSError, HfHubHTTPError) as error:
        at = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"{name}: there is no such folder, and the Hugging Face hub did not give {wanted}{at} "
            f"({type(error).__name__}); correct the name, log in with `hf auth login` if it is gated, or fetch it with "
            f"`hf download {name}` where there is a network"
        ) from None


def load_name(name: str) -> str:
    """The name for `from_pretrained`: the folder of a local model, the id of one on the hub."""
    folder = Path(resolve(name)).expanduser()
    return str(folder) if folder.is_dir() else name


def describe(name: str, config: Path) -> dict[str, str]:
    """Name and revision of a model for a cache's identity: its commit on the hub, or its folder's fingerprint.

    The name of a folder is the last part of its path, so that a cache stays valid where the folder lies elsewhere.
    """
    if not Path(resolve(name)).expanduser().is_dir():
        return {"name": name, "revision": commit(config)}
    return {"name": name if name.startswith(PREFIX) else Path(name).name, "revision": fingerprint(config.parent)}


def commit(config: Path) -> str:
    """The commit hash of a downloaded file: the hub's cache keeps it at .../snapshots/COMMIT/path/in/repository."""
    parts = config.parts
    return parts[len(parts) - parts[::-1].index("snapshots")]


def fingerprint(folder: Path) -> str:
    """SHA-256 over the config, the tokenizer and the weights of a folder.

    A file of up to three chunks is read whole. Of a larger one, its size and three chunks are read: weights of another
    training differ everywhere, and checking a cache must not take the time to read 16 GB.
    """
    digest = hashlib.sha256()
    files = [folder / "config.json", folder / "tokenizer.json"]
    files += sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))
    for path in filter(Path.is_file, files):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(0, size - CHUNK)) if size > 3 * CHUNK else range(0, size, CHUNK):
                file.seek(start)
                digest.update(file.read(CHUNK))
    return digest.hexdigest()
