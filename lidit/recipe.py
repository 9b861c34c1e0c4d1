"""A recipe before it is parsed: keys of earlier versions are updated, and a preset is laid over it.

One rule decides: a preset overrides the recipe's files, and the command line overrides both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import Namespace, get_loader
from yaml import YAMLError

from lidit.models.older import updated
from lidit.models.variants.presets import CLASSES, Preset, settings

LLMS = "--model.llms"


def completed(argv: list[str]) -> tuple[list[str], str | None]:
    """The command line, with its recipes updated and followed by the preset's settings; and the preset's name.

    Args:
        argv: the command line after the verb.

    Raises:
        ValueError: there is no such preset, or it sets an argument that a part of the recipe does not have.
    """
    words, recipes, end = list(argv), [], 0
    for i, option, value in options(argv):
        if option == "--config" and (recipe := _read(value)) is not None:
            now, end = updated(recipe), i + 1
            recipes.append(now)
            if now != recipe:
                words[i] = f"--config={json.dumps(now)}" if argv[i].startswith("--config=") else json.dumps(now)
    given = [value for _, option, value in options(argv) if option == "--preset"]
    name = (given or [recipe.get("preset") for recipe in recipes if "preset" in recipe] or [None])[-1]
    if name in (None, "null"):
        return words, None
    model: dict[str, Any] = {}
    for recipe in recipes:
        model |= recipe.get("model") or {}
    preset = settings(name)
    for i, option, value in options(argv):
        if option.rstrip("+") == LLMS:
            named = json.dumps(_llms(name, preset, get_loader("yaml")(value), over=True))
            words[i] = f"{option}={named}" if argv[i].startswith(f"{option}=") else named
    return [*words[:end], "--config", json.dumps({"model": laid_over(name, preset, model)}), *words[end:]], name


def options(argv: list[str]) -> Iterator[tuple[int, str, str]]:
    """For each option with a value: the index of the word with the value, the option's name, and the value."""
    for i, word in enumerate(argv):
        option, equals, value = word.partition("=")
        if word.startswith("--") and equals:
            yield i, option, value
        elif word.startswith("--") and i + 1 < len(argv):
            yield i + 1, word, argv[i + 1]


def _read(config: str) -> dict[str, Any] | None:
    """The content of a recipe's file, or None if there is none or no recipe in it, which the parser then refuses."""
    path = Path(config)
    if not path.is_file():
        return None
    try:
        found = get_loader("yaml")(path.read_text())
    except YAMLError:
        return None
    return found if isinstance(found, dict) else None


def laid_over(name: str, preset: Preset, model: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recipe's model that a preset overrides.

    Args:
        name: the preset's name, for messages.
        preset: the preset's settings.
        model: the recipe's section `model`.

    Raises:
        ValueError: a part of the recipe is of a class that lacks what the preset sets.
    """
    over: dict[str, Any] = {}
    for part in ("prompt_encoder", "backbone"):
        kind, arguments = preset.part(part)
        there = (model.get(part) or {}).get("class_path")
        if there in map(path_of, CLASSES[part]):
            over[part] = {"class_path": path_of(kind), "init_args": arguments}
        elif there is not None and arguments:
            raise ValueError(
                f"preset {name} sets {next(iter(arguments))} of {path_of(kind)}, and the recipe's {part} is {there}; "
                f"name {path_of(CLASSES[part][0])} in the recipe, or leave out the preset"
            )
    if "llms" in model:
        over["llms"] = _llms(name, preset, model["llms"], over=False)
    return over


def _llms(name: str, preset: Preset, llms: Any, over: bool) -> Any:
    """LLMs with a preset's settings; anything but LLMs in lists or dicts is left for the parser to refuse."""
    if isinstance(llms, list):
        return [_llms(name, preset, llm, over) for llm in llms]
    if not isinstance(llms, dict):
        return llms
    kind, arguments = preset.part("llm")
    there = llms.get("class_path", path_of(CLASSES["llm"][0]))
    own = llms.get("init_args") or {} if "class_path" in llms else llms
    if there not in map(path_of, CLASSES["llm"]):
        if kind is not CLASSES["llm"][0]:
            raise ValueError(f"preset {name} sets levels of every LLM, and {there} in the recipe has none")
        kind, arguments = None, preset.llm
    elif not over:
        own = {key: value for key, value in own.items() if key != "levels"}
    merged = arguments | own if over else own | arguments
    return {"class_path": path_of(kind) if kind else there, "init_args": merged}


def path_of(kind: type) -> str:
    """A class's import path, as recipes name it."""
    return f"{kind.__module__}.{kind.__qualname__}"


def described(name: str, model: Namespace) -> str:
    """A sentence that lists what a preset, and the command line over it, have set in a recipe's model."""
    preset, placed = settings(name), []
    parts = [("prompt_encoder", model.prompt_encoder), ("backbone", model.backbone)]
    for part, given in [*parts, *(("llm", llm) for llm in model.llms)]:
        for key, value in preset.part(part)[1].items():
            now = given.init_args.get(key)
            placed.append(f"{key}={now}{'' if now == value else ' (as on the command line)'}")
    return f"Preset {name} ({preset.source}): {', '.join(dict.fromkeys(placed))}."
