"""How fast data loads, against plain webdataset, ImageFolder and decoding alone; and how fast a run resumes.

All loaders give the same: shuffled batches of uint8 images (b 3 H W) and captions, from the same JPEG bytes,
decoded by Pillow; or float32 latents and padded features. They are timed in turn, for several rounds, and compared
within this one run. Decoding alone is one process that decodes the same bytes from memory in a loop. Nothing else
should run on the machine meanwhile; its load is recorded.

    python -m experiments.speed_data run --out experiments/results/speed_data.json
"""

from __future__ import annotations

import io
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import PILToTensor

from experiments.cards import versions
from experiments.speed_files import LATENT, SHARDS, computed, npy, photo, write_cache, write_shards
from lidit.data.datamodule import ShardData
from lidit.data.index import ShardIndex

PACKAGES = ("torch", "torchvision", "pillow", "numpy", "webdataset", "lightning", "safetensors")
DECODING, LIDIT, WEBDATASET, FOLDER = "decoding alone", "lidit", "webdataset", "ImageFolder"
Row = dict[str, float | int | str]
Makers = dict[tuple[str, int], Callable[[], Iterable]]  # by loader and number of workers


def run(
    out: str,
    samples: int = 4000,
    cached_samples: int = 800,
    batch_size: int = 50,
    repeats: int = 5,
    workers: tuple[int, ...] = (0, 1, 2),
    pixels: int = 256,
    resumed_shards: int = 10_000,
    shard_size: int = 1000,
    position: int = 1_000_000,
) -> None:
    """Measure everything, print a table and write it as JSON.

    Args:
        out: JSON file to write.
        samples: JPEGs that are read in a timing.
        cached_samples: samples with latents and features that are read in a timing.
        batch_size: samples in a batch.
        repeats: timings of each loader, of which the median counts.
        workers: numbers of worker processes.
        pixels: width and height of the JPEGs.
        resumed_shards: number of shards of the set that is resumed.
        shard_size: samples in each of these shards.
        position: number of batches that the resumed run has done before.
    """
    settings, at_start = dict(locals()), machine()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="lidit-speed-") as name:
        folder = Path(name)
        jpegs = [photo(i, pixels) for i in range(samples)]
        rows = rounds("JPEG", of_images(folder, jpegs, batch_size, workers), samples // batch_size, batch_size, repeats)
        makers = of_caches(folder, cached_samples, batch_size, workers)
        rows += rounds("latents and features", makers, cached_samples // batch_size, batch_size, repeats)
        resumed = resuming(folder / "large", resumed_shards, shard_size, position)
    found = {"machine": at_start, "versions": versions(*PACKAGES), "settings": settings, "loading": rows}
    found |= {"resuming": resumed, "reached": reached(rows, resumed)}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(found, indent=1) + "\n")
    print(table(rows, resumed))


def of_images(folder: Path, jpegs: list[bytes], batch_size: int, workers: tuple[int, ...]) -> Makers:
    """Loaders of the same JPEGs."""
    shards, files = folder / "images", folder / "files"
    write_shards(shards, [{"jpg": jpeg} for jpeg in jpegs])
    (files / "all").mkdir(parents=True)
    for i, jpeg in enumerate(jpegs):
        (files / "all" / f"{i:08d}.jpg").write_bytes(jpeg)
    makers: Makers = {(DECODING, 0): lambda: decoding(jpegs, batch_size)}
    for count in workers:
        makers[LIDIT, count] = lambda count=count: lidit(shards, batch_size, count)
        makers[WEBDATASET, count] = lambda count=count: plain_webdataset(shards, batch_size, count, pictures)
        makers[FOLDER, count] = lambda count=count: image_folder(files, batch_size, count)
    return makers


def of_caches(folder: Path, samples: int, batch_size: int, workers: tuple[int, ...]) -> Makers:
    """Loaders of the same latents and features: from a cache beside the shards, or from npy files in tars."""
    shards, arrays, cache = folder / "captions", folder / "arrays", folder / "cache"
    write_shards(shards, [{"jpg": photo(0, 8 * LATENT[1])}] * samples)
    index = ShardIndex(str(shards))
    write_cache(cache, index)
    rows = [computed(i) for i in range(samples)]
    write_shards(arrays, [{"latent.npy": npy(latent), "tokens.npy": npy(tokens)} for latent, tokens in rows])
    makers: Makers = {}
    for count in workers:
        makers[LIDIT, count] = lambda count=count: lidit(shards, batch_size, count, str(cache))
        makers[WEBDATASET, count] = lambda count=count: plain_webdataset(arrays, batch_size, count, features)
    return makers


def rounds(what: str, makers: Makers, batches: int, batch_size: int, repeats: int) -> list[Row]:
    """Time all loaders in turn, `repeats` times; of each loader the median counts."""
    rates: dict[tuple[str, int], list[float]] = {key: [] for key in makers}
    for _, (key, make) in itertools.product(range(repeats), makers.items()):
        rates[key].append(rate(make(), batches, batch_size))
    return [
        {"what": what, "loader": loader, "workers": count, "samples_per_second": statistics.median(measured)}
        | {"slowest": min(measured), "fastest": max(measured)}
        for (loader, count), measured in rates.items()
    ]


def rate(loader: Iterable, batches: int, batch_size: int) -> float:
    """Samples per second over about one pass, measured after the first batch."""
    iterator = iter(loader)
    next(iterator)
    start = time.perf_counter()
    seen = sum(1 for _ in itertools.islice(iterator, batches - 1))
    return seen * batch_size / (time.perf_counter() - start)


def decoding(jpegs: list[bytes], batch_size: int) -> Iterator[list[np.ndarray]]:
    """Only decode JPEGs from memory, in one process."""
    for first in range(0, len(jpegs), batch_size):
        yield [np.array(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in jpegs[first : first + batch_size]]


def lidit(shards: Path, batch_size: int, workers: int, cache: str | None = None) -> Iterable:
    """This project's loader."""
    data = ShardData(
        str(shards), None, None, batch_size, workers, cache=cache, dense_probability=0.0, caption_dropout=0.0
    )
    data.setup("fit")
    return data.train_dataloader()


def plain_webdataset(shards: Path, batch_size: int, workers: int, collate: Callable) -> Iterable:
    """Webdataset as its documentation begins: shards and a buffer are shuffled; workers decode and batch."""
    names = [str(path) for path in sorted(shards.glob("*.tar"))]
    dataset = webdataset.WebDataset(names, shardshuffle=len(names), seed=0).shuffle(500).decode("pil").repeat()
    dataset = dataset.batched(batch_size, collation_fn=collate)
    return webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)


def pictures(samples: list[dict]) -> tuple[Tensor, list[str]]:
    """A batch of images and captions."""
    pixels = torch.from_numpy(np.stack([np.array(sample["jpg"]) for sample in samples])).permute(0, 3, 1, 2)
    return pixels, [sample["json"]["caption"] for sample in samples]


def features(samples: list[dict]) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """A batch of latents, padded tokens, their mask and captions."""
    latents = torch.from_numpy(np.stack([sample["latent.npy"] for sample in samples])).float()
    tokens = [torch.from_numpy(sample["tokens.npy"]) for sample in samples]
    lengths = torch.tensor([len(each) for each in tokens])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return latents, pad_sequence(tokens, batch_first=True), mask, [sample["json"]["caption"] for sample in samples]


def image_folder(folder: Path, batch_size: int, workers: int) -> Iterable:
    """Torchvision's loader of single files, shuffled; it has no captions to read."""
    return DataLoader(ImageFolder(str(folder), PILToTensor()), batch_size, shuffle=True, num_workers=workers)


def resuming(folder: Path, shards: int, shard_size: int, position: int) -> Row:
    """Resume a large set in new processes: the first reads every index, the second the cache that the first wrote."""
    names = [f"{i:05d}" for i in range(shards)]
    write_shards(folder / "one", [{"jpg": photo(0, 64)}] * (shard_size * SHARDS))
    (folder / "all").mkdir()
    for name, end in itertools.product(names, (".tar", ".index.npz")):  # all link to one shard; only reading counts
        (folder / "all" / f"{name}{end}").symlink_to(folder / "one" / f"00000{end}")
    command = [sys.executable, "-m", "experiments.speed_data", "resume", "--shards", str(folder / "all")]
    command += ["--kept", str(folder / "kept"), "--position", str(position)]
    first, second = (json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(2))
    return second | {f"first_start_{name}": first[name] for name in ("seconds", "peak_gb")}


def resume(shards: str, kept: str, position: int, batch_size: int = 128) -> None:
    """Print how long it takes to read the batch at a position, and the most memory that it takes.

    Args:
        shards: shards as for `ShardData`.
        kept: the argument `shard_cache` of `ShardData`.
        position: number of batches before the one that is read.
        batch_size: samples in a batch.
    """
    imported, start = peak(), time.perf_counter()
    data = ShardData(shards, batch_size=batch_size, shard_cache=kept)
    data.setup("fit")
    data.load_state_dict(data.state_dict() | {"batches": position})
    next(iter(data.train_dataloader()))
    seconds, samples = time.perf_counter() - start, len(data.train_samples.index)
    print(
        json.dumps(
            {"samples": samples, "position": position, "seconds": seconds, "imports_gb": imported, "peak_gb": peak()}
        )
    )


def peak() -> float:
    """The most memory that this process has had, in 10^9 bytes, including mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()  # a child process inherits the maximum of getrusage
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM"))


def machine() -> dict[str, object]:
    """The machine that is measured on, and how busy it is."""
    cpus = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return {"cpu": cpus[0] if cpus else platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]} | {
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def ratios(rows: list[Row]) -> list[dict[str, float | None]]:
    """Each row's rate divided by that of decoding alone, and by webdataset's with as many workers."""
    rates = {(row["what"], row["loader"], row["workers"]): row["samples_per_second"] for row in rows}
    pairs = []
    for row in rows:
        others = (rates.get((row["what"], DECODING, 0)), rates.get((row["what"], WEBDATASET, row["workers"])))
        pairs.append([row["samples_per_second"] / other if other else None for other in others])
    return [dict(zip(("decoding", "webdataset"), pair, strict=True)) for pair in pairs]


def reached(rows: list[Row], resumed: Row) -> dict[str, bool]:
    """Which of the aims are reached."""
    mine = [(row, ratio) for row, ratio in zip(rows, ratios(rows), strict=True) if row["loader"] == LIDIT]
    beside_imports = resumed["peak_gb"] - resumed["imports_gb"]
    alone = [ratio["decoding"] for row, ratio in mine if not row["workers"] and ratio["decoding"]]
    return {
        "0.9 of decoding alone in one process": min(alone, default=0.0) >= 0.9,
        "no slower than webdataset anywhere": all(ratio["webdataset"] >= 1 for _, ratio in mine),
        "resumed in 5 s": resumed["seconds"] < 5,
        "resumed in 1 GB beside what importing torch and lightning takes": beside_imports < 1,
    }


def table(rows: list[Row], resumed: Row) -> str:
    """All results as Markdown."""
    lines = ["| what | loader | workers | samples/s | of decoding | of webdataset |", "|---|---|---|---|---|---|"]
    for row, ratio in zip(rows, ratios(rows), strict=True):
        against = " | ".join("" if value is None else f"{value:.2f}" for value in ratio.values())
        lines.append(
            f"| {row['what']} | {row['loader']} | {row['workers']} | {row['samples_per_second']:.0f} | {against} |"
        )
    lines += ["", "| samples | position | start | seconds | peak GB | of it imports |", "|---|---|---|---|---|---|"]
    for start, name in (("first", "first_start_"), ("resumed", "")):
        took = f"{resumed[f'{name}seconds']:.1f} | {resumed[f'{name}peak_gb']:.2f} | {resumed['imports_gb']:.2f}"
        lines.append(f"| {resumed['samples']} | {resumed['position']} | {start} | {took} |")
    aims = [f"{aim}: {'yes' if met else 'no'}" for aim, met in reached(rows, resumed).items()]
    return "\n".join([*lines, "", *aims])


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli({"run": run, "resume": resume}, as_positional=False)
