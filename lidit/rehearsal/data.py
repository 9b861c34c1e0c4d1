"""Drawn pictures as the shards of a rehearsal: as many sets as the recipe has, remote where it says so, cached too."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from lidit.data.cache import has_features, has_latents
from lidit.data.index import ShardIndex
from lidit.data.remote import is_remote

SAMPLES, IN_A_SHARD = 48, 12  # of a set of shards: four shards, so that a window of two is one
CACHES = {"train": "cache", "val": "val_cache", "test": "test_cache"}
RANGE = re.compile(r"bytes=(\d+)-(\d*)$")
Run = Callable[[list[str]], None]  # runs a command of lidit


def known_sizes(data: dict[str, Any]) -> list[tuple[int, int]]:
    """Sizes (width, height) of most training pictures, if the recipe's data is on this machine."""
    for name in _names(data["train"]):
        if not is_remote(name) and Path(name).exists():
            index = ShardIndex(name)
            pairs = list(zip(index.column("width").tolist(), index.column("height").tolist(), strict=True))
            return sorted(set(pairs), key=pairs.count, reverse=True)[:3]
    return []


def with_drawn_data(recipe: dict[str, Any], folder: Path, sizes: list[tuple[int, int]], url: str, run: Run) -> dict:
    """The recipe with shards of drawn pictures in place of its own, and with caches of these where it has caches.

    Args:
        recipe: small, with tiny models.
        folder: where shards and caches are written.
        sizes: of the pictures, width and height.
        url: of a server of that folder, for shards that are remote.
        run: runs a command of lidit.
    """
    data = dict(recipe["data"])
    for key, cache in CACHES.items():
        if not data[key]:
            continue
        data[key] = _drawn(data[key], Path(key), folder, sizes, url, run)
        if data[cache]:
            data[cache] = _cached(data[cache], recipe["model"], _names(data[key]), folder / cache, run)
    return recipe | {"data": data}


def _names(shards: Any) -> list[str]:
    """All sets of shards that a recipe names."""
    if isinstance(shards, str):
        return [shards]
    if isinstance(shards, dict):
        return _names(shards["shards"])
    return [name for each in shards for name in _names(each)]


def _drawn(shards: Any, name: Path, folder: Path, sizes: list[tuple[int, int]], url: str, run: Run) -> Any:
    """Sets of shards in the same form, each drawn anew into a folder of this name."""
    if isinstance(shards, list):
        return [_drawn(each, name / str(i), folder, sizes, url, run) for i, each in enumerate(shards)]
    if isinstance(shards, dict):
        return shards | {"shards": _drawn(shards["shards"], name, folder, sizes, url, run)}
    texts = [f"{width}x{height}" for width, height in sizes]
    command = ["prep", "shard", "--out", str(folder / name), "--count", str(SAMPLES), "--shard_size", str(IN_A_SHARD)]
    run([*command, "--sizes", yaml.safe_dump(texts, default_flow_style=True).strip(), "--workers", "1"])
    return f"{url}/{name}" if is_remote(shards) else str(folder / name)


def _cached(caches: Any, model: dict[str, Any], shards: list[str], folder: Path, run: Run) -> Any:
    """Caches of the drawn shards that hold what the recipe's own hold; all that can be where those are not here."""
    there = [each for each in ([caches] if isinstance(caches, str) else caches) if Path(each).is_dir()]
    latents, features = not there or has_latents(there), not there or has_features(there)
    command = ["prep", "precompute", "--shards", yaml.safe_dump(shards, default_flow_style=True).strip()]
    command += ["--out", str(folder), "--batch_size", "8"]
    command += ["--vae", yaml.safe_dump(model["vae"]) if latents else "null"]
    run(command + (["--llms", yaml.safe_dump(model["llms"])] if features else []))
    return str(folder)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder to this machine alone, with ranges as object stores do, and give its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Ranged, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Ranged(SimpleHTTPRequestHandler):
    """Files, whole or in part; says nothing about it."""

    def do_GET(self) -> None:
        """A range of a file, or what the standard library serves."""
        asked = RANGE.match(self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if asked is None or not path.is_file():
            super().do_GET()
            return
        size = path.stat().st_size
        first, last = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
        with path.open("rb") as file:
            file.seek(first)
            content = file.read(last - first + 1)
        self.send_response(HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Nothing."""
