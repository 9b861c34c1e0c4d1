"""Latents and LLM features on disk, made by `data_prep/precompute.py` and read batch by batch.

A cache folder holds `identity.json` (which shards, VAE, LLMs and dtype it was made with), one safetensors per shard and
`empty.safetensors`. In a shard's file, for samples in the order of its index:

    latent/HxW                     (m c h w)   the m samples of that image height and width
    llmI/KIND/tokens               (sum of l, e)   features without padding, of the captions of a KIND: caption, dense
    llmI/KIND/offsets              (n + 1)   where each sample's tokens start
    llmI/KIND/start                (n)   prompt_start of each sample

`empty.safetensors` holds `llmI/tokens` (l e) and `llmI/start` () of the empty caption. A cache that was made with
another model, layer, template, length, dtype or set of shards is refused with the reason, never used. Several folders
are read as one cache: the latents may lie in one folder, and the features of each LLM in another.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lidit.data.index import ShardIndex, differences

IDENTITY = "identity.json"
KINDS = ("caption", "dense")

Folders = list[str] | str
Features = tuple[Tensor, Tensor, Tensor]  # tokens (b l e), mask (b l), prompt_start (b)


def listed(folders: Folders | None) -> list[str]:
    """The folders as a list, whether none, one or several were given."""
    return [folders] if isinstance(folders, str) else folders or []


def has_features(folders: Folders | None) -> bool:
    """Whether a cache holds LLM features. Other faults of a cache are reported when it is opened."""
    return any(identity["llms"] for identity in _identities(folders))


def has_latents(folders: Folders | None) -> bool:
    """Whether a cache holds latents. Other faults of a cache are reported when it is opened."""
    return any(identity["vae"] for identity in _identities(folders))


def _identities(folders: Folders | None) -> list[dict]:
    found = [Path(folder) / IDENTITY for folder in listed(folders)]
    return [json.loads(path.read_text()) for path in found if path.is_file()]


class Cache:
    """Latents and LLM features that were computed once for the samples of an index.

    Args:
        folders: one or several folders that `lidit prep precompute` wrote.
        index: the samples that the folders must have been made for.

    Raises:
        FileNotFoundError: a folder or one of its shards is missing.
        ValueError: a folder was made for other shards, or a file cannot be read.
    """

    def __init__(self, folders: Folders, index: ShardIndex) -> None:
        self._folders = [_Folder(folder, index) for folder in listed(folders)]
        self._vae = next((folder for folder in self._folders if folder.identity["vae"] is not None), None)
        self._llms = self._held()  # the features that are read, in this order

    def _held(self) -> list[tuple[_Folder, int]]:
        return [(folder, i) for folder in self._folders for i in range(len(folder.identity["llms"]))]

    def expect(self, vae: dict | None, llms: list[dict] | None) -> None:
        """Refuse a cache that other models made. From here on only the features of the LLMs in use are read.

        Args:
            vae: identity of the VAE in use; None: latents are not checked.
            llms: identities of the LLMs in use, in their order; None: features are not checked.

        Raises:
            ValueError: the cache is stale; the message names the fields that differ and how to make the cache again.
        """
        if vae is not None and self._vae is not None:
            self._vae.check({"vae": _as_stored(vae)}, "vae")
        if llms is not None and self._llms:
            self._llms = [self._find(i, _as_stored(llm)) for i, llm in enumerate(llms)]

    def _find(self, position: int, llm: dict) -> tuple[_Folder, int]:
        """The folder that holds the features of the LLM in use, and the number of the LLM in that folder."""

        def differ(held: tuple[_Folder, int]) -> list[str]:
            return differences(held[0].identity["llms"][held[1]], llm)

        closest = min(self._held(), key=lambda held: len(differ(held)))
        if differ(closest):
            raise closest[0].stale(f"llms.{position}", differ(closest))
        return closest

    @property
    def has_latents(self) -> bool:
        """Whether the cache holds latents."""
        return self._vae is not None

    def latents(self, samples: np.ndarray) -> Float[Tensor, "b c h w"]:
        """Latents of samples of one image shape, float32."""
        return self._vae.latents(samples)

    def features(self, samples: np.ndarray, dense: bool, blank: np.ndarray) -> list[Features] | None:
        """Per LLM, its features of each caption, or of the empty one where `blank`, padded on the right."""
        return [folder.features(llm, samples, dense, blank) for folder, llm in self._llms] or None


class _Folder:
    """One folder of a cache."""

    def __init__(self, folder: str, index: ShardIndex) -> None:
        self.folder, self._index = Path(folder), index
        if not (self.folder / IDENTITY).is_file():
            raise FileNotFoundError(f"{folder} is not a cache (it has no {IDENTITY}); {self._remake(index)}")
        self.identity = json.loads((self.folder / IDENTITY).read_text())
        self.check({"shards": index.digest}, "shards")
        self._shards: dict[int, dict[str, Tensor]] = {}
        for shard in range(len(index.paths)):
            if not (path := shard_file(self.folder, shard)).is_file():
                raise FileNotFoundError(
                    f"cached shard {path} is missing; {self._remake(index)} (it skips finished shards)"
                )
        self._row = _rows_within_shape(index)

    def latents(self, samples: np.ndarray) -> Float[Tensor, "b c h w"]:
        """Latents of samples of one image shape, float32."""
        height, width = (int(self._index.column(side)[samples[0]]) for side in ("height", "width"))
        name = f"latent/{height}x{width}"
        return torch.stack([self._shard(self._index.place(s)[0])[name][self._row[s]] for s in samples.tolist()]).float()

    def features(self, llm: int, samples: np.ndarray, dense: bool, blank: np.ndarray) -> Features:
        """The features of one LLM for each caption, or for the empty one where `blank`, padded on the right."""
        empty = self._file(self.folder / "empty.safetensors", -1)
        rows = [
            (empty[f"llm{llm}/tokens"], int(empty[f"llm{llm}/start"]))
            if b
            else self._tokens(s, f"llm{llm}/{KINDS[dense]}")
            for s, b in zip(samples.tolist(), blank.tolist(), strict=True)
        ]
        lengths = torch.tensor([len(tokens) for tokens, _ in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        tokens = pad_sequence([tokens for tokens, _ in rows], batch_first=True)
        return tokens, mask, torch.tensor([start for _, start in rows])

    def _tokens(self, sample: int, name: str) -> tuple[Tensor, int]:
        shard, row = self._index.place(sample)
        tensors = self._shard(shard)
        if f"{name}/tokens" not in tensors:
            raise ValueError(
                f"cache {self.folder} holds no features of {name.split('/')[1]} captions; {self._remake()}"
            )
        first, last = tensors[f"{name}/offsets"][row : row + 2].tolist()
        return tensors[f"{name}/tokens"][first:last], int(tensors[f"{name}/start"][row])

    def _shard(self, shard: int) -> dict[str, Tensor]:
        return self._file(shard_file(self.folder, shard), shard)

    def _file(self, path: Path, slot: int) -> dict[str, Tensor]:
        """A file's tensors. safetensors maps the file, so only the tensors that are read take memory."""
        if slot not in self._shards:
            try:
                self._shards[slot] = load_file(path)
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"cached shard {path} cannot be read ({error}); delete it, then {self._remake()}"
                ) from error
        return self._shards[slot]

    def check(self, asked: dict, what: str) -> None:
        """Refuse a folder whose identity differs in one of the fields of `asked`."""
        if differ := differences(self.identity, asked):
            raise self.stale(what, differ)

    def stale(self, what: str, differ: list[str]) -> ValueError:
        """The error that names the fields that differ and the command that makes the folder again."""
        reason = "; ".join(differ)
        return ValueError(f"cache {self.folder} is stale ({what}): {reason}. Delete it, then {self._remake()}")

    def _remake(self, index: ShardIndex | None = None) -> str:
        shards = (index or self._index).source
        return f"run: lidit prep precompute --shards {shards} --out {self.folder}, with the recipe's --vae and --llms"

    def __getstate__(self) -> dict:
        """A worker process gets a copy without the mapped files, and maps them itself."""
        return self.__dict__ | {"_shards": {}}


def _as_stored(identity: dict) -> dict:
    """An identity as JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(identity))


def shard_file(folder: Path, shard: int) -> Path:
    """The cache file of a shard, named by the shard's position, since two folders may use the same names."""
    return folder / f"{shard:05d}.safetensors"


def _rows_within_shape(index: ShardIndex) -> np.ndarray:
    """Each sample's row among the latents of its shape in the file of its shard."""
    group = np.stack([index.column("height"), index.column("width"), index.shard], axis=1)
    _, inverse = np.unique(group, axis=0, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    sizes = np.bincount(inverse)
    rows = np.empty(len(index), np.int64)
    rows[order] = np.arange(len(index)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rows
