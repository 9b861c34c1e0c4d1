"""A recipe with small sizes, and nothing else of it changed: what a rehearsal plays.

The rule: widths, heads and depths of prompt encoder and backbone; frozen models (`tiny.py`); the number of ranks, where
the shape of the mesh stays; batch, steps, intervals, pictures and workers become few. Every other key stays.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lidit.assets import PREFIX
from lidit.models.llm import FrozenLLM
from lidit.rehearsal.tiny import tiny

STEPS, VALIDATE, DRAW, STOP, SAVE = 6, 2, 3, 4, 5  # optimizer steps: all, and after which of them what happens
WIDTH, HEADS, DEPTH, PIXELS = 64, 4, 2, 64
SIZES = {
    WIDTH: ("width", "hidden_size", "dim", "d_model", "embed_dim"),
    HEADS: ("heads", "num_heads", "n_heads", "num_attention_heads"),
    DEPTH: ("depth", "layers", "num_layers", "n_layers", "num_hidden_layers", "refiner_depth"),
}
FEW = {"warmup_batches": 1, "count_per_task": 1, "every_n_train_steps": SAVE}  # in callbacks
FEW_BYTES = 100e6  # weights of a frozen model in a folder that are small enough
MEMINFO = Path("/proc/meminfo")
Recipe = dict[str, Any]


@dataclass(frozen=True)
class Ranks:
    """The processes of a rehearsal: copies of the model times the ranks that share a copy.

    Args:
        copies: of the weights; DDP has one on each rank.
        each: ranks of a copy.
    """

    copies: int
    each: int

    @property
    def all(self) -> int:
        """The number of processes."""
        return self.copies * self.each

    def within(self, gpus: int) -> Ranks:
        """As many of them as there are GPUs; 0: all of them, on CPU cores."""
        each = min(self.each, gpus) if gpus else self.each
        return Ranks(min(self.copies, gpus // each), each) if gpus else self


def ranks_of(trainer: Recipe) -> Ranks:
    """Two copies where the recipe has several, two ranks a copy where it shares one; one rank where it has one."""
    devices = trainer["devices"]
    one = str(devices) == "1" or (isinstance(devices, list) and len(devices) == 1)
    several = (trainer["num_nodes"] or 1) > 1 or not one
    strategy = trainer["strategy"]
    path = strategy["class_path"] if isinstance(strategy, dict) else str(strategy)
    if not several:
        return Ranks(1, 1)
    if path.rpartition(".")[2].lower() != "sharded":
        return Ranks(2, 1)
    copies = strategy["init_args"].get("replicate", 1) if isinstance(strategy, dict) else 1
    return Ranks(2 if copies > 1 else 1, 2)


def small(recipe: Recipe, folder: Path, pixels: int, gpus: int = 0) -> Recipe:
    """The recipe with small sizes; tiny frozen models are written into the folder.

    Args:
        recipe: whole, with its defaults.
        folder: of the rehearsal.
        pixels: side of the recipe's pictures.
        gpus: GPUs to play it on; 0: CPU cores.

    Raises:
        FileNotFoundError: the sizes of a frozen model are not known here.
        ValueError: a part of the recipe cannot be made small.
    """
    made = {key: value for key, value in recipe.items() if key not in ("run", "resume", "ckpt_path", "start_from")}
    made = {key: value for key, value in made.items() if key != "start_part"}
    ranks = ranks_of(recipe["trainer"]).within(gpus)
    made["model"] = _model(recipe["model"], folder / "models", pixels)
    made["trainer"] = _trainer(recipe["trainer"], ranks, bool(gpus)) | {"accelerator": "gpu" if gpus else "cpu"}
    made["data"] = _data(recipe["data"], ranks, folder)
    made["parallel"] = recipe["parallel"] | {"checkpoint_every": min(recipe["parallel"]["checkpoint_every"], DEPTH)}
    if recipe["parallel"]["compile_backend"] == "inductor" and not gpus:
        made["parallel"]["compile_backend"] = "eager"  # it traces as inductor does, and makes no kernels
    return made


def _model(model: Recipe, folder: Path, pixels: int) -> Recipe:
    made = _with_tiny_models(model, folder)
    text_width = _text_width(made["llms"])
    for part in ("prompt_encoder", "backbone"):
        made[part] = _part(made[part], text_width)
    if made["warmup_steps"]:
        made["warmup_steps"] = min(made["warmup_steps"], DEPTH)
    arguments = made["objective"].get("init_args", {})
    if "base_size" in arguments:  # so that a picture's times are shifted as the large one's are
        base = max(1, arguments["base_size"] * PIXELS // pixels)
        made["objective"] = made["objective"] | {"init_args": arguments | {"base_size": base}}
    return made


def _with_tiny_models(value: Any, folder: Path) -> Any:
    """A part of the recipe in which every frozen model is a tiny one."""
    if isinstance(value, list):
        return [_with_tiny_models(each, folder) for each in value]
    if not isinstance(value, dict):
        return value
    if not isinstance(value.get("name"), str) or _is_small(value["name"]):
        return {key: _with_tiny_models(each, folder) for key, each in value.items()}
    name, subfolder, revision = value["name"], value.get("subfolder"), value.get("revision")
    place = folder / f"{name.strip('/').replace('/', '--')}{'@' + revision if revision else ''}"
    made = {"name": str(tiny(name, subfolder, revision, place)), "revision": None}
    if value.get("dtype") == "int8":  # bitsandbytes
        made["dtype"] = "bfloat16"
    return value | {key: each for key, each in made.items() if key in value}


def _is_small(name: str) -> bool:
    """Whether a frozen model is small enough to be played with as it is."""
    if name.startswith(PREFIX):
        return True
    weights = [file for pattern in ("*.safetensors", "*.bin") for file in Path(name).expanduser().rglob(pattern)]
    return Path(name).expanduser().is_dir() and sum(file.stat().st_size for file in weights) < FEW_BYTES


def _text_width(llms: list[Recipe]) -> int | None:
    """The width of the first LLM, for the part of a model that names it."""
    own = llms[0].get("init_args", llms[0])
    return FrozenLLM(own["name"]).width if "name" in own else None


def _part(part: Recipe, text_width: int | None) -> Recipe:
    """A prompt encoder or a backbone with small sizes, as its arguments name them."""
    arguments = dict(part.get("init_args") or {})
    for size, names in SIZES.items():
        arguments |= {key: min(arguments[key], size) for key in names if isinstance(arguments.get(key), int)}
    if "text_width" in arguments and text_width:
        arguments["text_width"] = text_width
    return part | {"init_args": arguments}


def _trainer(trainer: Recipe, ranks: Ranks, on_gpus: bool) -> Recipe:
    passes = min(trainer["accumulate_grad_batches"], 2)
    made = trainer | {
        "num_nodes": 1,
        "devices": ranks.all,
        "max_steps": STEPS,
        "accumulate_grad_batches": passes,
        "val_check_interval": VALIDATE * passes,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "max_time": None,
        "enable_checkpointing": True,  # the rehearsal stops it, and goes on
    }
    if trainer["limit_val_batches"] is None or trainer["limit_val_batches"] > 1:
        made["limit_val_batches"] = 2
    if isinstance(trainer["strategy"], dict) and "replicate" in trainer["strategy"].get("init_args", {}):
        inside = trainer["strategy"]["init_args"] | {"replicate": ranks.copies}
        made["strategy"] = trainer["strategy"] | {"init_args": inside}
    made["callbacks"] = [_callback(callback, on_gpus) for callback in trainer["callbacks"] or []]
    return made


def _callback(callback: Recipe, on_gpus: bool) -> Recipe:
    """A callback that acts often, on few small pictures."""
    name, known = callback["class_path"].rpartition(".")[2], callback.get("init_args") or {}
    found = known | (callback.get("dict_kwargs") or {})
    draws = "prompts" in found or "prompt_sets" in found or "count_per_task" in found
    few = FEW | {"every_n_steps": DRAW if draws else SAVE if name == "Checkpoints" else 1}
    made = {key: min(value, few[key]) for key, value in found.items() if key in few and isinstance(value, int)}
    if "prompts" in found:
        made["prompts"] = found["prompts"][:2]
    if "prompt_sets" in found:
        made["prompt_sets"] = {which: prompts[:2] for which, prompts in found["prompt_sets"].items()}
    if not str(found.get("pretrained", PREFIX)).startswith(PREFIX):
        made["pretrained"] = PREFIX + ("siglip" if "SigLIP" in name else "clip")
    here = {"size": None} if on_gpus else {"size": None, "device": "cpu"}
    made |= {key: value for key, value in here.items() if key in found}
    made |= {"steps": 2, "batch_size": 2} if draws else {}
    more = (callback.get("dict_kwargs") or {}) | {key: value for key, value in made.items() if key not in known}
    inside = known | {key: value for key, value in made.items() if key in known}
    return callback | {"init_args": inside} | ({"dict_kwargs": more} if more else {})


def _data(data: Recipe, ranks: Ranks, folder: Path) -> Recipe:
    made = data | {"batch_size": 2 * ranks.all, "num_workers": min(data["num_workers"], 1)}
    if data["shuffle_window"]:
        made["shuffle_window"] = min(data["shuffle_window"], 2)
    if data["shard_cache"]:
        made["shard_cache"] = str(folder / "shard_cache")
    return made


def changes(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """A line for each key of a recipe that another has otherwise."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before:
            if key in after:
                yield from changes(before[key], after[key], f"{place}.{key}" if place else key)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from changes(one, other, f"{place}[{i}]")
    elif before != after:
        yield f"{place}: {_short(before)} -> {_short(after)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def shapes(unit: int, known: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sizes (width, height) of the rehearsal's pictures: of the recipe's aspects where its data is here.

    Args:
        unit: pixels of a patch of the latent.
        known: sizes of the recipe's own pictures.
    """
    n = max(1, PIXELS // unit)
    if not known:
        return [(n * unit, n * unit), ((n + 1) * unit, max(1, n - 1) * unit), (max(1, n - 1) * unit, (n + 1) * unit)]
    found = []
    for width, height in known:
        scale = n * unit / math.sqrt(width * height)
        found.append((max(1, round(width * scale / unit)) * unit, max(1, round(height * scale / unit)) * unit))
    return list(dict.fromkeys(found))[:3]


def check_room(folder: Path, disk: float, memory: float) -> None:
    """See that there are disk and memory for a rehearsal.

    Args:
        folder: where it writes.
        disk: bytes needed.
        memory: bytes needed.

    Raises:
        ValueError: there is too little of one.
    """
    free = shutil.disk_usage(folder).free
    if free < disk:
        raise ValueError(
            f"a rehearsal needs {disk / 1e9:.1f} GB of disk, and {folder} has {free / 1e9:.1f}; use --keep"
        )
    if not MEMINFO.exists():  # not Linux
        return
    lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
    available = 1024 * int(lines["MemAvailable"].split()[0])
    if available < memory:
        raise ValueError(
            f"a rehearsal needs {memory / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are free: end others"
        )
