"""What the settings of a stranger's checkpoint may name: classes of lidit, and of modules that the user trusts.

A recipe is its user's own code. The settings in a checkpoint may be anyone's, and to import a module is to run it, so
they are checked in full before anything in them is resolved.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from torch import nn

from lidit.models.llm import FrozenLLM
from lidit.models.vae import FrozenVAE

PARTS: dict[str, type] = {  # what the class of each part must be
    "llms": FrozenLLM,
    "vae": FrozenVAE,
    "prompt_encoder": nn.Module,
    "backbone": nn.Module,
    "objective": object,
}
PLAIN = (str, int, float, bool, type(None))
SHAPE = "is not as lidit writes it; export or save the model again"


def check_settings(settings: Any, known: Sequence[str], trust: Sequence[str]) -> None:
    """Refuse settings of a model that name anything but classes of lidit or of trusted modules.

    Args:
        settings: of a model, as a checkpoint or an export carries them.
        known: the settings that a model has.
        trust: modules besides lidit that may be named, with their submodules.

    Raises:
        ValueError: a class is not trusted, no class, or of another kind; or the settings are of another shape.
    """
    if not isinstance(settings, dict):
        raise ValueError(f"the model's configuration {SHAPE}")
    for name, value in settings.items():
        if name not in known:  # also `backbone.class_path` and `llms+`, which a parser would take apart
            raise ValueError(f"the model's configuration does not fit this version of lidit: there is no {name!r}")
        if name == "llms":
            for llm in value if isinstance(value, list | tuple) else [value]:
                _check_part(llm if isinstance(llm, dict) and "class_path" in llm else _llm(llm), name, trust)
        elif name in PARTS:
            _check_part(value, name, trust)
        else:
            _check_plain(value, name, trust)


def _llm(arguments: Any) -> dict[str, Any]:
    """An LLM that names no class is a `FrozenLLM`."""
    return {"class_path": f"{FrozenLLM.__module__}.{FrozenLLM.__name__}", "init_args": arguments}


def _check_part(part: Any, name: str, trust: Sequence[str]) -> None:
    if not (isinstance(part, dict) and part.keys() <= {"class_path", "init_args", "dict_kwargs"}):
        raise ValueError(f"{name} of the model's configuration {SHAPE}")
    if not isinstance(part.get("class_path"), str):
        raise ValueError(f"{name} of the model's configuration {SHAPE}")
    _check_class(part["class_path"], PARTS[name], trust)
    for arguments in (part.get("init_args"), part.get("dict_kwargs")):
        if not isinstance(arguments, dict | None):
            raise ValueError(f"{name} of the model's configuration {SHAPE}")
        _check_plain(arguments, name, trust)


def _check_plain(value: Any, name: str, trust: Sequence[str]) -> None:
    """Numbers, texts, lists and dictionaries of these; a class in them is trusted, too."""
    if isinstance(value, list | tuple):
        for each in value:
            _check_plain(each, name, trust)
    elif isinstance(value, dict):
        if "class_path" in value:
            _check_class(value["class_path"], object, trust)
        for key, each in value.items():
            if not isinstance(key, str) or "." in key or "+" in key:  # a parser would take it apart
                raise ValueError(f"{name} of the model's configuration {SHAPE}")
            _check_plain(each, name, trust)
    elif not isinstance(value, PLAIN):
        raise ValueError(f"{name} of the model's configuration {SHAPE}")


def _check_class(path: Any, kind: type, trust: Sequence[str]) -> None:
    module, _, name = str(path).rpartition(".")
    if not _is_in(module, ("lidit", *trust)):
        root = str(path).partition(".")[0]
        raise ValueError(
            f"the model's configuration names {path}, which is not lidit's: loading it runs that code. If you trust it "
            f"and Python can import it, say --trust {root}"
        )
    try:
        found = getattr(import_module(module), name, None)
    except ImportError:
        found = None
    if not (isinstance(found, type) and issubclass(found, kind) and _is_in(found.__module__, ("lidit", *trust))):
        raise ValueError(f"the model's configuration names {path}, which is no {kind.__name__} of {module}")


def _is_in(module: str, modules: Sequence[str]) -> bool:
    return any(module == root or module.startswith(f"{root}.") for root in modules)
