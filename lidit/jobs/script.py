"""What a launched job does: its commands completed by what their ranks and a requeue need, and its script."""

from __future__ import annotations

import re
import shlex
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lidit.arguments import take
from lidit.disk.folder import LOGS, STATE, state_name
from lidit.jobs.state import UNQUEUED
from lidit.verbs import RECIPES, find, unknown

TEMPLATE = Path(__file__).with_name("slurm_job.sh")
TASK = "{task}"  # in a command: the number of an array's task
NUMBERS = r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?"
PAIR = r"[A-Za-z_][A-Za-z0-9_]*=.*"


@dataclass(frozen=True)
class Ranks:
    """How many processes, and where.

    Raises:
        ValueError: a number is too small, or the numbers contradict each other.
    """

    nodes: int
    gpus_per_node: int
    tasks_per_node: int | None

    def __post_init__(self) -> None:
        tasks = 1 if self.tasks_per_node is None else self.tasks_per_node
        for name, value, least in (("nodes", self.nodes, 1), ("gpus", self.gpus_per_node, 0), ("tasks", tasks, 1)):
            if value < least:
                raise ValueError(f"the number of {name} is {value}; it must be at least {least}")
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"--tasks-per-node is {tasks} and --gpus-per-node {self.gpus_per_node}, but each GPU has one task; "
                "leave --tasks-per-node out, or say --gpus-per-node 0 to run on CPUs"
            )

    @property
    def each(self) -> int:
        """Processes on a node."""
        return self.gpus_per_node or self.tasks_per_node or 1

    def arguments(self) -> dict[str, str]:
        """What Lightning has to be told."""
        kind = "gpu" if self.gpus_per_node else "cpu"
        return {"num_nodes": str(self.nodes), "devices": str(self.each), "accelerator": kind}


@dataclass(frozen=True)
class Task:
    """A command of lidit, and the folder of its run, for logs and state; both may have {task} in them."""

    run: str
    words: tuple[str, ...]


def complete(command: list[str], folder: Path, ranks: Ranks) -> Task:
    """A command with what it needs to run on these ranks and to go on after a requeue; what is added is said.

    Args:
        command: verb and arguments.
        folder: of the run, if the command names none.
        ranks: where it runs.

    Raises:
        ArgumentError: there is no command, or no such verb.
        ValueError: a recipe is not there, or the command could not go on.
    """
    if not command:
        raise ArgumentError(None, "nothing to launch: put a command after --, such as -- fit --config FILE")
    if find(command) is None:
        raise unknown(command)
    for file in _values(command, "--config"):
        if not Path(file).is_file():
            raise ValueError(f"there is no recipe {file}; a job would find out only after it has waited")
    added: list[str] = []
    run = str(folder)
    if command[0] in RECIPES:
        given = {name: value for name, value in ranks.arguments().items() if not _has(command, f"--trainer.{name}")}
        added += [word for name, value in given.items() for word in (f"--trainer.{name}", value)]
    if command[0] == "fit":
        named, _ = take(command, "--run")
        run = named or run
        added += _resumable(command, run, bool(named))
    return Task(run, (*command, *added))


def _resumable(command: list[str], run: str, named: bool) -> list[str]:
    """What a command of fit lacks to go on after a requeue."""
    if _has(command, "--ckpt_path"):
        raise ValueError(
            "--ckpt_path would begin from the same checkpoint after every requeue; to go on with a run, say --run "
            "FOLDER --resume auto, and to begin with its weights --start_from"
        )
    added = [] if named else ["--run", run]
    added += [] if _has(command, "--resume") else ["--resume", "auto"]
    if added:
        print(f"lidit: added {' '.join(added)}, so that a requeued job goes on", file=sys.stderr)
    return added


def _has(command: Sequence[str], option: str) -> bool:
    return any(word == option or word.startswith(f"{option}=") for word in command)


def _values(command: list[str], option: str) -> list[str]:
    """All values of an option."""
    found: list[str] = []
    while _has(command, option):
        value, command = take(command, option)
        found += [value or ""]
    return found


def name_of(command: list[str]) -> str:
    """A name for a command: its last recipe's, or else its verb."""
    recipes = _values(command, "--config")
    return Path(recipes[-1]).stem if recipes else "-".join(command[:1])


def read_rows(file: Path) -> list[list[str]]:
    """The commands in a file, one a line; empty lines and what follows # are left out, and so is the word lidit.

    Raises:
        ValueError: the file is missing, empty, or has an open quote.
    """
    if not file.is_file():
        raise ValueError(f"--rows: there is no file {file}; write one lidit command a line into it")
    try:
        rows = [shlex.split(line, comments=True) for line in file.read_text().splitlines()]
    except ValueError as error:
        raise ValueError(f"--rows: {file} has a line that a shell could not read ({error})") from None
    rows = [row[1:] if row[0] == "lidit" else row for row in rows if row]
    if not any(rows):
        raise ValueError(f"--rows: {file} has no command; write one lidit command a line into it")
    return rows


def apart(tasks: list[Task]) -> list[Task]:
    """The same tasks.

    Raises:
        ValueError: two would write into one folder.
    """
    runs = [task.run for task in tasks if TASK not in task.run]
    if twice := [run for run in runs if runs.count(run) > 1]:
        raise ValueError(f"several tasks have --run {twice[0]}: leave it out, or put {TASK} into it with --array")
    return tasks


def expand(numbers: str) -> list[int]:
    """The task numbers that Slurm makes of `0-3,7,10-20:5%2`.

    Raises:
        ArgumentError: they are no such numbers.
    """
    if not re.fullmatch(NUMBERS, numbers):
        raise ArgumentError(None, f"--array is {numbers!r}; it takes numbers such as 0-9, 0-9%2 or 1,3,5-20:5")
    found: list[int] = []
    for part in numbers.partition("%")[0].split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        found += range(int(first), int(last or first) + 1, int(step or 1))
    return found


def checked(pairs: list[str]) -> list[str]:
    """The same pairs.

    Raises:
        ArgumentError: one is not NAME=VALUE.
    """
    for pair in pairs:
        if not re.fullmatch(PAIR, pair, re.DOTALL):
            raise ArgumentError(None, f"--env {pair!r} is not NAME=VALUE, with a name of letters, digits and _")
    return pairs


def exports(pairs: list[str]) -> list[str]:
    """NAME=VALUE as lines of shell."""
    return [
        f"export {name}={shlex.quote(value)}" for name, _, value in (pair.partition("=") for pair in checked(pairs))
    ]


def quote(word: str) -> str:
    """A word for the shell, with an array's task number in it where it has {task}."""
    if TASK not in word:
        return shlex.quote(word)
    return '"$SLURM_ARRAY_TASK_ID"'.join(shlex.quote(part) if part else "" for part in word.split(TASK))


@dataclass(frozen=True)
class Job:
    """A job of Slurm.

    Args:
        tasks: one; or one for each number of an array.
        base: folder of the script and its own log.
        wanted: options for sbatch; those that are None are left out.
        options: further ones, as they are.
        setup: lines of shell before the tasks start.
        container: image; None: none.
        python: interpreter of the tasks.
        save_seconds: how long before its end the job is told.
    """

    tasks: list[Task]
    base: Path
    wanted: dict[str, object]
    options: list[str]
    setup: list[str]
    container: str | None
    python: str
    save_seconds: int

    @property
    def file(self) -> Path:
        """Of the script."""
        return self.base / "job.sh"

    def runs(self, numbers: Sequence[int | None]) -> dict[int | None, str]:
        """Folder of the run of each of an array's tasks, or of the one task (None)."""
        several = len(self.tasks) > 1 or (numbers != [None] and TASK not in self.tasks[0].run)
        return {n: self.tasks[n or 0].run if several else self.tasks[0].run.replace(TASK, str(n)) for n in numbers}

    def script(self) -> str:
        """The whole script."""
        trains = any(task.words[0] == "fit" for task in self.tasks)
        options = [f"--{name}={shlex.quote(str(value))}" for name, value in self.wanted.items() if value is not None]
        options += self.options + ([f"--signal=USR1@{self.save_seconds}"] if trains else [])
        image, prefix = self._container()
        gaps = {
            "script": shlex.quote(str(self.file)),
            "directives": "\n".join(f"#SBATCH {option}" for option in options),
            "folder": shlex.quote(str(Path.cwd())),
            "setup": "\n".join(self.setup or ["# nothing asked for: it is that in which the job was submitted"]),
            "command": self._commands(),
            "srun": image,
            "python": f"{prefix}{shlex.quote(self.python)}",
            "after": AFTER if trains else "",
        }
        script = TEMPLATE.read_text()
        for name, text in gaps.items():
            script = script.replace("{{" + name + "}}", text)
        return script

    def _container(self) -> tuple[str, str]:
        """Further options of srun, and what stands before python."""
        if self.container is None:
            return "", ""
        image = shlex.quote(self.container)
        if self.container.endswith(".sif"):
            return "", f'apptainer exec --nv --bind "$PWD" {image} '
        return f' --container-image={image} --container-mounts="$PWD:$PWD" --container-workdir="$PWD"', ""

    def _commands(self) -> str:
        """Shell that sets RUN and COMMAND."""
        if len(self.tasks) == 1:
            return _assign(self.tasks[0])
        cases = [f"{i})\n{_assign(task)}\n;;" for i, task in enumerate(self.tasks)]
        return "\n".join(['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"])


AFTER = f"""
# Rank 0 requeues a run that was told to save; where it finds no scontrol, as in a container, that is done here
said="$RUN/{STATE}/{state_name(0)}"
if [ "$said" -nt "$RUN/{LOGS}/$JOB.started" ] && grep -qs '"state": "{UNQUEUED}"' "$said"; then
  scontrol requeue "$JOB"
fi"""


def _assign(task: Task) -> str:
    """Each option in a line of its own."""
    lines: list[str] = []
    for word in task.words:
        if word.startswith("-") or not lines:
            lines.append(quote(word))
        else:
            lines[-1] += f" {quote(word)}"
    return "\n".join([f"RUN={quote(task.run)}", "COMMAND=(", *(f"  {line}" for line in lines), ")"])
