"""Commands of lidit as one process or as a few ranks, forked from a process that has imported all that they need.

A command that hangs is ended, after every process has said where it stands.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing import get_context, set_start_method
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PRELOADED = ["lidit.fit", "lidit.sample", "lidit.export", "lidit.plan.plan", "lidit.callbacks.scores"]
GRACE = 2.0  # seconds that the ranks have to say what they know when one has failed
DUMP = signal.SIGQUIT  # a process that gets it writes the stacks of its threads to its log
FRAME = re.compile(r'^ *File "(.+)", line (\d+), in (.+)$')
TOLD = re.compile(r"^lidit: error: (.*)$|^(\w+(?:\.\w+)*(?:Error|Exception|Interrupt).*)$")


class Failed(ValueError):
    """A command failed, hung, or was refused; the text is a line."""


class Player:
    """Plays commands, and keeps what they print.

    Args:
        logs: the folder of what they print.
        timeout: seconds after which a command hangs.
    """

    def __init__(self, logs: Path, timeout: float):
        self.logs, self.timeout = logs, timeout
        self.logs.mkdir(parents=True, exist_ok=True)
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def __call__(self, name: str, argv: list[str], ranks: int = 1, expected: int = 0) -> Path:
        """Play a command to its end, and return the log of its first rank.

        Args:
            name: of the logs.
            argv: the command line after `lidit`.
            ranks: number of processes; several meet over gloo.
            expected: exit code of each.

        Raises:
            Failed: it did not end as expected.
        """
        logs = [self.logs / (f"{name}.log" if ranks == 1 else f"{name}-rank-{i}.log") for i in range(ranks)]
        port = free_port()
        processes = [
            self._context.Process(target=perform, args=(argv, str(logs[i]), environment(i, ranks, port)))
            for i in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            hung = not self._ended(processes, expected)
            if hung:
                dump(processes)
        finally:
            end(processes)
        codes = [process.exitcode for process in processes]
        if hung or any(code != expected for code in codes):
            raise Failed(explained(logs, codes, expected, self.timeout if hung else 0.0))
        return logs[0]

    def _ended(self, processes: Sequence[ForkServerProcess], expected: int) -> bool:
        """Whether all processes end in time; where one fails, the others get few seconds more."""
        limit = time.monotonic() + self.timeout
        while any(process.is_alive() for process in processes):
            if any(process.exitcode not in (None, expected) for process in processes):
                time.sleep(GRACE)
                return True
            if time.monotonic() >= limit:
                return False
            time.sleep(0.05)
        return True


def perform(argv: list[str], log: str, env: dict[str, str]) -> None:
    """In a process of its own: run a command of lidit, and print into a file."""
    set_start_method("fork", force=True)  # workers that read data are forked as ever; a child would inherit forkserver
    os.setsid()  # a terminal's Ctrl-C reaches the rehearsal, which ends its processes
    os.environ.update(env)
    file = open(log, "w", buffering=1)  # noqa: SIM115 - open until the process ends
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    faulthandler.register(DUMP, file=file, all_threads=True)
    from lidit.cli import main

    code = main(argv)
    file.flush()
    sys.exit(code)


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun would tell a rank; nothing if there is one."""
    always = {"LIDIT_TRACEBACK": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    if ranks == 1:
        return always
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "rehearsal"}
    return always | names | {key: str(value) for key, value in numbers.items()}


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def dump(processes: Sequence[ForkServerProcess]) -> None:
    """Let every process write where it stands."""
    for process in processes:
        if process.is_alive() and process.pid:
            os.kill(process.pid, DUMP)
    time.sleep(1)


def end(processes: Sequence[ForkServerProcess]) -> None:
    """End processes and those that they started."""
    for process in processes:
        if process.is_alive() and process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def explained(logs: list[Path], codes: Sequence[int | None], expected: int, hung: float) -> str:
    """In a line: what the rank that failed first said, and where."""
    if hung:
        return f"hangs: ended after {hung:.0f} s; the stacks of all ranks are in {logs[0].parent} ({logs[0].name})"
    failed = [log for log, code in zip(logs, codes, strict=True) if code not in (expected, -signal.SIGKILL)]
    log = min(failed or logs, key=lambda path: path.stat().st_mtime if path.exists() else 0)
    said, place = last_error(log.read_text().splitlines() if log.exists() else [])
    return f"{said or f'exit code {codes[logs.index(log)]}'}{place} [{log.name}]"


def last_error(lines: list[str]) -> tuple[str, str]:
    """The last error in a log, and the innermost line of its traceback that is not of an installed package."""
    found = [(i, match) for i, line in enumerate(lines) if (match := TOLD.match(line))]
    if not found:
        return "", ""
    i, match = found[-1]
    frames = [frame for line in lines[:i] if (frame := FRAME.match(line)) and "site-packages" not in frame[1]]
    place = f" at {Path(frames[-1][1]).name}:{frames[-1][2]}" if frames else ""
    return match[1] or match[2], place
