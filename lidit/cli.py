"""The command line: `lidit VERB ...`. Nothing heavy is imported before a verb is known, so that help is at once.

Exit codes: 0 done; 1 the input is wrong; 2 the command line or a recipe is not understood; 75 a run that was told to
stop has saved and can go on; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentError
from contextlib import nullcontext
from difflib import get_close_matches
from importlib import import_module

from lidit import signals

VERBS = {  # verb: (the function that does it, what it does)
    "demo": ("lidit.demo:demo", "train a small model for some minutes, then compare it with the bundled one"),
    "sample": ("lidit.sample:main", "draw what a sentence says, or a benchmark's pictures"),
    "score": ("lidit.benchmark:score", "judge a benchmark's pictures"),
    "report": ("lidit.benchmark:report", "print the scores of runs side by side"),
    "table": ("lidit.table:main", "plan, run, score or report a table of the paper, beside the paper's numbers"),
    "serve": ("lidit.serve:serve", "a page to try prompts on, with one model or two side by side"),
    "study serve": ("lidit.study.serve:serve", "serve a blind comparison of folders of pictures to people who vote"),
    "study report": ("lidit.study.report:report", "win shares, agreement between raters, and the paper's Figure 6"),
    "encode": ("lidit.sample:encode", "show how each LLM reads a prompt, and what the transformer gets of it"),
    "fit": ("lidit.fit:fit", "train a model from a recipe"),
    "validate": ("lidit.fit:validate", "the validation loss of a checkpoint"),
    "test": ("lidit.fit:test", "the test loss of a checkpoint"),
    "plan": ("lidit.plan.plan:main", "parameters, operations and memory of a recipe, before it is run"),
    "launch local": ("lidit.launch:local", "run a command on this machine's devices, or print the line for several"),
    "launch slurm": ("lidit.launch:slurm", "submit a command as a job of Slurm, or print the job's script"),
    "doctor": ("lidit.doctor:main", "versions, devices, disk, bundled parts: what is missing for what, for an issue"),
    "runs": ("lidit.runs:runs", "what became of runs and jobs: state, step, last loss, error"),
    "export": ("lidit.export:export", "write a folder of safetensors and configuration from a checkpoint"),
    "prep filter": ("data_prep.filter:filter_records", "choose which records of a collection go into shards, by rules"),
    "prep shard": ("data_prep.shard:shard", "write tar shards of images and captions"),
    "prep check": ("data_prep.check:check", "read every shard and say what is wrong"),
    "prep stats": ("data_prep.stats:stats", "counts by bucket, caption lengths, a histogram of resolutions"),
    "prep caption": ("data_prep.caption:caption", "write synthetic captions beside the original ones"),
    "prep precompute": ("data_prep.precompute:precompute", "compute latents and LLM features of shards once"),
}
RECIPES = ("fit", "validate", "test")  # of Lightning
OWN_WAY = (*RECIPES, "plan", "sample", "score", "doctor")  # read their arguments themselves
LAUNCHERS = ("launch local", "launch slurm")  # take another command line, after --


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
    """Find the verb and do it.

    Raises:
        ArgumentError: there is no such verb, or it does not take these arguments.
    """
    verb = find(argv)
    if verb is None:
        print_help(argv)
        return
    with signals.remembered() if verb == "fit" else nullcontext():  # before the seconds that importing torch takes
        do(verb, argv[len(verb.split()) :])


def find(argv: list[str]) -> str | None:
    """The verb that a command line begins with."""
    return next((verb for verb in (" ".join(argv[:2]), *argv[:1]) if verb in VERBS), None)


def do(verb: str, rest: list[str]) -> None:
    """Import what does the verb, and do it."""
    module, function = VERBS[verb][0].split(":")
    command = getattr(import_module(module), function)
    if verb in LAUNCHERS:
        command(rest, check)
        return
    if verb in OWN_WAY:
        command(rest)
        return
    from lidit.arguments import call

    call(command, f"lidit {verb}", rest)


def check(argv: list[str]) -> None:
    """See that a command line begins with a verb.

    Raises:
        ArgumentError: it does not.
    """
    if find(argv) is None:
        print_help([*argv[:2], ""])  # nothing begins so


def print_help(argv: list[str]) -> None:
    """Print all verbs, or those that begin with the word given (`lidit prep`).

    Raises:
        ArgumentError: no verb begins with the words given.
    """
    words = [word for word in argv if word not in ("-h", "--help")]
    listed = [verb for verb in VERBS if verb.split()[: len(words)] == words]
    if not listed:
        nested = any(verb.startswith(f"{words[0]} ") for verb in VERBS)
        said = " ".join(words[: 2 if nested else 1])
        near = get_close_matches(said, VERBS, n=1, cutoff=0.5)
        fix = f"did you mean `lidit {near[0]}`?" if near else "`lidit --help` lists the verbs"
        raise ArgumentError(None, f"there is no verb {said!r}; {fix}")
    print("usage: lidit VERB [arguments]      (lidit VERB --help: the arguments of a verb)\n")
    for verb in listed:
        print(f"  lidit {verb:<17}{VERBS[verb][1]}")
    print("\nLIDIT_TRACEBACK=1 in the environment shows where an error came from.")


def complain(error: Exception, code: int) -> int:
    """Say in one line what is wrong, and return the exit code.

    Raises:
        Exception: the error itself, when the user wants its traceback.
    """
    if os.environ.get("LIDIT_TRACEBACK") == "1":
        raise error
    print("lidit: error: " + " ".join(str(error).split()), file=sys.stderr)
    return code
