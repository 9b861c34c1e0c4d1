"""Where the files of a frozen part are, and which files exactly: shared by the LLM and the VAE.

A part is named by a Hugging Face id, a folder, or `bundled:NAME`. A cache of features or latents is valid for one
content of those files only, so the fingerprint reads content, not names or dates.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from lidit.assets import PREFIX, resolve

CHUNK = 1 << 22  # bytes read at the start, middle and end of a large file
WEIGHTS = ("*.safetensors", "*.bin")


def find_file(name: str, wanted: str, revision: str | None = None) -> Path:
    """The local path of a part's file, downloaded when the name is a hub id.

    Raises:
        FileNotFoundError: there is no such folder, no such file in it, or the hub does not give it.
    """
    folder = Path(resolve(name)).expanduser()
    if folder.is_dir():
        if not (folder / wanted).is_file():
            raise FileNotFoundError(f"{name} is a folder without {wanted}; name the folder that holds it")
        return folder / wanted
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
    """What `from_pretrained` takes: the folder of a local part, the id of a hub one."""
    folder = Path(resolve(name)).expanduser()
    return str(folder) if folder.is_dir() else name


def describe(name: str, config: Path) -> dict[str, str]:
    """Name and revision of a part for a cache's identity: the commit of a hub part, the fingerprint of a folder.

    Of a folder only the last name is said, so that a cache may be read where the folder lies elsewhere.
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

    Files up to three chunks are read whole. Of larger ones the size and three chunks are: weights of another training
    differ everywhere, and 16 GB are not read to find a cache.
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
