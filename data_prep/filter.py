"""Chooses by rules which records of a collection go into the shards; the collection itself is only read.

    lidit prep filter --config experiments/configs/filter_paper.yaml --source img2dataset --path cc12m --out cc12m-kept
    lidit prep shard --source img2dataset --path cc12m --keep cc12m-kept/kept.jsonl --out shards/cc12m ...

With `--dry_run true` the first command prints what it would remove and why, with examples. It writes to `out`

    kept.jsonl        {"key"} of every record that stays, after a line {"collection"} with the hash of the collection
    removed.jsonl     {"key", "rule", "detail"} of every other record; `rule` is a rule, or why the record is unusable
    report.json       the rules, and how many records each removed
    measured.jsonl    each image's size, SHA-256 and perceptual hash, in the order of the collection
    aesthetic-ID.jsonl   scores by key; ID is a hash of the head and the CLIP

The last two files take the time. A dry run writes them too, and every later run continues them: a run with other rules
measures only what no run has measured.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.filter_rules import Aesthetic, Rules, dhash, near_duplicates
from data_prep.images import Unusable, decode
from data_prep.processes import begin
from data_prep.records import Record, digest
from data_prep.sources import Collection, Columns, find
from lidit.disk.whole import replacing, write_text

if TYPE_CHECKING:
    from data_prep.aesthetic import AestheticModel

CHUNK = 1000  # records that are measured between two lines of progress
EXAMPLES = 3  # records shown for each rule

Verdicts = dict[int, tuple[str, str]]  # by the record's number: the rule that the record breaks, and how


def filter_records(
    source: Collection,
    path: str,
    out: str,
    rules: Rules = Rules(),
    columns: Columns = Columns(),
    class_names: str | None = None,
    dry_run: bool = False,
    batch_size: int = 64,
    device: str = "cpu",
    workers: int = 2,
) -> None:
    """Write the list of records that break no rule. A second run measures only what is missing.

    Args:
        source: kind of the collection, as for `lidit prep shard`.
        path: the collection: its folder, tar, pattern of tars, or table.
        out: folder to write, new or begun with the same collection.
        rules: which records to remove; see `experiments/configs/filter_paper.yaml`.
        columns: names of the columns of a table, or of the fields of img2dataset's JSON.
        class_names: for imagenet, a file with the names of the classes, as for `lidit prep shard`.
        dry_run: print what would be removed and why, and write no lists.
        batch_size: number of images scored at one time.
        device: where CLIP runs.
        workers: number of processes that decode images.

    Raises:
        FileNotFoundError: the collection or the aesthetic head is missing.
        ValueError: there are no rules, a rule cannot be applied, or the folder belongs to another collection.
    """
    rules.check()
    records, folder = find(source, path, columns, class_names), Path(out)
    made = {"source": source, "columns": asdict(columns), "records": len(records), "digest": digest(records)}
    model = _model(rules.aesthetic, device, batch_size) if rules.aesthetic else None
    begin(folder, "filter.json", made, {}, "write to another folder or delete this one")
    with _mapper(workers) as mapper:
        measured = _measure(records, folder / "measured.jsonl", mapper)
        removed = _judge(records, measured, rules)
        if model is not None:
            removed |= _score(records, removed, model, folder, mapper)
    removed |= _duplicates(records, measured, removed, rules)
    _report(records, removed, rules, dry_run)
    if not dry_run:
        _write(folder, records, removed, rules)


Mapper = Callable[[Callable[[Record], Any], Iterable[Record]], Iterator[Any]]


@contextmanager
def _mapper(workers: int) -> Iterator[Mapper]:
    if workers <= 1:
        yield map
        return
    # spawn: a forked child of a process that runs torch threads can hang
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield partial(pool.map, chunksize=16)


def _measure(records: list[Record], path: Path, mapper: Mapper) -> list[dict[str, Any]]:
    """What is measured of each image, in the order of the records."""
    measured = _resume(path)
    start, before = time.monotonic(), len(measured)
    with path.open("a") as file:
        for first in range(before, len(records), CHUNK):
            new = list(mapper(_measure_one, records[first : first + CHUNK]))
            file.writelines(json.dumps(line) + "\n" for line in new)
            file.flush()
            measured += new
            _progress("measured", len(measured), before, len(records), start)
    return measured


def _measure_one(record: Record) -> dict[str, Any]:
    try:
        data = record.data()
        image = decode(data)
    except Unusable as why:
        return {"key": record.key, "problem": why.reason, "detail": why.detail}
    sha256 = hashlib.sha256(data).hexdigest()
    return {"key": record.key, "size": image.size, "sha256": sha256, "dhash": f"{dhash(image):016x}"}


def _judge(records: list[Record], measured: list[dict[str, Any]], rules: Rules) -> Verdicts:
    """Records that break a rule about one record, or that are unusable.

    Raises:
        ValueError: no record has a column that a rule is about.
    """
    removed: Verdicts = {}
    known: set[str] = set()
    for i, (record, facts) in enumerate(zip(records, measured, strict=True)):
        try:
            if "problem" in facts:
                raise Unusable(facts["problem"], facts["detail"])
            caption, columns = record.texts()[0], record.columns() if rules.columns else {}
        except Unusable as why:
            removed[i] = (why.reason, why.detail)
            continue
        known |= columns.keys()
        if broken := rules.broken_by(facts["size"], caption, columns):
            removed[i] = broken
    if known and (missing := rules.columns.keys() - known):
        raise ValueError(f"no record has a column {min(missing)!r}; there are {', '.join(sorted(known))}")
    return removed


def _model(rule: Aesthetic, device: str, batch_size: int) -> AestheticModel:
    from data_prep.aesthetic import AestheticModel  # imports torch, which the other rules do not need

    return AestheticModel(rule, device, batch_size)


def _score(records: list[Record], removed: Verdicts, model: AestheticModel, folder: Path, mapper: Mapper) -> Verdicts:
    """Of the records that are left, those whose score is too low."""
    left = [record for i, record in enumerate(records) if i not in removed]
    path = folder / f"aesthetic-{model.identity}.jsonl"
    scores = {line["key"]: line["score"] for line in _resume(path)}
    todo, step = [record for record in left if record.key not in scores], model.clip.batch_size
    start, before = time.monotonic(), len(left) - len(todo)
    with path.open("a") as file:
        for first in range(0, len(todo), step):  # no more images in memory than are scored at once
            batch = todo[first : first + step]
            new = dict(zip([r.key for r in batch], model(list(mapper(_pixels, batch))), strict=True))
            file.writelines(json.dumps({"key": key, "score": score}) + "\n" for key, score in new.items())
            scores |= new
            if (first + len(batch)) % CHUNK < step or first + step >= len(todo):
                file.flush()
                _progress("scored", before + first + len(batch), before, len(left), start)
    low = {i: scores[r.key] for i, r in enumerate(records) if i not in removed and not scores[r.key] >= model.rule.min}
    return {i: ("aesthetic", f"{score:.2f} is below {model.rule.min:g}") for i, score in low.items()}


def _pixels(record: Record) -> np.ndarray:
    return np.asarray(decode(record.data()))


def _duplicates(records: list[Record], measured: list[dict[str, Any]], removed: Verdicts, rules: Rules) -> Verdicts:
    """Of the records that are left, those that repeat another. The largest picture stays, or the first of these."""
    left = [i for i in range(len(records)) if i not in removed]
    left.sort(key=lambda i: -measured[i]["size"][0] * measured[i]["size"][1])
    again: Verdicts = {}
    if rules.remove_duplicates:
        first: dict[str, int] = {}
        for i in left:
            if (same := first.setdefault(measured[i]["sha256"], i)) != i:
                again[i] = ("remove_duplicates", f"the same file as {records[same].key}")
        left = list(first.values())
    if rules.near_duplicate_bits is not None:
        hashes = [int(measured[i]["dhash"], 16) for i in left]
        for a, b in near_duplicates(hashes, rules.near_duplicate_bits).items():
            detail = f"{(hashes[a] ^ hashes[b]).bit_count()} bits from {records[left[b]].key}"
            again[left[a]] = ("near_duplicate_bits", detail)
    return again


def _report(records: list[Record], removed: Verdicts, rules: Rules, dry_run: bool) -> None:
    """Print how many records are removed, by which rule, with examples."""
    share = f"{len(removed)} of {len(records)} records ({len(removed) / len(records):.1%})"
    print(f"{share} {'would be' if dry_run else 'are'} removed, {len(records) - len(removed)} stay")
    counts = Counter(rule for rule, _ in removed.values())
    for name in _declared(rules) - counts.keys():
        counts[name] = 0
    for rule, count in counts.most_common():
        print(f"  {rule}: {count}")
        broken = [(i, detail) for i, (by, detail) in sorted(removed.items()) if by == rule]
        for i, detail in broken[:EXAMPLES]:
            print(f"      {records[i].key}: {_printable(detail or records[i].problem or rule)}")


def _declared(rules: Rules) -> set[str]:
    names = {name for name, value in vars(rules).items() if value not in (None, False, {})} - {"columns"}
    return names | {f"columns.{name}" for name in rules.columns}


def _write(folder: Path, records: list[Record], removed: Verdicts, rules: Rules) -> None:
    """Write the lists, each whole or not at all, kept.jsonl last."""
    counts = Counter(rule for rule, _ in removed.values())
    by_rule = {name: counts[name] for name in sorted(_declared(rules) | counts.keys())}
    report = {"records": len(records), "kept": len(records) - len(removed), "removed": by_rule, "rules": asdict(rules)}
    write_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
    with replacing(folder / "removed.jsonl") as file, file.open("w") as lines:
        for i, (rule, detail) in sorted(removed.items()):
            lines.write(json.dumps({"key": records[i].key, "rule": rule, "detail": detail}) + "\n")
    with replacing(folder / "kept.jsonl") as file, file.open("w") as lines:
        lines.write(json.dumps({"collection": digest(records)}) + "\n")
        lines.writelines(json.dumps({"key": r.key}) + "\n" for i, r in enumerate(records) if i not in removed)
    print(f"{folder}: kept.jsonl, removed.jsonl and report.json are written")


def _resume(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that grows; a last line that an interrupted run left incomplete is cut off."""
    text = path.read_text() if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def _progress(what: str, done: int, before: int, total: int, start: float) -> None:
    left = (time.monotonic() - start) / (done - before) * (total - done)
    print(f"{what} {done} of {total} records, about {left:.0f} s left", flush=True)


def _printable(text: str) -> str:
    """At most 100 characters on one line, in the terminal's encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    return " ".join(text.split())[:100].encode(encoding, "backslashreplace").decode(encoding)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    try:
        auto_cli(filter_records, as_positional=False)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
