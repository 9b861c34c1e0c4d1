"""A recipe before it is parsed: keys of earlier versions are brought up to date, and a preset is laid over it.

One rule decides which setting is used: the recipe's files, over them the preset, over both the command line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, get_loader

from lidit.models.older import full_path, updated
from lidit.models.variants.presets import CLASSES, Preset, settings

CONFIGS = ("--config", "-c")  # options whose value is a recipe
LLMS = "--model.llms"
Option = tuple[list[str], str, str]  # the words on the command line, the option's name, its value


def completed(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """The command line with its recipes up to date and the preset's settings behind them; and the preset's name.

    Args:
        argv: the words after the verb.

    Raises:
        ValueError: there is no such preset, or it sets what a part of the recipe does not have.
    """
    options = list(_options(argv))
    recipes = {i: _read(value) for i, (_, option, value) in enumerate(options) if option in CONFIGS}
    now = {i: dict(updated(recipe)) for i, recipe in recipes.items() if recipe is not None}
    named = [_loaded(value) for _, option, value in options if option == "--preset"]
    named = named or [recipe["preset"] for recipe in now.values() if "preset" in recipe]
    if any(option.startswith("--model.prompt_encoder") and option.endswith(".preset") for _, option, _ in options):
        raise ValueError("a preset is a setting of the recipe: say --preset NAME")
    for recipe in now.values():
        recipe.pop("preset", None)  # its settings take its place
    for i, recipe in now.items():
        if recipe != recipes[i]:
            options[i] = (["--config", yaml.safe_dump(recipe, sort_keys=False)], "--config", "")
    if not named or named[-1] is None:
        return [word for words, option, _ in options if option != "--preset" for word in words], None
    name = str(named[-1])
    model: dict[str, Any] = {}
    for recipe in now.values():
        model = _merged(model, recipe.get("model") or {})
    preset = settings(name)
    over = yaml.safe_dump({"model": laid_over(name, preset, model)}, sort_keys=False)
    files = [word for words, option, _ in options if option in CONFIGS or option == "--model" for word in words]
    others = [_with_preset(name, preset, each) for each in options if each[1] not in (*CONFIGS, "--model", "--preset")]
    return [*files, "--config", over, *(word for words in others for word in words)], name


def _options(argv: Sequence[str]) -> Iterator[Option]:
    """The command line's options, each with the words it is made of; other words are options without a name."""
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if equals or not word.startswith("-") or word in ("-h", "--help", "--print_config"):
            yield [word], option, value
            continue
        value = next(words, None)
        yield [word] if value is None else [word, value], word, value or ""


def _read(config: str) -> dict[str, Any] | None:
    """A recipe, from a file or as text; None: the parser will say what is wrong with it.

    Other files that it names are read, or named by their whole path, since the recipe may be handed on as text.
    """
    try:
        path = Path(config)
        inside = path.is_file()
        found = _loaded(path.read_text() if inside else config)
    except (OSError, UnicodeDecodeError):
        return None
    if not isinstance(found, dict):
        return None
    for key, value in found.items() if inside else ():
        if isinstance(value, str) and key != "preset" and (path.parent / value).is_file():
            found[key] = _read(str(path.parent / value)) if key == "model" else str((path.parent / value).absolute())
    return found


def _loaded(text: str) -> Any:
    """YAML as the parser reads it; text that is none as it is, for the parser to refuse."""
    try:
        return get_loader("yaml")(text)
    except yaml.YAMLError:
        return text


def _merged(below: dict[str, Any], above: Any) -> dict[str, Any]:
    """Settings with others over them, as the parser lays one recipe over another."""
    if not isinstance(above, dict):
        return below
    merged = dict(below)
    for key, value in above.items():
        if key.endswith("+"):
            merged[key[:-1]] = [*merged.get(key[:-1], []), *(value if isinstance(value, list) else [value])]
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = value
    return merged


def _with_preset(name: str, preset: Preset, option: Option) -> list[str]:
    """An option's words; LLMs named on the command line are read as the preset says, but for what they name."""
    words, key, value = option
    if key.rstrip("+") != LLMS:
        return words
    llms = _loaded(value)
    return [key, yaml.safe_dump(_llms(name, preset, llms, over=True))] if isinstance(llms, list | dict) else words


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
        there = full_path(model[part].get("class_path") if isinstance(model.get(part), dict) else model.get(part))
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
    there = full_path(llms.get("class_path", path_of(CLASSES["llm"][0])))
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
