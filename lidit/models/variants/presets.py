"""How other systems feed an LLM to a diffusion transformer, as settings of our classes.

A preset sets all arguments in `ABOUT`: those that it does not name get LI-DiT's values. It leaves the rest of a recipe,
such as sizes and training, alone. The settings are taken from the systems' public code and reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lidit.models.lidit import LIDiT
from lidit.models.llm import INSTRUCTION, FrozenLLM
from lidit.models.prompt_encoder import PromptEncoder
from lidit.models.variants.backbone import VariantLIDiT
from lidit.models.variants.encoder import VariantEncoder
from lidit.models.variants.llm import MultiLevelLLM

UNREFINED = {"refiner_depth": 0, "fusion": "concat"}  # no refiner of any kind
UNTIMED = {"gating": False, "fusion": "concat"}  # text that does not depend on the time

# for each part: the arguments of LI-DiT's class that presets set, and those that only the variant's class has
ABOUT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llm": ({"layer": -3, "instruction": INSTRUCTION}, {"levels": 1}),
    "prompt_encoder": (
        {"refiner_depth": 2, "gating": True, "fusion": None},
        {"truncate": "after", "positions": False, "pool": "linear", "levels": 1, "mix": "together"},
    ),
    "backbone": ({}, {"levels": 1, "text_scale": 1.0}),
}
CLASSES: dict[str, tuple[type, type]] = {  # for each part: LI-DiT's class, and the variant's
    "llm": (FrozenLLM, MultiLevelLLM),
    "prompt_encoder": (PromptEncoder, VariantEncoder),
    "backbone": (LIDiT, VariantLIDiT),
}


@dataclass(frozen=True)
class Preset:
    """What a system sets differently from LI-DiT, for each part of the model."""

    source: str
    llm: dict[str, Any] = field(default_factory=dict)
    prompt_encoder: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> tuple[type, dict[str, Any]]:
        """The class of a part (LI-DiT's if it has what the preset names), and all arguments of it that presets set.

        Args:
            name: llm, prompt_encoder or backbone.
        """
        named: Mapping[str, Any] = getattr(self, name)
        ours, variants = ABOUT[name]
        full = {key for key in named if key in variants or named[key] == "full"}
        return (CLASSES[name][1], ours | variants | named) if full else (CLASSES[name][0], ours | named)


PRESETS = {
    "li-dit": Preset("Ma et al., NeurIPS 2024"),
    "hunyuan": Preset("HunyuanVideo (arXiv 2412.03603)", {}, {"truncate": "before", "pool": "mlp", "fusion": "concat"}),
    "kandinsky": Preset(
        "Kandinsky 5.0",
        {"layer": -1},
        {"truncate": "before", "gating": "full", "positions": True, "fusion": "concat"},
    ),
    "lumina": Preset(
        "Lumina-Image 2.0 (arXiv 2503.21758)", {"layer": -2}, UNTIMED | {"truncate": "never", "positions": True}
    ),
    "norm-average": Preset("arXiv 2506.08210", {"layer": -1, "levels": "mean", "instruction": ""}, UNREFINED),
    "layer-mix": Preset(
        "ELMo's learnt weights (Peters et al. 2018)",
        {"layer": -1, "levels": 6, "instruction": ""},
        UNREFINED | {"levels": 6, "mix": "weights"},
    ),
    "krea": Preset(
        "Krea 2", {"layer": -1, "levels": 6}, UNTIMED | {"levels": 6, "mix": "attention", "truncate": "before"}
    ),
    "sana": Preset("SANA (arXiv 2410.10629)", {"layer": -1}, UNREFINED | {"truncate": "never"}, {"text_scale": 0.01}),
    "plain": Preset("an LLM in T5's place", {"layer": -1, "instruction": ""}, UNREFINED),
    "layerwise": Preset(
        "Playground v3 (arXiv 2409.10695)",
        {"layer": -1, "levels": 6, "instruction": ""},
        UNREFINED | {"levels": 6, "mix": "per_block"},
        {"levels": 6},
    ),
}


def settings(name: str) -> Preset:
    """A preset by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]
