"""Benchmarks as three verbs with a folder between them: `sample --benchmark` draws, `score` judges, `report` prints.

    RUN/provenance.json   how the pictures came about
    RUN/...               pictures and lists of prompts, in the layout of the benchmark's authors
    RUN/scores.json       what `lidit score` found

A picture's noise comes from the run's seed plus its number among the samples of its prompt, so that any number of
processes draws the same pictures, and a run that was stopped goes on where it stood.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from lidit.arguments import parse_functions, take
from lidit.callbacks.provenance import commit
from lidit.checkpoint import fingerprint
from lidit.devices import Precision, name_of
from lidit.disk.folder import PROVENANCE, SCORES
from lidit.disk.whole import write_text
from lidit.eval.suite import BenchmarkError, Picture, Suite
from lidit.eval.suites import load
from lidit.jobs.ranks import share
from lidit.pictures import parse_size, save_image, tiled
from lidit.pipeline import BUNDLED, WEIGHTS, Pipeline, compute_of, is_export, place, size_of


def sample(argv: list[str], name: str) -> None:
    """`lidit sample --benchmark NAME`: the options of `draw` and of the benchmark's `suite`."""
    suite, settings = parse_functions([load(name).suite, draw], f"lidit sample --benchmark {name}", argv, {"suite"})
    draw(load(name).suite(**suite), **settings)


def score(argv: list[str]) -> None:
    """`lidit score RUN`: judge a run's pictures; the benchmark is the one they were drawn for."""
    name, rest = take(argv, "--benchmark")
    if name is None:
        name = next((_benchmark_of(Path(word)) for word in rest if (Path(word) / PROVENANCE).is_file()), None)
    if name is None:
        raise ValueError("which benchmark? give a folder that lidit sample --benchmark wrote, or --benchmark NAME RUN")
    (settings,) = parse_functions([load(name).score], f"lidit score --benchmark {name}", rest)
    run = Path(settings["run"])
    if (run / PROVENANCE).is_file() and _benchmark_of(run) != name:
        raise ValueError(f"{run} holds pictures of {_benchmark_of(run)}, not of {name}")
    found = {"benchmark": name, **load(name).score(**settings)}
    _write(run / SCORES, found)
    for task, value in found["scores"].items():
        print(f"  {task:<20} {value:.4f}")
    print(f"{run / SCORES}: {found['name']}, {found['images_scored']} of {found['images_demanded']} images")


def draw(
    suite: Suite,
    out: str,
    checkpoint: str = BUNDLED,
    seed: int = 42,
    size: str | None = None,
    steps: int = 25,
    guidance: float = 3.0,
    sampler: Literal["euler", "heun", "ddim"] | None = None,
    ema: bool = True,
    dtype: Precision = "auto",
    device: str = "auto",
    batch_size: int = 32,
    trust: list[str] | str | None = None,
) -> None:
    """Draw a benchmark's pictures into a folder; run again, it draws what is missing.

    Under torchrun or Slurm each process draws its share.

    Args:
        suite: what to draw.
        out: folder to write.
        checkpoint: a checkpoint of `lidit fit`, a run's folder (its newest one), a folder of `lidit export`, or the
            bundled model.
        seed: of a prompt's first sample; the next sample has the next seed.
        size: WIDTHxHEIGHT of a picture, or of a tile, in pixels; by default that of most training images.
        steps: of the sampler.
        guidance: classifier-free guidance scale; 1 is none.
        sampler: euler or heun for rectified flow, ddim for noise prediction.
        ema: take a checkpoint's averaged weights.
        dtype: precision of backbone and prompt encoder; auto: on a GPU that of the training, on a CPU float32.
        device: auto, cpu, cuda, or cuda:N; processes of a machine take one GPU each.
        batch_size: pictures drawn at once.
        trust: modules besides lidit whose classes the checkpoint may name, such as `--trust mine`.

    Raises:
        BenchmarkError: the folder holds pictures that were drawn otherwise.
    """
    run, rank, world = Path(out), *share()
    width, height = parse_size(size) if size else size_of(checkpoint)
    settings = {
        "seed": seed,
        "size": f"{width}x{height}",
        "steps": steps,
        "guidance": guidance,
        "sampler": sampler,
        "ema": ema,
        "dtype": name_of(compute_of(checkpoint, device, dtype).dtype),
    }
    _claim(run, suite, _origin(checkpoint) | settings)
    mine = [picture for picture in suite.pictures[rank::world] if not (run / picture.path).is_file()]
    print(f"{run}: {len(mine)} of {len(suite.pictures[rank::world])} pictures to draw", flush=True)
    if not mine:
        return
    pipeline = Pipeline.load(checkpoint, ema, trust or (), device, dtype)
    arguments = {"size": (width, height), "steps": steps, "guidance": guidance, "sampler": sampler}
    for batch in _batches(mine, batch_size):
        prompts = [picture.prompt for picture in batch for _ in range(picture.tiles)]
        seeds = [seed + picture.sample + i for picture in batch for i in range(picture.tiles)]
        images = iter(pipeline(prompts, seeds, batch_size=batch_size, **arguments))
        for picture in batch:
            image = tiled([next(images) for _ in range(picture.tiles)])
            save_image(image, run / picture.path, {"prompt": picture.prompt, "sample": picture.sample, **settings})
    print(f"{run}: done", flush=True)


def report(runs: list[str], out: str | None = None) -> None:
    """Print the scores of runs as Markdown tables, a table per benchmark, a column per task.

    Args:
        runs: folders with a scores.json.
        out: file to write the tables to as well.
    """
    found = {run: _read(Path(run) / SCORES, f"lidit score {run}") for run in runs}
    tables = []
    for name in dict.fromkeys(scores["name"] for scores in found.values()):
        rows = {run: scores for run, scores in found.items() if scores["name"] == name}
        tasks = list(dict.fromkeys(task for scores in rows.values() for task in scores["scores"]))
        lines = [f"| {name} | {' | '.join(tasks)} | images |", "| --- |" + " ---: |" * (len(tasks) + 1)]
        for run, scores in rows.items():
            cells = [f"{scores['scores'][task]:.4f}" if task in scores["scores"] else "" for task in tasks]
            lines.append(f"| {run} | {' | '.join(cells)} | {scores['images_scored']}/{scores['images_demanded']} |")
        tables.append("\n".join(lines))
    text = "\n\n".join(tables)
    print(text)
    if out is not None:
        Path(out).write_text(text + "\n")


def _batches(pictures: list[Picture], size: int) -> Iterator[list[Picture]]:
    """Pictures in groups of about `size` images, tiles counted."""
    count = max(1, size // pictures[0].tiles)
    return (pictures[i : i + count] for i in range(0, len(pictures), count))


def _claim(run: Path, suite: Suite, settings: dict) -> None:
    """Write the folder's provenance and lists of prompts, or refuse one that was begun otherwise."""
    asked = {"benchmark": suite.name, "prompts": _digest(suite), "sources": suite.sources, **settings}
    if (run / PROVENANCE).is_file():
        before = {"dtype": "float32"}  # earlier versions always drew in it, and did not say so
        then = before | _read(run / PROVENANCE, "lidit sample")
        if differ := [
            f"{key} was {then.get(key)!r} and is {asked[key]!r}" for key in asked if then.get(key) != asked[key]
        ]:
            raise BenchmarkError(f"{run} was begun otherwise ({'; '.join(differ)}); take another folder for --out")
        return
    if run.exists() and any(run.iterdir()):
        raise BenchmarkError(f"{run} holds files but no {PROVENANCE}; take a new folder for --out")
    for path, content in suite.files.items():
        write_text(run / path, content)
    about = {"pictures": len(suite.pictures), "seed_rule": "seed + number of the sample, for every prompt alike"}
    packages = ("lidit", "torch", "transformers", "diffusers")
    _write(run / PROVENANCE, asked | about | {"versions": {p: version(p) for p in packages}, "commit": commit()})


def _digest(suite: Suite) -> str:
    """SHA-256 of what is drawn."""
    return hashlib.sha256(json.dumps([asdict(p) for p in suite.pictures]).encode()).hexdigest()


def _origin(checkpoint: str) -> dict:
    """What was drawn with: the name given, and a hash that tells its weights from others."""
    path = place(checkpoint)
    return {"checkpoint": checkpoint, "weights": fingerprint(path / WEIGHTS if is_export(path) else path)}


def _benchmark_of(run: Path) -> str:
    return _read(run / PROVENANCE, "lidit sample --benchmark")["benchmark"]


def _read(path: Path, maker: str) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; `{maker}` writes it")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run `{maker}` again") from None


def _write(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
