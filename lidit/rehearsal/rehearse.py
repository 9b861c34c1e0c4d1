"""`lidit rehearse`: plays the whole life of a recipe with small sizes, and says of each stage whether it passed."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace

from lidit import fit
from lidit.arguments import take
from lidit.callbacks.ema import EMA
from lidit.models.source import sizes_alone
from lidit.module import TextToImage
from lidit.parallel import choose
from lidit.plan.costs import loaded
from lidit.plan.memory import GB
from lidit.rehearsal.data import known_sizes, served, with_drawn_data
from lidit.rehearsal.play import Failed, Player
from lidit.rehearsal.shared import FAILED, PASSED, Play, Verdict, timed
from lidit.rehearsal.small import changes, check_room, ranks_of, shapes, small
from lidit.rehearsal.stages import played

DISK, MEMORY = 1e9, 1.5e9  # bytes: of all that is written; of a process
LARGE = 20e6  # parameters of a small model at most
OWN, ASKED = (
    ("--keep", "--timeout", "--small", "--gpus"),
    ("--pixels", "--tokens", "--gpu_memory"),
)  # the plan asks, too


def main(argv: list[str]) -> None:
    """Rehearse a recipe, and print a table of verdicts.

    Raises:
        ArgumentError: the recipe is not understood.
        ValueError: a stage failed, the recipe cannot be made small, or there is too little disk or memory.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the ranks are forked: they share the machine's cores
    begun = time.monotonic()
    with sizes_alone():
        cli = fit.unstarted(argv, add_arguments)
    verdicts = [Verdict("parse", PASSED, time.monotonic() - begun, "every key and class is known")]
    print(line(verdicts[0]))
    given, kept = cli.config_init["fit"], bool(cli.given.keep)
    if (there := torch.cuda.device_count()) < given.gpus:
        raise ValueError(f"--gpus {given.gpus}: this machine shows {there} GPUs; leave it out to play on CPU cores")
    folder = new_folder(cli.given.keep)
    recipe = {key: value for key, value in yaml.safe_load(cli.text()).items() if f"--{key}" not in OWN + ASKED}
    check_room(folder, DISK, MEMORY * ranks_of(recipe["trainer"]).all)
    recipe, done = with_strategy(recipe, given, cli.model), False
    try:
        for verdict in rehearsed(argv, recipe, given, folder):
            verdicts.append(verdict)
            print(line(verdict), flush=True)
        failed = [verdict for verdict in verdicts if verdict.verdict == FAILED]
        done = not failed
    finally:
        if not kept and (done or len(verdicts) == 1):  # the logs of what failed stay
            shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{sum(v.seconds for v in verdicts):.0f} s" + (f"; everything is in {folder}" if kept or failed else ""))
    if failed:
        raise ValueError(f"{failed[0].stage}: {failed[0].said}; the logs are in {folder / 'logs'}")
    print("Every stage passed.")


def add_arguments(parser: ArgumentParser) -> None:
    """What is asked beside the recipe."""
    parser.add_argument("--keep", type=str | None, default=None, help="A new folder for all that is written.")
    parser.add_argument("--timeout", type=float, default=300.0, help="Seconds after which a command hangs.")
    parser.add_argument(
        "--small",
        type=str | None,
        default=None,
        help="A recipe laid over the small one, for sizes of your own classes.",
    )
    parser.add_argument(
        "--gpus", type=int, default=0, help="Play on so many GPUs of this machine; 0: on its CPU cores."
    )
    parser.add_argument("--gpu_memory", type=float, default=80.0, help="Of a GPU, in GB, for the plan.")
    parser.add_argument("--tokens", type=int | None, default=None, help="Of a caption, for the plan.")
    parser.add_argument("--pixels", type=int, default=256, help="Side of the recipe's pictures.")


def with_strategy(recipe: dict[str, Any], given: Namespace, model: TextToImage) -> dict[str, Any]:
    """The recipe with the strategy that `lidit fit` chooses for the large model on several GPUs, if it names none."""
    if recipe["trainer"]["strategy"] != "auto" or ranks_of(recipe["trainer"]).all == 1:
        return recipe
    with sizes_alone():
        frozen, parameters = loaded(given, model, 0), sum(p.numel() for p in model.skeleton().parameters())
    ema = any(isinstance(callback, EMA) for callback in given.trainer.callbacks or [])
    name, why = choose(parameters, ema, int(given.gpu_memory * GB), frozen.llms - frozen.spread)
    print(f"Strategy {name}, as `lidit fit` chooses on several GPUs: {why}.")
    return recipe | {"trainer": recipe["trainer"] | {"strategy": name}}


def new_folder(keep: str | None) -> Path:
    """The folder of a rehearsal.

    Raises:
        ValueError: it holds something already.
    """
    if keep is None:
        return Path(tempfile.mkdtemp(prefix="lidit-rehearsal-"))
    folder = Path(keep).absolute()
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--keep {keep} holds something already; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def rehearsed(argv: list[str], recipe: dict[str, Any], given: Namespace, folder: Path) -> Iterator[Verdict]:
    """Play all stages after parsing."""
    made, ranks = small(recipe, folder, given.pixels, given.gpus), ranks_of(recipe["trainer"]).within(given.gpus)
    sizes = shapes(unit(made, folder, given.small), known_sizes(recipe["data"]))
    print("Small for the rehearsal; all else is as in the recipe:")
    print("\n".join(f"  {each}" for each in changes(recipe, made)) + "\n")
    player = Player(folder / "logs", given.timeout)
    yield timed("plan", lambda: planned(player, argv))
    (folder / "data").mkdir()
    with served(folder / "data") as url:
        begun = time.monotonic()
        try:
            run = lambda command: player(f"data-{command[1]}", command)  # noqa: E731
            made = with_drawn_data(made, folder / "data", sizes, url, run)
        except Failed as error:
            yield Verdict("data", FAILED, time.monotonic() - begun, str(error))
            return
        said = f"drawn in {', '.join(f'{width}x{height}' for width, height in sizes)}"
        yield Verdict("data", PASSED, time.monotonic() - begun, said)
        callbacks = given.trainer.callbacks or []
        yield from played(Play(player, folder, made, ranks, sizes, url, strangers(made), given.small, callbacks))


def planned(player: Player, argv: list[str]) -> str:
    """The last line of `lidit plan` of the recipe as it is.

    Raises:
        Failed: it cannot be planned, or does not fit.
    """
    for option in OWN:
        argv = take(argv, option)[1]
    said = player("plan", ["plan", *argv]).read_text().splitlines()
    verdict = next((each for each in said if each.startswith("It ")), said[-1])
    if verdict.startswith("It does not fit"):
        raise Failed(verdict)
    return verdict


def unit(recipe: dict[str, Any], folder: Path, over: str | None) -> int:
    """Pixels of a patch of the latent.

    Raises:
        ValueError: the model is still large.
    """
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    _, model, _ = fit.read_recipe(["--config", str(path), *(["--config", over] if over else [])])
    skeleton = model.skeleton()
    for part in ("backbone", "prompt_encoder"):  # whose width follows from the backbone
        count = sum(p.numel() for p in getattr(skeleton, part).parameters())
        if count > LARGE:
            raise ValueError(
                f"model.{part} ({recipe['model'][part]['class_path']}) has {count / 1e6:,.0f}M parameters with small "
                "sizes: none of its arguments is named width, depth or heads; give small ones in a file with --small"
            )
    return model.vae.factor * skeleton.backbone.patch


def strangers(value: Any) -> list[str]:
    """The modules besides lidit's and Lightning's that a recipe names classes of."""
    found: list[str] = []
    if isinstance(value, dict):
        path = value.get("class_path")
        found += [path.rpartition(".")[0]] if isinstance(path, str) else []
        found += [name for each in value.values() for name in strangers(each)]
    if isinstance(value, list):
        found += [name for each in value for name in strangers(each)]
    return sorted({name for name in found if name.partition(".")[0] not in ("lidit", "lightning", "torch")})


def line(verdict: Verdict) -> str:
    """A row of the table."""
    return f"{verdict.stage:<34} {verdict.verdict:<7} {verdict.seconds:6.1f} s  {verdict.said}"
