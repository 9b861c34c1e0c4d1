"""The verbs of the command line by name; the function of a verb is imported only when the verb is known."""

from __future__ import annotations

from argparse import ArgumentError
from difflib import get_close_matches

VERBS = {  # verb: (its function, what it does)
    "demo": ("lidit.demo:demo", "train a small model for some minutes, then compare it with the bundled one"),
    "sample": ("lidit.sample:main", "draw what a sentence says, or a benchmark's pictures"),
    "score": ("lidit.benchmark:score", "judge a benchmark's pictures and write its scores"),
    "report": ("lidit.benchmark:report", "print the scores of runs side by side"),
    "table": ("lidit.tables.table:main", "plan, run, score or report a table of the paper, beside the paper's numbers"),
    "serve": ("lidit.pages.serve:serve", "open a page to try prompts on, with one model or two side by side"),
    "study serve": ("lidit.study.serve:serve", "serve a blind comparison of folders of pictures to people who vote"),
    "study report": ("lidit.study.report:report", "print win shares, agreement of raters, and the paper's Figure 6"),
    "encode": ("lidit.sample:encode", "show how each LLM reads a prompt, and which tokens the transformer gets"),
    "fit": ("lidit.fit:fit", "train a model from a recipe"),
    "validate": ("lidit.fit:validate", "measure the validation loss of a checkpoint"),
    "test": ("lidit.fit:test", "measure the test loss of a checkpoint"),
    "plan": ("lidit.plan.plan:main", "parameters, operations and memory of a recipe, before it is run"),
    "rehearse": ("lidit.rehearsal.rehearse:main", "play a recipe's whole life in small, before anyone pays for a GPU"),
    "launch local": ("lidit.jobs.launch:with_torchrun", "run a command on this machine, or print the line for several"),
    "launch slurm": ("lidit.jobs.launch:with_slurm", "submit a command as a job of Slurm, or print the job's script"),
    "doctor": ("lidit.doctor:main", "print versions, devices, disk and bundled parts, and what is missing"),
    "runs": ("lidit.jobs.runs:runs", "list runs and jobs with state, step, last loss and error"),
    "export": ("lidit.export:export", "write a folder of safetensors and configuration from a checkpoint"),
    "prep filter": ("data_prep.filter:filter_records", "choose by rules which records of a collection go into shards"),
    "prep shard": ("data_prep.shard:shard", "write tar shards of images and captions"),
    "prep check": ("data_prep.check:check", "read every shard and report what is wrong"),
    "prep stats": ("data_prep.stats:stats", "print counts by bucket, caption lengths, a histogram of resolutions"),
    "prep caption": ("data_prep.caption:caption", "write synthetic captions beside the original ones"),
    "prep precompute": ("data_prep.precompute:precompute", "compute latents and LLM features once for all runs"),
}
RECIPES = ("fit", "validate", "test")  # Lightning runs them from a recipe; a job tells them the number of ranks
OWN_WAY = (
    *RECIPES,
    "plan",
    "rehearse",
    "sample",
    "score",
    "doctor",
    "launch local",
    "launch slurm",
)  # parse their arguments


def find(argv: list[str]) -> str | None:
    """The verb that a command line begins with, or None."""
    return next((verb for verb in (" ".join(argv[:2]), *argv[:1]) if verb in VERBS), None)


def unknown(words: list[str]) -> ArgumentError:
    """The error that no verb begins with these words, with the most similar verb."""
    nested = any(verb.startswith(f"{words[0]} ") for verb in VERBS)
    said = " ".join(words[: 2 if nested else 1])
    near = get_close_matches(said, VERBS, n=1, cutoff=0.5)
    fix = f"did you mean `lidit {near[0]}`?" if near else "`lidit --help` lists the verbs"
    return ArgumentError(None, f"there is no verb {said!r}; {fix}")
