"""A command of lidit on this machine's devices through torchrun, or the line to run on each of several machines."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from lidit.jobs import signals, state
from lidit.jobs.runs import first_error

PORT = 29500  # where the ranks of several machines meet, unless another is chosen


def line(each: int, nodes: int, host: str | None, port: int | None, name: str, command: list[str]) -> list[str]:
    """The command line, for every node the same.

    Args:
        each: processes on a node.
        nodes: machines.
        host: where the ranks meet.
        port: where the ranks meet.
        name: of the run.
        command: of lidit.
    """
    if nodes == 1 and port is None:
        meet = ["--standalone"]
    else:
        at = host or ("127.0.0.1" if nodes == 1 else "HOST")
        meet = ["--rdzv-backend", "c10d", "--rdzv-id", name, "--rdzv-endpoint", f"{at}:{port or PORT}"]
    return ["torchrun", "--nnodes", str(nodes), "--nproc-per-node", str(each), *meet, "-m", "--", "lidit", *command]


def show(line: list[str], env: Mapping[str, str], nodes: int) -> None:
    """Print the line, and what to do with it."""
    if nodes > 1:
        print(f"# run this on each of the {nodes} nodes, in the same folder and environment, all within some minutes")
        if any(word.startswith("HOST:") for word in line):
            print("# HOST: the name of one of the nodes, the same on all (--host)")
    print(" ".join([*(f"{name}={shlex.quote(value)}" for name, value in env.items()), shlex.join(line)]))


def run(line: list[str], env: Mapping[str, str], folder: Path, port: int | None) -> None:
    """Run the line here; a wish to stop (SIGTERM, SIGUSR1) is passed on to the ranks.

    Raises:
        ValueError: the port is taken, or a rank failed: the first that did is named.
        SystemExit: the run was told to stop, and has saved.
    """
    if port is not None:
        refuse_taken(port)
    command = [sys.executable, "-m", "torch.distributed.run", *line[1:]]
    begun = time.time()
    process = subprocess.Popen(command, env=dict(env))
    with signals.passed_on(lambda number: process.send_signal(signal.SIGTERM)):  # which torchrun passes on to the ranks
        try:
            code = process.wait()
        except KeyboardInterrupt:  # torchrun has had it from the terminal, too
            process.wait()
            raise
    if code:
        raise_for([rank for rank in state.read(folder) if rank.started >= begun], code)


def raise_for(ranks: list[state.State], code: int) -> None:
    """Say why the ranks ended.

    Args:
        ranks: what they say.
        code: exit code of torchrun.

    Raises:
        ValueError: one failed.
        SystemExit: they were told to stop, and have saved.
    """
    if ranks and all(rank.state == state.STOPPED for rank in ranks):
        print("lidit: told to stop, and saved; the same command goes on", file=sys.stderr)
        raise SystemExit(state.STOPPED_CODE)
    error = first_error([rank for rank in ranks if rank.state != state.STOPPED], over=True)
    raise ValueError(error or f"torchrun ended with exit code {code}; what the ranks said is above")


def refuse_taken(port: int) -> None:
    """See that the ranks can meet at a port of this machine.

    Raises:
        ValueError: somebody else listens there.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ValueError(
                f"port {port} is taken on this machine ({os.strerror(error.errno or 0)}); choose another with --port, "
                "or leave it out: then a free one is found"
            ) from None
