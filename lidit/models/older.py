"""Recipes, checkpoints and exports of earlier versions: what their classes and keys are called today.

Class paths and arguments are a public format. When one is renamed or dropped, a line in a table here lets files of
earlier versions still load.
"""

from __future__ import annotations

import copy
from typing import Any

from lidit.models.variants.presets import ABOUT, CLASSES, settings

VARIANTS = "lidit.models.variants"
# until 0.1.0 these classes had arguments of other systems: the class that has them now, and their values for LI-DiT
MOVED: dict[str, tuple[str, dict[str, list[Any]]]] = {
    "lidit.models.llm.FrozenLLM": (f"{VARIANTS}.llm.MultiLevelLLM", {"levels": [1]}),
    "lidit.models.prompt_encoder.PromptEncoder": (
        f"{VARIANTS}.encoder.VariantEncoder",
        {
            "truncate": ["after"],
            "positions": [False],
            "pool": ["linear"],
            "levels": [1],
            "mix": ["together"],
            "gating": [True, False],
        },
    ),
    "lidit.models.lidit.LIDiT": (f"{VARIANTS}.backbone.VariantLIDiT", {"text_scale": [1.0]}),
}
STAYED = {"gating"}  # still an argument of the class it was moved from, with fewer values
BACKBONE = "lidit.models.lidit.LIDiT"
LLM = "lidit.models.llm.FrozenLLM"  # the class of an LLM that a recipe gives without one


def updated(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe of any version, as this version writes it; one that needs no change comes back equal.

    Args:
        recipe: the content of a recipe's file.
    """
    if not isinstance(recipe.get("model"), dict):
        return recipe
    preset = _arguments(recipe["model"].get("prompt_encoder")).get("preset")
    model = updated_model(recipe["model"])
    return recipe | {"model": _with_preset(preset, model) if isinstance(preset, str) else model}


def updated_model(model: dict[str, Any]) -> dict[str, Any]:
    """A model's settings of any version, as checkpoints and exports hold them, as this version writes them."""
    model = copy.deepcopy(model)
    for name in ("prompt_encoder", "backbone"):
        if name in model:
            model[name] = _moved(model[name])
    if isinstance(model.get("llms"), list):
        model["llms"] = [_moved(llm, LLM) for llm in model["llms"]]
    encoder, backbone = _arguments(model.get("prompt_encoder")), model.get("backbone")
    levels = encoder.get("levels", 1)
    if encoder.get("mix") == "per_block" and levels != 1 and _class_of(backbone) == BACKBONE:  # it was not told
        model["backbone"] = backbone | {
            "class_path": MOVED[BACKBONE][0],
            "init_args": {"levels": levels} | _arguments(backbone),
        }
    return model


def _with_preset(name: str, model: dict[str, Any]) -> dict[str, Any]:
    """A model whose preset stood among the encoder's arguments: it left alone what differed from its default.

    Raises:
        ValueError: there is no such preset.
    """
    preset = settings(name)

    def laid(part: str, given: Any) -> Any:
        kind, arguments = preset.part(part)
        if not isinstance(given, dict):
            return given
        own = _arguments(given) if "class_path" in given else given
        defaults = ABOUT[part][0] | ABOUT[part][1]
        stays = {key: value for key, value in own.items() if key in defaults and value != defaults[key]}
        kind = CLASSES[part][1] if stays.keys() & ABOUT[part][1].keys() else kind
        return {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": own | arguments | stays}

    laid_over = {part: laid(part, model.get(part)) for part in ("prompt_encoder", "backbone") if part in model}
    llms = [laid("llm", llm) for llm in model["llms"]] if isinstance(model.get("llms"), list) else model.get("llms")
    return model | laid_over | ({"llms": llms} if "llms" in model else {})


def full_path(kind: Any) -> Any:
    """A class's import path; the parser also knows some classes by their names alone."""
    names = {path.rpartition(".")[2]: path for path in (*MOVED, *(variant for variant, _ in MOVED.values()))}
    return names.get(kind, kind) if isinstance(kind, str) else kind


def _class_of(part: Any) -> Any:
    return full_path(part.get("class_path")) if isinstance(part, dict) else None


def _arguments(part: Any) -> dict[str, Any]:
    given = part.get("init_args") if isinstance(part, dict) else None
    return given if isinstance(given, dict) else {}


def _moved(part: Any, otherwise: str = "") -> Any:
    """A part without the arguments that its class has lost, or of the class that has them if their values matter.

    Args:
        part: `{class_path, init_args}`, or the arguments alone.
        otherwise: the part's class if it names none.
    """
    if not isinstance(part, dict):
        return part
    short = "class_path" not in part
    kind, arguments = (otherwise, part) if short else (_class_of(part), _arguments(part))
    if not isinstance(kind, str) or kind not in MOVED:
        return part
    variant, moved = MOVED[kind]
    arguments = {key: value for key, value in arguments.items() if key != "preset"}
    if any(arguments[key] not in values for key, values in moved.items() if key in arguments):
        return {"class_path": variant, "init_args": arguments}
    left = {key: value for key, value in arguments.items() if key not in moved or key in STAYED}
    if short:
        return left
    return {**part, "init_args": left} if "init_args" in part else part
