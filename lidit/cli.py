"""The command line: `lidit VERB ...`. Nothing heavy is imported before a verb is known, so that help appears at once.

Exit codes: 0 done; 1 the input is wrong; 2 the command line or a recipe is not understood; 75 a run that was told to
stop has saved and can be resumed; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentError
from contextlib import nullcontext
from importlib import import_module

from lidit import __version__
from lidit.jobs import signals
from lidit.verbs import OWN_WAY, VERBS, find, unknown


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return the exit code; LIDIT_TRACEBACK=1 shows where an error came from."""
    try:
        run(sys.argv[1:] if argv is None else argv)
    except ArgumentError as error:
        return complain(error, 2)
    except (ValueError, OSError) as error:
        return complain(error, 1)
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:  # help has been printed, or Lightning has shut down after an interrupt
        return 130 if isinstance(stop.__context__, KeyboardInterrupt) else int(stop.code or 0)
    return 0


def run(argv: list[str]) -> None:
    """Find the verb and run it, or print the version.

    Raises:
        ArgumentError: there is no such verb, or it does not take these arguments.
    """
    if argv in (["--version"], ["version"]):
        print(f"lidit {__version__}")
        return
    verb = find(argv)
    if verb is None:
        print_help(argv)
        return
    with signals.remembered() if verb == "fit" else nullcontext():  # before the seconds that importing torch takes
        do(verb, argv[len(verb.split()) :])


def do(verb: str, rest: list[str]) -> None:
    """Import the function of a verb, and call it with the rest of the command line."""
    module, function = VERBS[verb][0].split(":")
    command = getattr(import_module(module), function)
    if verb in OWN_WAY:
        command(rest)
        return
    from lidit.arguments import call

    call(command, f"lidit {verb}", rest)


def print_help(argv: list[str]) -> None:
    """Print all verbs, or those that begin with the word given (`lidit prep`).

    Raises:
        ArgumentError: no verb begins with the words given.
    """
    words = [word for word in argv if word not in ("-h", "--help")]
    listed = [verb for verb in VERBS if verb.split()[: len(words)] == words]
    if not listed:
        raise unknown(words)
    print("usage: lidit VERB [arguments]      (lidit VERB --help: the arguments of a verb; lidit --version)\n")
    for verb in listed:
        print(f"  lidit {verb:<17}{VERBS[verb][1]}")
    print("\nLIDIT_TRACEBACK=1 in the environment shows where an error came from.")


def complain(error: Exception, code: int) -> int:
    """Print in one line what is wrong, and return the exit code.

    Raises:
        Exception: the error itself, when the user wants its traceback.
    """
    if os.environ.get("LIDIT_TRACEBACK") == "1":
        raise error
    print("lidit: error: " + " ".join(str(error).split()), file=sys.stderr)
    return code
