"""`lidit launch`: a command of lidit as a job of Slurm, or on this machine's devices through torchrun.

The job's script is plain text (`slurm_job.sh` with its gaps filled): who knows Slurm reads it, changes it, submits it.
"""

from __future__ import annotations

import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path

from lidit.arguments import parse_functions
from lidit.disk.folder import JOBS, LOGS
from lidit.jobs import local, script, slurm
from lidit.jobs.runs import WAITING, last_job
from lidit.jobs.script import Job, Ranks, Task

SEVERAL = ("env", "module", "setup", "sbatch")  # options that may be given more than once


def with_slurm(argv: list[str]) -> None:
    """`lidit launch slurm [options] -- VERB ...`: write a job's script and submit it."""
    _launch(submit, "lidit launch slurm", argv)


def with_torchrun(argv: list[str]) -> None:
    """`lidit launch local [options] -- VERB ...`: run on this machine, or say what to run on each of several."""
    _launch(run_here, "lidit launch local", argv)


def _launch(function: Callable, prog: str, argv: list[str]) -> None:
    """Give what stands before `--` to a function as its arguments, and what stands after it as the command."""
    at = argv.index("--") if "--" in argv else len(argv)
    (values,) = parse_functions([function], prog, _plain(argv[:at]), without={"command"})
    function(**values, command=argv[at + 1 :])


def _plain(options: list[str]) -> list[str]:
    """Options as jsonargparse takes them: a list's with a plus, a flag with its value."""
    options = [re.sub(rf"^--({'|'.join(SEVERAL)})(?==|$)", r"--\1+", word) for word in options]
    bare = [
        word == "--dry-run" and options[i + 1 : i + 2] not in (["true"], ["false"]) for i, word in enumerate(options)
    ]
    return [f"{word}=true" if flag else word for word, flag in zip(options, bare, strict=True)]


def submit(
    name: str | None = None,
    nodes: int = 1,
    gpus_per_node: int = 8,
    tasks_per_node: int | None = None,
    cpus_per_task: int | None = None,
    mem: str | None = None,
    time: str = "24:00:00",
    partition: str | None = None,
    account: str | None = None,
    container: str | None = None,
    python: str | None = None,
    env: list[str] | None = None,
    module: list[str] | None = None,
    setup: list[str] | None = None,
    sbatch: list[str] | None = None,
    rows: str | None = None,
    array: str | None = None,
    array_limit: int | None = None,
    save_seconds: int = 120,
    dry_run: bool = False,
    *,
    command: list[str],
) -> None:
    """Submit what follows `--` (`lidit launch slurm --nodes 2 -- fit --config FILE`) as a job of Slurm.

    Args:
        name: of the job, and of its folder in runs; by default the recipe's.
        nodes: machines.
        gpus_per_node: one task each; 0: CPUs alone.
        tasks_per_node: with --gpus-per-node 0, 1 by default.
        cpus_per_task: CPU cores of each task; by default what the cluster gives.
        mem: memory of each node, such as 200G; by default what the cluster gives.
        time: limit of each start, as HH:MM:SS or D-HH:MM:SS; a run that reaches it saves, and is requeued.
        partition: of the slurm.
        account: what is charged.
        container: an Apptainer image (a .sif file), or else an image for srun --container-image (Pyxis).
        python: the interpreter of the tasks; by default this one, or `python` in a container.
        env: NAME=VALUE for the tasks; may be given several times.
        module: for `module load`; may be given several times.
        setup: a line of shell before the tasks start; may be given several times.
        sbatch: a further option for sbatch, such as --sbatch=--qos=high; may be given several times.
        rows: a file with a lidit command in each line: an array with a task for each, instead of a command after --.
        array: task numbers of an array of the same command, such as 0-9; {task} in the command becomes the number.
        array_limit: tasks of an array that run at one time.
        save_seconds: how long before the limit the run is told to save, at least a step and writing a checkpoint.
        dry_run: print the script and do nothing.
        command: what is run.
    """
    ranks = Ranks(nodes, gpus_per_node, tasks_per_node)
    tasks, base, numbers = planned(name, ranks, rows, array, command)
    wanted = {
        "job-name": base.name,
        "nodes": nodes,
        "ntasks-per-node": ranks.each,
        "gpus-per-node": gpus_per_node or None,
        "cpus-per-task": cpus_per_task,
        "mem": mem,
        "time": time,
        "partition": partition,
        "account": account,
        "array": limited(numbers, array_limit),
        "output": f"{base}/{LOGS}/{'%A_%a' if numbers else '%j'}.log",
    }
    lines = [f"module load {each}" for each in module or []] + (setup or []) + script.exports(env or [])
    what = Job(tasks, base, wanted, sbatch or [], lines, container, python or _python(container), save_seconds)
    if dry_run:
        print(what.script(), end="")
        return
    send(what, numbers)


def _python(container: str | None) -> str:
    return "python" if container else sys.executable


def planned(
    name: str | None, ranks: Ranks, rows: str | None, array: str | None, command: list[str]
) -> tuple[list[Task], Path, str | None]:
    """What each task does, the folder of the script, and the numbers of an array's tasks.

    Raises:
        ArgumentError: a command is missing, one too many, or unknown.
        ValueError: the file of rows is missing or empty, or the numbers are none.
    """
    if rows and (command or array):
        raise ArgumentError(None, "--rows takes its commands from a file: leave out --array and what follows --")
    if rows:
        commands = script.read_rows(Path(rows))
        base = Path("runs") / (name or Path(rows).stem)
        tasks = [script.complete(c, base / str(i), ranks) for i, c in enumerate(commands)]
        return script.apart(tasks), base, f"0-{len(tasks) - 1}"
    base = Path("runs") / (name or script.name_of(command))
    if array:
        each = script.complete(command, base / script.TASK, ranks)
        script.apart([each] * len(script.expand(array)))
        return [each], base, array
    task = script.complete(command, base, ranks)
    return [task], Path(task.run), None


def limited(numbers: str | None, limit: int | None) -> str | None:
    """An array's numbers with the number of tasks that may run at one time.

    Raises:
        ArgumentError: there is no array to limit, or no task could run.
    """
    if limit is None:
        return numbers
    if not numbers or limit < 1 or "%" in numbers:
        raise ArgumentError(None, "--array-limit needs --rows or --array (without %), and is at least 1")
    return f"{numbers}%{limit}"


def send(what: Job, numbers: str | None) -> None:
    """Write the script, submit it, and note the job in the folders of its runs.

    Raises:
        ValueError: Slurm is not there or refuses, or a job is at work in one of the folders.
    """
    slurm.call("sbatch", "--version")
    folders = {n: Path(run) for n, run in what.runs(script.expand(numbers) if numbers else [None]).items()}
    refuse_busy(list(folders.values()))
    (what.base / LOGS).mkdir(parents=True, exist_ok=True)
    what.file.write_text(what.script())
    number = slurm.submit(what.file)
    for task, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / JOBS).open("a") as file:
            file.write(f"{number}\n" if task is None else f"{number}_{task}\n")
    print(f"job {number}: script {what.file}, logs {what.base}/{LOGS}; `lidit runs {what.base}` shows how it is")


def refuse_busy(folders: list[Path]) -> None:
    """Two jobs in one folder would write over each other.

    Raises:
        ValueError: there is one already.
    """
    jobs = {job: folder for folder in folders if (job := last_job(folder))}
    for number, state in slurm.states(jobs).items() if jobs else ():
        if state in (*WAITING, "RUNNING", "COMPLETING"):
            raise ValueError(
                f"{jobs[number]} has job {number}, which is {state.lower()}: `scancel {number}` ends it, or choose "
                "another folder with --name"
            )


def run_here(
    name: str | None = None,
    nodes: int = 1,
    gpus_per_node: int = 0,
    tasks_per_node: int | None = None,
    host: str | None = None,
    port: int | None = None,
    env: list[str] | None = None,
    dry_run: bool = False,
    *,
    command: list[str],
) -> None:
    """Run what follows `--` on this machine's GPUs or CPUs with torchrun; of several nodes, print the line for each.

    Args:
        name: of the run, and of its folder in runs; by default the recipe's.
        nodes: machines; with more than one, the line to run on each is printed.
        gpus_per_node: one process each; 0: CPUs alone.
        tasks_per_node: processes, with --gpus-per-node 0; 1 by default.
        host: where the ranks meet: the name of one of several nodes.
        port: where the ranks meet; by default a free one, or 29500 with several nodes.
        env: NAME=VALUE; may be given several times.
        dry_run: print the line and do nothing.
        command: what is run.
    """
    ranks = Ranks(nodes, gpus_per_node, tasks_per_node)
    task = script.complete(command, Path("runs") / (name or script.name_of(command)), ranks)
    given = dict(each.split("=", 1) for each in script.checked(env or []))
    line = local.line(ranks.each, nodes, host, port, Path(task.run).name, list(task.words))
    if dry_run or nodes > 1:
        local.show(line, given, nodes)
    else:
        local.run(line, os.environ | given, Path(task.run), port)
