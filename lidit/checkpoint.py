"""Checkpoints of `lidit fit` on disk: a file of one process or DDP, or a folder of sharded weights.

Nothing in a checkpoint is executed: files are read as weights and settings, and a folder's index may name only the
types that an index is made of.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple
from zipfile import is_zipfile

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp

from lidit.disk.folder import checkpoints_in

log = logging.getLogger(__name__)

META = "meta.pt"  # in a folder: all but the sharded tensors; the name is Lightning's
COMMITTED = ".metadata"  # in a folder: where each tensor is; written last, once every rank has written its part
# in a folder's index: the modules of its types, and what else it may name
INDEX = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
PATHS = {"pathlib.PosixPath", "pathlib._local.PosixPath"}
PLAIN = {"torch.Size", "torch.serialization._get_layout", "collections.OrderedDict"} | PATHS
WEIGHTS, AVERAGE = "state_dict.", "callbacks.EMA.average."  # names of tensors in a folder


def newest(
    folder: Path, expected: dict[str, tuple[int, ...]], tell: Callable[[str], None] = log.warning
) -> Path | None:
    """The newest checkpoint that can be resumed; those that are passed over are named with the reason.

    Args:
        folder: folder of a run's checkpoints; it need not exist.
        expected: shape of each weight and buffer of the model that is to be resumed.
        tell: called with a message for each checkpoint that is passed over.
    """
    for path in checkpoints_in(folder):
        try:
            check_whole(path)
            check_shapes(shapes(path), expected, str(path))
        except ValueError as error:
            tell(f"passed over: {error}")
        else:
            return path
    return None


def check_whole(path: Path) -> None:
    """Refuse an incomplete checkpoint.

    Raises:
        ValueError: the checkpoint is incomplete, or the path holds none.
    """
    incomplete = f"{path} is not a complete checkpoint; copy it again, or take an earlier one"
    if path.is_file() and not is_zipfile(path):  # PyTorch writes zip files, whose index comes last
        raise ValueError(incomplete)
    if path.is_dir():
        parts: dict[str, int] = {}
        for part in _index(path).storage_data.values():
            parts[part.relative_path] = max(parts.get(part.relative_path, 0), part.offset + part.length)
        sizes = {file: (path / file).stat().st_size if (path / file).is_file() else -1 for file in parts}
        if not is_zipfile(path / META) or any(sizes[file] < end for file, end in parts.items()):
            raise ValueError(incomplete)


def check_llms(trained_with: list[dict], llms: Sequence[Any], source: str) -> None:
    """Refuse weights that were trained with the features of other LLMs.

    Args:
        trained_with: each LLM's `identity` at training; empty if it was not recorded.
        llms: the frozen LLMs that are to be read now.
        source: where the weights came from, named in the error.

    Raises:
        ValueError: an LLM differs in more than precision and longest caption; the message names what differs.
    """
    if trained_with and len(trained_with) != len(llms):
        raise ValueError(
            f"{source} was trained with {len(trained_with)} LLMs and the recipe names {len(llms)}; "
            f"name {', '.join(then['name'] for then in trained_with)}"
        )
    for i, (then, llm) in enumerate(zip(trained_with, llms if trained_with else [], strict=True)):
        now = llm.identity
        for key in ("revision", "layer", "template", "instruction", "system"):
            if then[key] != now[key]:
                raise ValueError(
                    f"{source} was trained with another LLM {i}: {key} was {then[key]!r} and is {now[key]!r} of "
                    f"{now['name']}; use the LLM it was trained with ({then['name']})"
                )


def check_shapes(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], source: str) -> None:
    """Refuse weights that do not fit a model exactly.

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """
    if wrong := sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)):
        raise ValueError(
            f"{source} is of another architecture: {len(wrong)} tensors differ, first {wrong[0]}, expected "
            f"{expected.get(wrong[0])}, found {found.get(wrong[0])}; use the recipe it was trained with"
        )


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each weight and buffer in a checkpoint; no weight is read.

    Raises:
        ValueError: the path holds no checkpoint of `lidit fit`.
    """
    if path.is_dir():
        return {n.removeprefix(WEIGHTS): tuple(e.size) for n, e in _tensors(path) if n.startswith(WEIGHTS)}
    return {n: tuple(weight.shape) for n, weight in record(path)["state_dict"].items()}


def record(path: Path) -> dict[str, Any]:
    """The content of a checkpoint but a folder's tensors; a file's tensors are read from disk when they are used.

    Raises:
        ValueError: the checkpoint is incomplete, holds something that could run code, or is not of TextToImage.
    """
    check_whole(path)
    try:
        found = torch.load(path / META if path.is_dir() else path, map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError:
        raise ValueError(f"{path} holds more than weights and settings, and is not loaded: it could run code") from None
    except RuntimeError:
        raise ValueError(f"{path} is damaged, or is no checkpoint; copy it again, or take an earlier one") from None
    needed = {"hyper_parameters"} if path.is_dir() else {"hyper_parameters", "state_dict"}
    if not (isinstance(found, dict) and needed <= found.keys()):
        raise ValueError(f"{path} is no checkpoint of `lidit fit`: it lacks weights or their configuration")
    return found


def fingerprint(path: Path) -> str:
    """SHA-256 that tells a checkpoint from any other: of a file's bytes, or of all in a folder but the weights' bytes.

    A folder's index, its record (step, loss, settings) and the sizes of its parts differ from save to save. To read its
    hundreds of gigabytes of weights would take longer than to draw.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    parts = [f"{part.name} {part.stat().st_size}" for part in sorted(path.iterdir())]
    small = (path / COMMITTED).read_bytes() + (path / META).read_bytes()
    return hashlib.sha256("\n".join(parts).encode() + small).hexdigest()


class Trained(NamedTuple):
    """A trained model as it is on disk.

    Args:
        config: settings of `TextToImage`.
        weights: weights and buffers, by name.
        llms: `identity` of each LLM it was trained with; empty if it was not recorded.
        sizes: width and height in pixels of the training images, the most frequent first; empty if not recorded.
        precision: the trainer's, such as bf16-mixed; None if not recorded.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    llms: list[dict]
    sizes: list[tuple[int, int]]
    precision: str | None


def read(path: Path, ema: bool) -> Trained:
    """The model of a checkpoint; the optimizer's state is not read.

    Args:
        path: the checkpoint, a file or a folder.
        ema: take the averaged weights instead of the trained ones; buffers have no average.

    Raises:
        ValueError: the path holds no checkpoint of TextToImage, or one without the averaged weights asked for.
    """
    found = record(path)
    config = {k: v for k, v in found["hyper_parameters"].items() if not k.startswith("_")}
    if path.is_dir():
        trained, average = _read_folder(path, ema)
    else:
        trained, average = found["state_dict"], found.get("callbacks", {}).get("EMA", {}).get("average", {})
    if ema and not average:
        raise ValueError(
            f"{path} holds no averaged weights; say --ema false for the trained ones; in `lidit fit`, --start_ema false"
        )
    weights = trained | average if ema else trained
    return Trained(config, weights, found.get("llms", []), sizes_in(found), found.get("precision"))


def sizes_in(record: dict[str, Any]) -> list[tuple[int, int]]:
    """The sizes of the training images that a checkpoint or an export records."""
    return [(int(width), int(height)) for width, height in record.get("sizes", [])]


def _read_folder(path: Path, ema: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A folder's trained weights and their averages; a weight with an average is not read itself, to save memory."""
    entries = dict(_tensors(path))
    averaged = {n.removeprefix(AVERAGE) for n in entries if ema and n.startswith(AVERAGE)}
    wanted = [n for n in entries if n.startswith(WEIGHTS) and n.removeprefix(WEIGHTS) not in averaged]
    wanted += [AVERAGE + n for n in averaged]
    tensors = {n: torch.empty(entries[n].size, dtype=entries[n].properties.dtype) for n in wanted}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # that is what no_dist says
        dcp.load(tensors, checkpoint_id=path, no_dist=True)
    trained = {n.removeprefix(WEIGHTS): t for n, t in tensors.items() if n.startswith(WEIGHTS)}
    return trained, {n.removeprefix(AVERAGE): t for n, t in tensors.items() if n.startswith(AVERAGE)}


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    return ((n, e) for n, e in _index(folder).state_dict_metadata.items() if hasattr(e, "size"))


def _index(folder: Path) -> dcp.Metadata:
    """Where each tensor of a folder is.

    Raises:
        ValueError: the folder has no index, or it holds more than an index.
    """
    file = folder / COMMITTED
    if not file.is_file():
        raise ValueError(f"{folder} is not a complete checkpoint; copy it again, or take an earlier one")
    try:
        with file.open("rb") as opened:
            return _IndexReader(opened).load()
    except (EOFError, UnpicklingError) as error:
        raise ValueError(f"{folder} is not loaded: its index is damaged, or could run code ({error})") from None


class _IndexReader(pickle.Unpickler):
    """Reads an index, which is a pickle, and lets in only the types that an index is made of."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        own = isinstance(found, type) and module in INDEX and found.__module__ == module
        if not (own or f"{module}.{name}" in PLAIN or isinstance(found, torch.dtype)):
            raise UnpicklingError(f"it names {module}.{name}")
        return found
