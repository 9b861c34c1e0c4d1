"""Recipes, checkpoints and exports of earlier versions: what their classes and keys are called today.

Class paths and arguments are a public format. When one is renamed or dropped, a line in a table here lets files of
earlier versions still load.
"""

from __future__ import annotations

import copy
from typing import Any

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
LLM = "lidit.models.llm.FrozenLLM"  # the class of an LLM that a recipe gives without one


def updated(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe of any version, as this version writes it; one that needs no change comes back equal.

    Args:
        recipe: the content of a recipe's file.
    """
    if not isinstance(recipe.get("model"), dict):
        return recipe
    recipe = copy.deepcopy(recipe)
    encoder = recipe["model"].get("prompt_encoder")
    if isinstance(encoder, dict) and isinstance(encoder.get("init_args"), dict):
        preset = encoder["init_args"].pop("preset", None)  # now a key of the recipe
        recipe |= {"preset": preset} if preset else {}
    recipe["model"] = updated_model(recipe["model"])
    return recipe


def updated_model(model: dict[str, Any]) -> dict[str, Any]:
    """A model's settings of any version, as checkpoints and exports hold them, as this version writes them."""
    model = copy.deepcopy(model)
    for name in ("prompt_encoder", "backbone"):
        if name in model:
            model[name] = _moved(model[name])
    if isinstance(model.get("llms"), list):
        model["llms"] = [_moved(llm, LLM) for llm in model["llms"]]
    encoder, backbone = _arguments(model.get("prompt_encoder")), model.get("backbone")
    if encoder.get("mix") == "per_block" and isinstance(backbone, dict):  # then no setting of the backbone
        levels = {"levels": encoder["levels"]}
        path, _ = MOVED.get(backbone.get("class_path", ""), (backbone.get("class_path"), {}))
        model["backbone"] = backbone | {"class_path": path, "init_args": levels | _arguments(backbone)}
    return model


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
    kind, arguments = (otherwise, part) if short else (part["class_path"], _arguments(part))
    if kind not in MOVED:
        return part
    variant, moved = MOVED[kind]
    arguments = {key: value for key, value in arguments.items() if key != "preset"}
    if any(arguments[key] not in values for key, values in moved.items() if key in arguments):
        return {"class_path": variant, "init_args": arguments}
    left = {key: value for key, value in arguments.items() if key not in moved or key in STAYED}
    if short:
        return left
    return {**part, "init_args": left} if "init_args" in part else part
