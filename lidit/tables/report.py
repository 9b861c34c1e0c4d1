"""Measured means and spreads beside the paper's numbers, and whether the paper's order of rows holds.

Everything is a function of the committed results and the table files, so writing it again changes nothing.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure  # without pyplot, which would choose a backend: a notebook keeps its own

from lidit.disk.whole import write_text
from lidit.tables.file import SCALES, Table, read_table, tables_in

CLEAR = 2.0  # standard errors by which a difference is called clear
TITLES = {"mini": "In miniature", "paper": "At paper scale"}
Numbers = dict[str, dict[str, list[float | int]]]  # row, column, one for each seed


@dataclass(frozen=True)
class Order:
    """Two rows in a column: what the paper says of them and what was measured.

    `paper` and `ours` are differences in the column's unit, better minus worse; `error` is the standard error of ours
    from the spread between seeds, None where no row has two seeds.
    """

    better: str
    worse: str
    column: str
    paper: float | int | None
    ours: float | int
    error: float | int | None

    @property
    def holds(self) -> bool:
        return self.ours > 0

    @property
    def verdict(self) -> str:
        """In words."""
        said = "holds" if self.holds else "does not hold"
        if self.error is None:
            return f"{said} (one seed: no spread)"
        ratio = abs(self.ours) / self.error if self.error else float("inf")
        return f"{said}, {'clearly' if ratio > CLEAR else 'within the spread'} ({ratio:.1f} standard errors)"


def spread(numbers: Numbers, column: str) -> float | int | None:
    """Standard deviation between seeds of one row, pooled over the rows that have several; None: none has."""
    several = [rows[column] for rows in numbers.values() if len(rows.get(column, [])) > 1]
    if not several:
        return None
    squares = sum((len(values) - 1) * stdev(values) ** 2 for values in several)
    return (squares / sum(len(values) - 1 for values in several)) ** 0.5


def compare(table: Table, numbers: Numbers, better: str, worse: str, column: str) -> Order | None:
    """One claim; None where a row or column was not measured."""
    ours = [numbers.get(row, {}).get(column) for row in (better, worse)]
    if not all(ours):
        return None
    printed = [table.paper.get(row, {}).get(column) for row in (better, worse)]
    paper = None if None in printed else printed[0] - printed[1]
    deviation = spread(numbers, column)
    error = None if deviation is None else deviation * sum(1 / len(values) for values in ours) ** 0.5
    return Order(better, worse, column, paper, mean(ours[0]) - mean(ours[1]), error)


def kendall(table: Table, numbers: Numbers, column: str) -> tuple[float | int, int, int] | None:
    """Kendall's tau between the paper's order of rows and ours, pairs in the same order, and all pairs.

    A pair that is equal for either counts for neither side. None: fewer than two rows have both numbers.
    """
    both = [row for row in numbers if column in numbers[row] and column in table.paper.get(row, {})]
    if len(both) < 2:
        return None
    signs = []
    for a, b in itertools.combinations(both, 2):
        paper = table.paper[a][column] - table.paper[b][column]
        ours = mean(numbers[a][column]) - mean(numbers[b][column])
        signs.append((paper * ours > 0) - (paper * ours < 0))
    return sum(signs) / len(signs), signs.count(1), len(signs)


def read_numbers(table: Table, results: Path) -> tuple[Numbers, list[dict]]:
    """What was measured of the table's rows, in its order, and the runs it comes from.

    Raises:
        ValueError: the results cannot be read.
    """
    path = results / f"{table.name}.json"
    try:
        found = json.loads(path.read_text())["runs"] if path.is_file() else []
    except (json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it or collect it again with `score`") from None
    labels = [row.label for row in table.rows]
    runs = [run for run in found if run["scale"] == table.scale and run["row"] in labels]
    numbers: Numbers = {}
    for label in labels:
        own = [run["scores"] for run in runs if run["row"] == label]
        if own:
            numbers[label] = {c: [scores[c] for scores in own] for c in table.columns if all(c in s for s in own)}
    return numbers, runs


def report(file: Path, results: Path) -> None:
    """Write a table's Markdown and pictures, and the board of all tables in README.md beside the table's file.

    Raises:
        ValueError: there are no results of it.
    """
    read_table(file, SCALES[0])
    if not (results / f"{file.stem}.json").is_file():
        raise ValueError(f"there are no results of {file.stem} in {results}; `lidit table {file} run`, then score")
    for scale in SCALES:
        table = read_table(file, scale)
        if numbers := read_numbers(table, results)[0]:
            draw(table, numbers, picture_of(table, results))
    text = text_of(file, results)
    write_text(results / f"{file.stem}.md", text)
    print(text)
    board = file.parent / "README.md"
    write_text(board, _board(file.parent, results))
    print(f"{results / file.stem}.md, {board}")


def picture_of(table: Table, results: Path) -> Path:
    """Where a table's picture lies."""
    return results / f"{table.name}-{table.scale}.png"


def text_of(file: Path, results: Path) -> str:
    """A table's Markdown, with each scale that was measured."""
    parts = []
    for scale in SCALES:
        table = read_table(file, scale)
        numbers, runs = read_numbers(table, results)
        if not parts:
            parts += [f"## {table.claim}"]
        if numbers:
            picture = f"![{table.claim}]({picture_of(table, results).name})"
            shown = [" ".join(table.shown.split())] if table.shown else []
            parts += [f"### {TITLES[scale]}", *shown, *markdown(table, numbers, runs), picture]
    parts += [part for part in table.text.split("\n\n")[1:] if not part.startswith("    ")]
    return "\n\n".join(parts) + "\n"


def markdown(table: Table, numbers: Numbers, runs: list[dict]) -> list[str]:
    """The paragraphs about one scale."""
    head = [cell for column in table.columns for cell in (column, "paper")] if table.paper else list(table.columns)
    lines = [f"| row | {' | '.join(head)} | seeds |", "| --- |" + " ---: |" * (len(head) + 1)]
    for row in dict.fromkeys([*(row.label for row in table.rows), *table.paper]):
        cells = []
        for column in table.columns:
            cells.append(number(numbers.get(row, {}).get(column, [])))
            if table.paper:
                printed = table.paper.get(row, {}).get(column)
                cells.append("" if printed is None else f"{printed:g}")
        seeds = max((len(values) for values in numbers.get(row, {}).values()), default=0)
        lines.append(f"| {row} | {' | '.join(cells)} | {seeds or ''} |")
    return ["\n".join(lines), *_claims(table, numbers), *_taus(table, numbers), _made(table, runs)]


def number(values: list[float | int]) -> str:
    """Mean over seeds, with their standard deviation where there are several."""
    if not values:
        return ""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def _claims(table: Table, numbers: Numbers) -> list[str]:
    found = [compare(table, numbers, *claim) for claim in table.claims]
    orders = [order for order in found if order is not None]
    if not orders:
        return []
    lines = ["| what is claimed | paper | ours | |", "| --- | ---: | ---: | --- |"]
    for o in orders:
        paper = "" if o.paper is None else f"{o.paper:+.1f}"
        lines.append(f"| {o.column}: {o.better} > {o.worse} | {paper} | {o.ours:+.1f} | {o.verdict} |")
    held = sum(order.holds for order in orders)
    left = f"; {len(found) - len(orders)} were not measured" if len(found) > len(orders) else ""
    return [f"{held} of {len(orders)} of these orders hold{left}.", "\n".join(lines)]


def _taus(table: Table, numbers: Numbers) -> list[str]:
    said = {column: kendall(table, numbers, column) for column in table.columns}
    lines = [
        f"- {column}: {same} of {pairs} pairs of rows are in the paper's order, Kendall's tau {tau:.2f}; standard "
        f"deviation between seeds {'unknown' if (s := spread(numbers, column)) is None else f'{s:.1f}'}."
        for column, found in said.items()
        if found is not None
        for tau, same, pairs in [found]
    ]
    return ["\n".join(lines)] if lines else []


def _made(table: Table, runs: list[dict]) -> str:
    """How the runs came about, in a line; and a warning where they do not belong together."""
    commits = sorted({str(run["commit"])[:9] + " with changes" * str(run["commit"]).endswith("-dirty") for run in runs})
    machines = sorted({run["machine"] for run in runs})
    steps = sorted({run["steps"] for run in runs})
    seconds = mean(run["seconds"] for run in runs)
    text = (
        f"{len(runs)} runs of {', '.join(map(str, steps))} steps, {seconds / 60:.1f} minutes of training each on "
        f"{'; '.join(machines)}; commit {', '.join(commits)}."
    )
    text += " **Rows were trained for different numbers of steps.**" if len(steps) > 1 else ""
    now = {row.label: row.digest for row in table.rows}
    earlier = dict.fromkeys(run["row"] for run in runs if run["digest"] != now[run["row"]])
    return text + (f" Of a recipe that has been changed since: {', '.join(earlier)}." if earlier else "")


def draw(table: Table, numbers: Numbers, path: Path) -> None:
    """The picture: bars beside the paper's, lines over the columns, or a scatter."""
    plot = "bars" if table.plot == "scatter" and len(table.columns) < 2 else table.plot
    figure = {"bars": _bars, "lines": _lines, "scatter": _scatter}[plot](table, numbers)
    figure.suptitle(table.name + ", " + TITLES[table.scale].lower(), fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _bars(table: Table, numbers: Numbers) -> Figure:
    rows, columns = list(numbers), list(table.columns)
    figure = Figure(figsize=(1.5 + 4 * len(columns), 1 + 0.5 * len(rows)))
    axes = figure.subplots(1, len(columns), squeeze=False)
    for axis, column in zip(axes.flat, columns, strict=True):
        for i, row in enumerate(rows):
            values = numbers[row].get(column, [])
            if values:
                error = stdev(values) if len(values) > 1 else None
                axis.barh(i - 0.2, mean(values), 0.38, xerr=error, color="tab:blue", label="ours")
            if (printed := table.paper.get(row, {}).get(column)) is not None:
                axis.barh(i + 0.2, printed, 0.38, color="lightgray", label="paper")
        axis.set_yticks(range(len(rows)), rows if axis is axes.flat[0] else [], fontsize=8)
        axis.set_title(column, fontsize=9)
        axis.invert_yaxis()
        everything = [mean(numbers[row][column]) for row in rows if numbers[row].get(column)]
        if everything and max(everything) < 0:  # bars from 0 would all look alike
            axis.set_xlim(min(everything) * 1.02, max(everything) * 0.98)
    shown = dict(zip(*reversed(axes.flat[0].get_legend_handles_labels()), strict=True))
    axes.flat[0].legend(shown.values(), shown.keys(), fontsize=8)
    return figure


def _lines(table: Table, numbers: Numbers) -> Figure:
    """Of the columns that are no difference of two others."""
    columns = [name for name, column in table.columns.items() if " " not in column.score or column.score[0].isdigit()]
    figure = Figure(figsize=(6, 4))
    axis = figure.subplots()
    for row, measured in numbers.items():
        there = [column for column in columns if column in measured]
        errors = [stdev(measured[c]) if len(measured[c]) > 1 else 0 for c in there]
        axis.errorbar(there, [mean(measured[c]) for c in there], errors, label=row, marker="o", capsize=3)
    axis.legend(fontsize=8)
    return figure


def _scatter(table: Table, numbers: Numbers) -> Figure:
    x, y = [*table.columns][:2]
    figure = Figure(figsize=(6, 4))
    axis = figure.subplots()
    for row, measured in numbers.items():
        if x in measured and y in measured:
            axis.scatter(mean(measured[x]), mean(measured[y]))
            axis.annotate(row, (mean(measured[x]), mean(measured[y])), fontsize=8)
    axis.margins(x=0.2)  # for the last row's name
    axis.set(xlabel=x, ylabel=y)
    return figure


def _board(folder: Path, results: Path) -> str:
    """README.md: which claims hold, then every table that was run."""
    lines = ["| | claim | scale | orders that hold | not measured |", "| --- | --- | --- | ---: | ---: |"]
    parts = []
    for file in tables_in(folder):
        held: dict[str, str] = {}
        for scale in SCALES:
            table = read_table(file, scale)
            numbers, _ = read_numbers(table, results)
            orders = [order for claim in table.claims if (order := compare(table, numbers, *claim))]
            if numbers:
                left = len(table.claims) - len(orders)
                held[scale] = f"{sum(order.holds for order in orders)} of {len(orders)} | {left or ''}"
        if held:
            parts.append(text_of(file, results).replace("](", f"]({results.relative_to(folder)}/").rstrip())
        for scale, said in (held or {"": "not run | "}).items():
            lines.append(f"| [{file.stem}]({file.name}) | {table.claim} | {scale} | {said} |")
    head = (
        "# The paper's tables and figures\n\nWritten by `lidit table FILE report` from `results/`; do not edit. Numbers"
        " are means over seeds ± standard deviation, the judge's in per cent, beside the paper's. In miniature the"
        " judge, the prompts and the models are small ones of a drawn world: the order of rows compares, not the"
        f" numbers. An order holds clearly where the difference is above {CLEAR:g} standard errors of the spread"
        " between seeds.\n\n"
        "Table 7 is `configs/lidit_1b.yaml` and `configs/lidit_10b.yaml`, checked by `tests/test_paper.py`; Figure 6,"
        " the human evaluation, is [`lidit study`](../docs/human_study.md)."
    )
    return "\n\n".join([head, "\n".join(lines), *parts]) + "\n"
