"""`lidit table FILE plan|run|score|report`: a table of the paper as commands, results and a report.

    runs/tables/SCALE/DIGEST/seedN/   a run: checkpoints, record.json, a folder of pictures and scores per benchmark
    experiments/results/TABLE.json    what `score` collects from the runs: the only input of `report`
    experiments/results/TABLE.md      and TABLE-SCALE.png, experiments/README.md: what `report` writes

A run's folder is named by its recipe, so a row that several tables share is trained once, and a run whose recipe has
been changed since is not taken for this one. How pictures are drawn and which bundled weights there are is not in the
name: who changes these removes the runs.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from lidit.disk.folder import CHECKPOINTS, RECORD, SCORES, checkpoint_name
from lidit.disk.whole import write_text
from lidit.jobs import signals, state
from lidit.tables.file import TRAINING, Row, Table, as_line, as_word, read_table

RUNS = "runs/tables"
IN_ONE = (
    "import json, sys; from lidit.cli import main; sys.exit(next(filter(None, map(main, json.loads(sys.argv[1]))), 0))"
)


@dataclass(frozen=True)
class Piece:
    """One command, and the file that is there once it is done; None: it finds out itself."""

    stage: Literal["prepare", "fit", "sample", "score"]
    words: list[str]
    product: Path | None = None

    @property
    def done(self) -> bool:
        return self.product is not None and self.product.exists()


@dataclass(frozen=True)
class Run:
    """A row with a seed, and the folder it lives in."""

    table: Table
    row: Row
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.table.name}, {self.row.label}, seed {self.seed}"

    @property
    def checkpoint(self) -> Path:
        """What its training leaves."""
        return self.folder / CHECKPOINTS / checkpoint_name(self.row.steps)

    def scores(self, benchmark: str) -> Path:
        """What judging a benchmark leaves."""
        return self.folder / benchmark / SCORES

    @property
    def finished(self) -> bool:
        """Whether every column's score is there, and the record of the training."""
        return all(path.is_file() for path in [self.folder / RECORD, *map(self.scores, self.table.benchmarks)])

    def pieces(self, options: list[str]) -> list[Piece]:
        """Its commands in order; `options` are appended to the training's."""
        setting = self.table.setting
        prepared = [shlex.split(line) for line in setting.get("prepare", [])]
        fit = ["lidit", "fit", "--config", self.row.config, *self.row.options]
        if cache := setting.get("cache"):
            folders, commands = self._cached(**cache)
            prepared += commands
            fit += ["--data.cache", as_word(folders)]
        pieces = [Piece("prepare", words) for words in prepared]
        seeds = ["--seed_everything", str(self.seed), "--data.seed", str(self.seed)]
        fit += [*seeds, "--run", str(self.folder), "--resume", "auto", *options]
        pieces.append(Piece("fit", fit, self.checkpoint))
        return pieces + [piece for name in self.table.benchmarks for piece in self._judged(name)]

    def _cached(self, out: str, options: str, vae: str, features: bool = True) -> tuple[list[str], list[list[str]]]:
        """Folders of latents and of each LLM's features, shared by all runs, and the commands that fill them."""
        made = {f"{out}/latents": ["--vae", vae]}
        for llm in self.row.llms if features else []:
            digest = sha256(json.dumps(llm, sort_keys=True).encode()).hexdigest()[:12]
            made[f"{out}/features-{digest}"] = ["--vae", "null", "--llms", as_word([llm])]
        command = ["lidit", "prep", "precompute", *shlex.split(options)]
        return list(made), [[*command, *what, "--out", folder] for folder, what in made.items()]

    def _judged(self, benchmark: str) -> list[Piece]:
        """The commands that draw a benchmark's pictures and judge them, or one of the setting's own."""
        setting, out, done = self.table.setting, self.folder / benchmark, self.scores(benchmark)
        if own := setting.get("commands", {}).get(benchmark):
            given = {"RUN": str(self.folder), "OUT": str(out), "LLMS": as_word(self.row.llms)}
            words = [re.sub(r"\b(RUN|OUT|LLMS)\b", lambda named: given[named[1]], word) for word in shlex.split(own)]
            return [Piece("score", words, done)]
        drawn = ["lidit", "sample", "--benchmark", benchmark, "--checkpoint", str(self.checkpoint), "--out", str(out)]
        drawn += ["--seed", str(1000 * self.seed), *_options(setting.get("sample", {}), benchmark)]
        drawn += shlex.split(self.row.sample)
        return [
            Piece("sample", drawn, done),
            Piece("score", ["lidit", "score", str(out), *_options(setting.get("score", {}), benchmark)], done),
        ]


def main(
    file: str,
    action: Literal["plan", "run", "score", "report"],
    scale: Literal["mini", "paper"] = "mini",
    seeds: int = 1,
    rows: list[str] | None = None,
    stage: Literal["prepare", "fit", "sample", "score"] | None = None,
    options: str = "",
    runs: str = RUNS,
    results: str | None = None,
) -> None:
    """Plan, run, score or report a table or figure of the paper.

    plan prints the commands, run does those whose result is missing, score collects what the runs found, and report
    writes it beside the paper's numbers.

    Args:
        file: the table, such as experiments/table2_components.py.
        action: what to do with it.
        scale: mini, the drawn world; paper, the paper's own setting.
        seeds: runs of each row, with seeds from 0.
        rows: labels of rows, such as '[none, instruction]'; none: all.
        stage: plan or run only these commands.
        options: for every training, such as '--trainer.devices 2 --trainer.strategy ddp'.
        runs: folder of all runs.
        results: folder of the results; none: `results` beside the file.

    Raises:
        ValueError: there is no such row, nothing to report, or a row failed.
    """
    table = read_table(file, scale)
    folder = Path(results) if results else Path(file).parent / "results"
    if action == "report":
        from lidit.tables.report import report

        report(Path(file), folder)
        return
    if seeds < 1:
        raise ValueError(f"--seeds is {seeds}; each row needs at least one run")
    found = [
        Run(table, row, seed, Path(runs) / scale / row.digest / f"seed{seed}")
        for seed in range(seeds)
        for row in table.chosen(rows)
    ]
    if action == "score":
        score(found, folder)
    else:
        (plan if action == "plan" else run)(found, stage, shlex.split(options))


def plan(found: list[Run], stage: str | None, options: list[str]) -> None:
    """Print every command once, one a line, in an order in which they can be run."""
    lines = [as_line(p.words) for each in found for p in each.pieces(options) if stage in (None, p.stage)]
    print("\n".join(dict.fromkeys(lines)))


def run(found: list[Run], stage: str | None, options: list[str]) -> None:
    """Do what is missing, run after run; one that fails is named, and the rest goes on. Told to stop, it stops.

    Raises:
        SystemExit: told to stop; the training has saved, and the same command goes on with it.
        ValueError: naming the runs that failed.
    """
    prepared: set[str] = set()
    failed = []
    for i, each in enumerate(found, start=1):
        todo = [piece for piece in each.pieces(options) if not piece.done and stage in (None, piece.stage)]
        todo = [piece for piece in todo if as_line(piece.words) not in prepared]
        if each.finished or not todo:
            continue
        print(f"[{i}/{len(found)}] {each.name}: {each.folder}", flush=True)
        for words in together(todo):
            if code := attended(words):
                print(f"[{i}/{len(found)}] {each.name}: failed with exit code {code}", file=sys.stderr, flush=True)
                failed.append(each.name)
                break
        else:
            prepared |= {as_line(piece.words) for piece in todo if piece.stage == "prepare"}
    if failed:
        raise ValueError(f"{len(failed)} of {len(found)} runs failed: {'; '.join(failed)}; what they said is above")


def attended(words: list[str]) -> int:
    """The exit code of a process; what asks this one to stop is passed on to it.

    Raises:
        SystemExit: one of them was asked.
    """
    with subprocess.Popen(words) as process, signals.passed_on(process.send_signal) as asked:
        code = process.wait()
    if asked or code == state.STOPPED_CODE:
        raise SystemExit(state.STOPPED_CODE)
    return code


def together(pieces: list[Piece]) -> list[list[str]]:
    """Processes for these commands, in order: training one of its own, neighbouring other verbs of lidit share one."""
    processes, shared = [], []
    for piece in pieces:
        alone = piece.stage == "fit" or piece.words[0] != "lidit"
        if alone and shared:
            processes.append([sys.executable, "-c", IN_ONE, json.dumps(shared)])
            shared = []
        if not alone:
            shared.append(piece.words[1:])
        else:
            module = ["-m", "lidit"] if piece.words[0] == "lidit" else []
            processes.append([sys.executable, *module, *piece.words[1:]])
    return processes + ([[sys.executable, "-c", IN_ONE, json.dumps(shared)]] if shared else [])


def score(found: list[Run], folder: Path) -> None:
    """Collect what finished runs found into the table's results; earlier results of other runs stay.

    Raises:
        ValueError: no run is finished.
    """
    table = found[0].table
    done = [each for each in found if each.finished]
    for each in found:
        if not each.finished:
            print(f"{each.name}: not finished")
    if not done:
        raise ValueError(f"no run of {table.name} at scale {table.scale} is finished; `lidit table FILE run` runs them")
    path = folder / f"{table.name}.json"
    kept = json.loads(path.read_text())["runs"] if path.is_file() else []
    new = {(table.scale, each.row.label, each.seed): _result(each) for each in done}
    merged = {(r["scale"], r["row"], r["seed"]): r for r in kept} | new
    text = json.dumps({"table": table.name, "runs": [merged[key] for key in sorted(merged)]}, indent=1)
    write_text(path, text + "\n")
    print(f"{path}: {len(done)} of {len(found)} runs collected")


def _result(each: Run) -> dict[str, Any]:
    """What is kept of a run."""
    found = {name: json.loads(each.scores(name).read_text()) for name in each.table.benchmarks}
    record = json.loads((each.folder / RECORD).read_text())
    numbers = {name: scored["scores"] for name, scored in found.items()}
    numbers[TRAINING] = {name: float(value) for name, value in record.items() if isinstance(value, int | float)}
    scores = {
        label: round(column.factor * _value(numbers[column.benchmark], column.score, each), 4)
        for label, column in each.table.columns.items()
    }
    return {
        "scale": each.table.scale,
        "row": each.row.label,
        "seed": each.seed,
        "config": each.row.config,
        "keys": each.row.keys,
        "digest": each.row.digest,
        **record,
        "judges": {name: scored["name"] for name, scored in found.items()},
        "images": {name: scored["images_scored"] for name, scored in found.items()},
        "scores": scores,
    }


def _value(scores: dict[str, float], name: str, each: Run) -> float:
    """A score by its name, by the only name that begins so (`spatial *`), or a difference of two (`q1 - q4`)."""
    if " - " in name:
        first, second = name.split(" - ")
        return _value(scores, first, each) - _value(scores, second, each)
    found = [key for key in scores if key == name or (name.endswith("*") and key.startswith(name[:-1]))]
    if len(found) != 1:
        raise ValueError(f"{each.folder} has no score {name!r}; it has {', '.join(scores)}")
    return scores[found[0]]


def _options(given: dict[str, str], benchmark: str) -> list[str]:
    """The setting's options of all benchmarks, then those of this one."""
    return shlex.split(f"{given.get('all', '')} {given.get(benchmark, '')}")
