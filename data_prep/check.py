"""Reads every shard whole, and says what is wrong with the tar, its index, an image, a caption or a key.

lidit prep check shards/train
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from lidit.data.index import COLUMNS, MANIFEST, ShardIndex, expand, index_path, scan
from lidit.data.tars import FIX


@dataclass
class Checked:
    """What a check found in one shard."""

    tar: Path
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.bytes_))
    dense: int = 0  # samples with a synthetic caption
    indexed: bool = False  # whether an index lies beside it
    problems: list[str] = field(default_factory=list)


def check(shards: str, workers: int = 2, shown: int = 10) -> None:
    """Read every shard whole, and print what is wrong with each.

    A shard is good if its tar is whole, the index beside it agrees with the tar, every image can be decoded and has the
    size that the index says, every sample has a caption of at least one word in valid UTF-8, and no two samples have
    the same key.

    Args:
        shards: folder of tars, a tar, or a pattern like `shards/{00000..00009}.tar`.
        workers: number of processes that read.
        shown: number of problems to print for each shard; further ones are counted.

    Raises:
        FileNotFoundError: there are no shards.
        ValueError: some shards are bad, and the message names them; or an argument is out of range.
    """
    if workers < 1 or shown < 0:
        raise ValueError(f"workers is {workers} and shown is {shown}; they are at least 1 and 0")
    tars, found = _tars(shards), []
    for checked in _run(tars, workers):
        found.append(checked)
        verdict = f"bad ({len(checked.problems)})" if checked.problems else "good"
        print(f"{checked.tar}: {len(checked.keys)} samples, {verdict}; {len(found)} of {len(tars)}", flush=True)
    _find_repeated(found)
    _report(found, shown)
    if bad := [str(checked.tar) for checked in found if checked.problems]:
        raise ValueError(
            f"{len(bad)} of {len(tars)} shards are bad: {', '.join(bad)}; "
            "delete each and run the command that wrote it again, or take it off the list"
        )


def check_shard(tar: Path) -> Checked:
    """Read one shard whole."""
    checked = Checked(tar, indexed=index_path(tar).is_file())
    try:
        index = ShardIndex(str(tar))
    except (ValueError, OSError) as error:
        checked.problems.append(_short(error, tar))
        return checked
    checked.keys, checked.dense = index.column("key"), int((index.column("dense_chars") > 0).sum())
    if checked.indexed:
        checked.problems += _of_index(index, tar)
    for sample in range(len(index)):
        name = f"sample {index.key(sample)}: "
        checked.problems += [name + problem.removeprefix(name) for problem in _of_sample(index, sample, tar)]
    return checked


def _of_index(index: ShardIndex, tar: Path) -> Iterator[str]:
    """Where an index disagrees with its tar."""
    try:
        columns = scan(tar)
    except ValueError as error:
        yield _short(error, tar)
        return
    if len(columns["key"]) != len(index):
        yield f"its index lists {len(index)} samples and the tar holds {len(columns['key'])}"
        return
    for name in COLUMNS:
        differ = np.flatnonzero(columns[name] != index.column(name))
        if len(differ):
            first = int(differ[0])
            says = f"for {index.key(first)} it says {index.column(name)[first]}, the tar says {columns[name][first]}"
            yield f"its index is wrong about {name} of {len(differ)} samples; {says}"


def _of_sample(index: ShardIndex, sample: int, tar: Path) -> Iterator[str]:
    """What is wrong with a sample; the sample's name is left out."""
    try:
        index.column("key")[sample].decode()
    except UnicodeDecodeError:
        yield "its key is not UTF-8"
    try:
        index.image(sample)
    except ValueError as error:
        yield _short(error, tar)
    try:
        text = index.text(sample)
    except ValueError as error:
        yield _short(error, tar)
    else:
        yield from _of_text(text)


def _of_text(text: dict) -> Iterator[str]:
    """What is wrong with a sample's captions."""
    for kind, needed in (("caption", True), ("dense", False)):
        words = text.get(kind) or ""
        if not isinstance(words, str):
            yield f"its {kind} is not a text"
        elif any("\ud800" <= letter <= "\udfff" for letter in words):  # half a character, which UTF-8 cannot hold
            yield f"its {kind} is not valid UTF-8"
        elif not words.strip() and (needed or words):
            yield f"its {kind} holds no word"


def _short(error: Exception, tar: Path) -> str:
    """An error's message without the shard's name and the advice, which the report gives elsewhere."""
    return str(error).replace(f"shard {tar}", "it").removeprefix(f"{tar}, ").removesuffix(f"; {FIX}")


def _find_repeated(found: list[Checked]) -> None:
    """Add to each shard's problems the keys that an earlier sample has too."""
    keys = np.concatenate([checked.keys for checked in found])
    shard = np.repeat(np.arange(len(found)), [len(checked.keys) for checked in found])
    order = np.argsort(keys, kind="stable")
    for i in np.flatnonzero(keys[order][1:] == keys[order][:-1]).tolist():
        first, second = order[i], order[i + 1]
        where = "twice" if shard[first] == shard[second] else f"in {found[shard[first]].tar} too"
        found[shard[second]].problems.append(f"sample {keys[second].decode(errors='replace')}: its key is {where}")


def _report(found: list[Checked], shown: int) -> None:
    """Print the problems of each shard, and the totals."""
    for checked in found:
        if checked.problems:
            print(f"{checked.tar}:")
            for problem in checked.problems[:shown]:
                print(f"  {problem}")
            if len(checked.problems) > shown:
                print(f"  and {len(checked.problems) - shown} more")
    bad, samples = sum(bool(checked.problems) for checked in found), sum(len(checked.keys) for checked in found)
    print(
        f"{len(found)} shards, {sum(checked.indexed for checked in found)} with an index: {len(found) - bad} good, "
        f"{bad} bad; {samples} samples, {sum(checked.dense for checked in found)} with a synthetic caption; "
        f"problems: {sum(len(checked.problems) for checked in found)}",
        flush=True,
    )


def _tars(shards: str) -> list[Path]:
    """The tars that a name means, including those that are missing."""
    if "://" in shards:
        raise ValueError(f"{shards} is remote; check the shards before you upload them")
    folder = Path(shards)
    if not folder.is_dir():
        return [Path(name) for name in expand(shards)]
    manifest = folder / MANIFEST
    if manifest.is_file():
        tars = [folder / name for name in json.loads(manifest.read_text())["tars"]]
    else:
        tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise FileNotFoundError(f"{folder} holds no .tar shards; write some with lidit prep shard")
    return tars


def _run(tars: list[Path], workers: int) -> Iterator[Checked]:
    """Check each tar, in this process if one worker is enough."""
    if min(workers, len(tars)) == 1:
        yield from map(check_shard, tars)
        return
    # spawn: a forked child of a process that runs torch threads can hang
    with ProcessPoolExecutor(min(workers, len(tars)), mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(check_shard, tars)
        finally:
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    try:
        auto_cli(check, as_positional=False)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
