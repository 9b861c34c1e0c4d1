"""A table of the paper as a file of data: its rows as settings of one recipe, its columns as scores, its numbers.

The file's docstring begins with the claim in a sentence. It has these names; what differs between scales is a dict with
the names of scales as keys, at any depth, and a row or column whose value is None at a scale does not exist there:

    SETTING  {scale: {config, prepare, cache, sample, score, commands}}; see `experiments/setting.py`. In a benchmark's
             own command, OUT is the folder for its scores.json, RUN that of the run, LLMS the row's LLMs
    ROWS     {label: {key of the recipe: value}}; the key `config` names another recipe than the setting's, and `sample`
             holds options for drawing that stand over the setting's
    COLUMNS  {label: (benchmark, score in its scores.json, factor to the column's unit)}; of the benchmark `record`, a
             number that the training itself has left
    PAPER    {label: {column: the paper's number}}, also of rows that only the paper has
    CLAIMS   [(better row, worse row, column)]: what the paper says of these numbers
    SHOWN    {scale: what the measured numbers show, in a few sentences}
    PLOT     bars, lines (a line per row over the columns) or scatter (the first column against the second)
"""

from __future__ import annotations

import hashlib
import json
import runpy
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

SCALES = ("mini", "paper")
PLOTS = ("bars", "lines", "scatter")
TRAINING = "record"  # of a column: not a benchmark, but what the training has left


@dataclass(frozen=True)
class Column:
    """A score of a benchmark, times a factor."""

    benchmark: str
    score: str
    factor: float | int


@dataclass(frozen=True)
class Row:
    """What a row trains: a recipe, and the keys that differ; and with what options its pictures are drawn."""

    label: str
    config: str
    keys: dict[str, Any]
    sample: str = ""

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The recipe's file."""
        return yaml.safe_load(Path(self.config).read_text())

    @cached_property
    def digest(self) -> str:
        """Of all that the training reads but the seed: rows of several tables that are the same are trained once."""
        return hashlib.sha256(json.dumps([self.recipe, self.keys], sort_keys=True).encode()).hexdigest()[:12]

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.keys.get("trainer.max_steps", self.recipe["trainer"]["max_steps"])

    @property
    def llms(self) -> list[dict[str, Any]]:
        """Its frozen LLMs, as the recipe names them."""
        return self.keys.get("model.llms", self.recipe["model"]["llms"])

    @property
    def options(self) -> list[str]:
        """The keys as a command line has them."""
        return [word for key, value in self.keys.items() for word in (f"--{key}", as_word(value))]


@dataclass(frozen=True)
class Table:
    """One file at one scale."""

    name: str
    scale: str
    text: str  # the docstring
    setting: dict[str, Any]
    rows: list[Row]
    columns: dict[str, Column]
    paper: dict[str, dict[str, float | int]]
    claims: list[tuple[str, str, str]]
    plot: str
    shown: str | None = None

    @property
    def claim(self) -> str:
        """The docstring's first paragraph in one line."""
        return " ".join(self.text.split("\n\n")[0].split())

    @property
    def benchmarks(self) -> list[str]:
        """What has to be drawn and judged, each once."""
        return [name for name in dict.fromkeys(c.benchmark for c in self.columns.values()) if name != TRAINING]

    def chosen(self, labels: list[str] | None) -> list[Row]:
        """The rows of these labels, or all.

        Raises:
            ValueError: there is no such row.
        """
        known = [row.label for row in self.rows]
        if unknown := [label for label in labels or [] if label not in known]:
            raise ValueError(f"{self.name} has no row {unknown[0]!r} at scale {self.scale}; it has {'; '.join(known)}")
        return [row for row in self.rows if labels is None or row.label in labels]


def read_table(file: str | Path, scale: str) -> Table:
    """A table at a scale.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no table, or there is no such scale.
    """
    path = Path(file)
    if scale not in SCALES:
        raise ValueError(f"there is no scale {scale!r}; there are {' and '.join(SCALES)}")
    if not path.is_file():
        there = ", ".join(str(other) for other in tables_in(path.parent))
        raise FileNotFoundError(f"there is no table {file}" + (f"; there are {there}" if there else ""))
    data = runpy.run_path(str(path))
    if missing := [name for name in ("ROWS", "COLUMNS", "SETTING") if name not in data]:
        raise ValueError(f"{file} is no table: it has no {missing[0]}; lidit/tables/file.py says what one holds")
    if (plot := data.get("PLOT", "bars")) not in PLOTS:
        raise ValueError(f"{file}: PLOT is {plot!r}; it is one of {', '.join(PLOTS)}")
    setting = at_scale(data["SETTING"], scale)
    rows = {label: at_scale(keys, scale) for label, keys in data["ROWS"].items()}
    columns = {label: at_scale(column, scale) for label, column in data["COLUMNS"].items()}
    table = Table(
        path.stem,
        scale,
        (data["__doc__"] or "").strip(),
        setting,
        [_row(label, keys, setting["config"]) for label, keys in rows.items() if keys is not None],
        {label: Column(*column) for label, column in columns.items() if column is not None},
        data.get("PAPER", {}),
        data.get("CLAIMS", []),
        plot,
        data.get("SHOWN", {}).get(scale),
    )
    _check_claims(table, set(data["ROWS"]) | set(table.paper), set(data["COLUMNS"]))
    return table


def tables_in(folder: Path) -> list[Path]:
    """The table files of a folder, in their order; ours beyond the paper's last."""
    kinds = ("table*.py", "figure*.py", "prompt_enc*.py", "llmdiff*.py")
    return [path for kind in kinds for path in sorted(folder.glob(kind))]


def at_scale(value: Any, scale: str) -> Any:
    """The value with every dict of scales in it replaced by what it has for this scale, None where it has nothing."""
    if isinstance(value, Mapping):
        if value and set(value) <= set(SCALES):
            return at_scale(value.get(scale), scale)
        return {key: at_scale(each, scale) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [at_scale(each, scale) for each in value]
    return value


def as_word(value: Any) -> str:
    """A recipe's value as one word of a command line."""
    return value if isinstance(value, str) else json.dumps(value)


def as_line(words: list[str]) -> str:
    """A command as a shell reads it."""
    return shlex.join(words)


def _row(label: str, keys: dict[str, Any], config: str) -> Row:
    own = {key: value for key, value in keys.items() if key not in ("config", "sample")}
    return Row(label, keys.get("config", config), own, keys.get("sample", ""))


def _check_claims(table: Table, rows: set[str], columns: set[str]) -> None:
    said = [*((r, c) for r, numbers in table.paper.items() for c in numbers)]
    said += [(row, column) for better, worse, column in table.claims for row in (better, worse)]
    for row, column in said:
        if column not in columns or row not in rows:
            raise ValueError(f"{table.name} speaks of {column!r} of {row!r}, and has no such row or column")
