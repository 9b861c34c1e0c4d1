"""`lidit doctor`: what is here, what is broken and what is missing for what, as tables to paste into an issue.

They name no user, no folder and no variable of the environment. Versions are read without importing anything, so that
a package that is missing or broken is a line of a table; torch alone is imported, since it knows the devices.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import warnings
from argparse import ArgumentError
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

from lidit import assets

GB = 1e9
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[[\w,-]+])?\s*(?P<range>[^;]*?)\s*(?P<extra>;.*\bextra\b.*)?(;.*)?")
FOLDERS = re.compile(r"(?<![\w./])(~|[A-Za-z]:)?([/\\][^/\\\s'\":;,()]+)+[/\\]")


@dataclass(frozen=True)
class Feature:
    """What lidit can do where there is more than it requires.

    Args:
        name: what it is.
        fix: how to get what it needs.
        packages: all of them are needed, by their names for pip.
        programs: one of them is needed, on PATH.
        gpu: a GPU is needed.
    """

    name: str
    fix: str
    packages: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    gpu: bool = False


FEATURES = [
    Feature("training on GPUs", "an NVIDIA GPU that `nvidia-smi` lists, and a torch built for CUDA", gpu=True),
    Feature("lidit launch slurm", "a login node of a cluster with Slurm", programs=("sbatch",)),
    Feature("shards at s3://", "`pip install s3fs`", packages=("s3fs",)),
    Feature("shards at gs://", "`pip install gcsfs`", packages=("gcsfs",)),
    Feature("collections in parquet", "`pip install 'lidit[parquet]'`", packages=("pyarrow",)),
    Feature("LLMs in int8", "`pip install 'lidit[llm8bit]'`", packages=("bitsandbytes", "accelerate")),
    Feature("lidit serve", "`pip install 'lidit[serve]'`", packages=("gradio",)),
    Feature("lidit study", "`pip install 'lidit[study]'`", packages=("starlette", "uvicorn")),
    Feature("FID with Inception", "`pip install 'lidit[fid]'`", packages=("torch-fidelity",)),
    Feature("noun phrases of T2I-CompBench by spaCy", "`pip install 'lidit[spacy]'`", packages=("spacy",)),
    Feature(
        "tests of pages in a browser",
        "`pip install playwright`, and the system's Chromium (Debian: `apt-get install chromium`)",
        packages=("playwright",),
        programs=("chromium", "chromium-browser", "google-chrome"),
    ),
]


def main(argv: list[str]) -> None:
    """`lidit doctor`, without jsonargparse: it may be what is missing."""
    if not argv:
        doctor()
    elif argv[0] in ("-h", "--help"):
        print("usage: lidit doctor\n\n" + (__doc__ or "").partition(": ")[2])
    else:
        raise ArgumentError(None, f"`lidit doctor` takes no argument, got {argv[0]!r}")


def doctor() -> None:
    """Print versions, devices, free disk, bundled parts and what is missing for what.

    Raises:
        ValueError: something that lidit requires is missing or broken.
    """
    ranges, required = requirements()
    devices, gpu, unusable = look_at_devices()
    packages = [(name, installed(name), ranges[name], state(name, ranges)) for name in required]
    parts = look_at_parts()
    show(("system", ""), look_at_system() + devices)
    show(("package", "installed", "needed", ""), packages)
    show(("bundled part", "files", ""), parts)
    show(("for", "needs", ""), [(f.name, needs(f), have(f, ranges, gpu)) for f in FEATURES])
    broken = [f"{name} is {said}: `pip install '{name}{range_}'`" for name, _, range_, said in packages if said != "ok"]
    broken += [f"bundled {name} {said}: install lidit again" for name, _, said in parts if said != "ok"]
    if problems := broken + unusable:
        raise ValueError("; ".join(problems))
    print("All that lidit requires is here.")


def requirements() -> tuple[dict[str, str], list[str]]:
    """The versions that lidit works with, by package, and which packages it requires; none if it is not installed."""
    ranges, required = {}, []
    for line in (metadata.requires("lidit") or []) if installed("lidit") else []:
        if found := REQUIREMENT.fullmatch(line):
            ranges[found["name"]] = found["range"]
            required += [] if found["extra"] else [found["name"]]
    return ranges, sorted(required)


def installed(name: str) -> str:
    """A package's version, empty if it is not here."""
    try:
        return metadata.version(name) or ""  # none where an installation broke off
    except metadata.PackageNotFoundError:
        return ""


def state(name: str, ranges: dict[str, str]) -> str:
    """`ok`, or what is wrong with a package."""
    version = installed(name)
    if not version:
        return "missing"
    if find_spec("packaging") is None:  # a line of its own says so
        return "ok"
    from packaging.specifiers import SpecifierSet

    return "ok" if SpecifierSet(ranges.get(name, "")).contains(version, prereleases=True) else f"not {ranges[name]}"


def look_at_system() -> list[tuple[str, ...]]:
    """Versions of what is no package, and free disk."""
    return [
        ("lidit", installed("lidit") or "run from a folder, not installed: what it requires is not known"),
        ("Python", platform.python_version()),
        ("platform", anonymous(platform.platform())),
        ("CPU cores", str(os.cpu_count())),
        ("free disk, this folder", f"{shutil.disk_usage('.').free / GB:.0f} GB"),
    ]


def look_at_devices() -> tuple[list[tuple[str, ...]], bool, list[str]]:
    """A line for each device, whether one is a GPU, and why torch cannot be used."""
    if not installed("torch"):
        return [("devices", "unknown without torch")], False, []
    with warnings.catch_warnings(record=True) as said:  # a warning's own line would name folders
        warnings.simplefilter("always")
        try:
            import torch

            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            gpus = [torch.cuda.get_device_properties(i) for i in range(count)]
        except Exception as error:  # a library is missing, a version is another, a driver is busy: all of it is told
            return [("devices", "unknown: torch cannot be used")], False, [f"torch cannot be used: {anonymous(error)}"]
    lines = [
        (f"GPU {i}", f"{gpu.name}, {gpu.total_memory / GB:.0f} GB, compute capability {gpu.major}.{gpu.minor}")
        for i, gpu in enumerate(gpus)
    ]
    built = f"torch {torch.__version__}, built for CUDA {torch.version.cuda or '(none)'}"
    lines = [("devices", built if gpus else f"{built}: CPU alone"), *lines]
    told = [anonymous(each.message) for each in said if each.category is UserWarning]
    return lines + [("torch says", text) for text in told], bool(gpus), []


def look_at_parts() -> list[tuple[str, ...]]:
    """A line for each bundled part: how many files it has, and which are not as they were bundled."""
    manifest = assets.ROOT / assets.CHECKSUMS
    if not manifest.is_file():
        return [(assets.CHECKSUMS, "0", "is missing")]
    expected, found = json.loads(manifest.read_text()), assets.checksums()
    parts: dict[str, list[str]] = {}
    for file in expected:
        parts.setdefault(file.partition("/")[0], []).append(file)
    wrong = {
        file: "differs" if file in found else "is missing" for file, sum_ in expected.items() if found.get(file) != sum_
    }
    return [
        (part, str(len(files)), ", ".join(f"{file} {wrong[file]}" for file in files if file in wrong) or "ok")
        for part, files in parts.items()
    ]


def needs(feature: Feature) -> str:
    """What a feature needs, with the versions that are here."""
    words = [f"{name} {installed(name)}".strip() for name in feature.packages]
    return ", ".join([*words, *([" or ".join(feature.programs)] if feature.programs else []), *["a GPU"] * feature.gpu])


def have(feature: Feature, ranges: dict[str, str], gpu: bool) -> str:
    """`ok`, or what is missing for a feature and how to get it."""
    missing = [f"{name} is {said}" for name in feature.packages if (said := state(name, ranges)) != "ok"]
    if feature.programs and not any(map(shutil.which, feature.programs)):
        missing.append(f"{feature.programs[0]} is not on PATH")
    if feature.gpu and not gpu:
        missing.append("no GPU")
    return f"{', '.join(missing)}: {feature.fix}" if missing else "ok"


def anonymous(said: object) -> str:
    """What something says, in a line, without the folders that it names."""
    line, home = " ".join(str(said).split()), os.path.expanduser("~")
    return FOLDERS.sub("", line.replace(home, "~") if len(home) > 1 else line)


def show(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table that is one in Markdown, too."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in (titles, tuple("-" * width for width in widths), *rows):
        print(f"| {' | '.join(word.ljust(width) for word, width in zip(row, widths, strict=True))} |")
    print()
