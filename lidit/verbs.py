"""The verbs of the command line, by name alone: what does each is imported once its verb is known."""

from __future__ import annotations

from argparse import ArgumentError
from difflib import get_close_matches

VERBS = {  # verb: (the function that does it, what it does)
    "demo": ("lidit.demo:demo", "train a small model for some minutes, then compare it with the bundled one"),
    "sample": ("lidit.sample:main", "draw what a sentence says, or a benchmark's pictures"),
    "score": ("lidit.benchmark:score", "judge a benchmark's pictures"),
    "report": ("lidit.benchmark:report", "print the scores of runs side by side"),
    "table": ("lidit.tables.table:main", "plan, run, score or report a table of the paper, beside the paper's numbers"),
    "serve": ("lidit.pages.serve:serve", "a page to try prompts on, with one model or two side by side"),
    "study serve": ("lidit.study.serve:serve", "serve a blind comparison of folders of pictures to people who vote"),
    "study report": ("lidit.study.report:report", "win shares, agreement between raters, and the paper's Figure 6"),
    "encode": ("lidit.sample:encode", "show how each LLM reads a prompt, and what the transformer gets of it"),
    "fit": ("lidit.fit:fit", "train a model from a recipe"),
    "validate": ("lidit.fit:validate", "the validation loss of a checkpoint"),
    "test": ("lidit.fit:test", "the test loss of a checkpoint"),
    "plan": ("lidit.plan:main", "parameters, operations and memory of a recipe, before it is run"),
    "launch local": ("lidit.jobs.launch:with_torchrun", "run a command on this machine, or print the line for several"),
    "launch slurm": ("lidit.jobs.launch:with_slurm", "submit a command as a job of Slurm, or print the job's script"),
    "doctor": ("lidit.doctor:main", "versions, devices, disk, bundled parts: what is missing for what, for an issue"),
    "runs": ("lidit.jobs.runs:runs", "what became of runs and jobs: state, step, last loss, error"),
    "export": ("lidit.export:export", "write a folder of safetensors and configuration from a checkpoint"),
    "prep filter": ("data_prep.filter:filter_records", "choose which records of a collection go into shards, by rules"),
    "prep shard": ("data_prep.shard:shard", "write tar shards of images and captions"),
    "prep check": ("data_prep.check:check", "read every shard and say what is wrong"),
    "prep stats": ("data_prep.stats:stats", "counts by bucket, caption lengths, a histogram of resolutions"),
    "prep caption": ("data_prep.caption:caption", "write synthetic captions beside the original ones"),
    "prep precompute": ("data_prep.precompute:precompute", "compute latents and LLM features of shards once"),
}
RECIPES = ("fit", "validate", "test")  # Lightning runs them from a recipe; a job tells them how many ranks there are
OWN_WAY = (*RECIPES, "plan", "sample", "score", "doctor", "launch local", "launch slurm")  # parse what they are given


def find(argv: list[str]) -> str | None:
    """The verb that a command line begins with."""
    return next((verb for verb in (" ".join(argv[:2]), *argv[:1]) if verb in VERBS), None)


def unknown(words: list[str]) -> ArgumentError:
    """That no verb begins with these words; it names the nearest one."""
    nested = any(verb.startswith(f"{words[0]} ") for verb in VERBS)
    said = " ".join(words[: 2 if nested else 1])
    near = get_close_matches(said, VERBS, n=1, cutoff=0.5)
    fix = f"did you mean `lidit {near[0]}`?" if near else "`lidit --help` lists the verbs"
    return ArgumentError(None, f"there is no verb {said!r}; {fix}")
