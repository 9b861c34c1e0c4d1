"""How other systems feed an LLM to a diffusion transformer, as settings of our classes.

What a preset does not name keeps its default, LI-DiT's, which `li-dit` names where a recipe of ours differs. Facts are
of the systems' public code and reports.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PLAIN = {"refiner_depth": 0, "fusion": "concat"}  # no refiner of any kind
UNTIMED = {"gating": False, "fusion": "concat"}  # refined once per prompt


@dataclass(frozen=True)
class Preset:
    """Arguments of FrozenLLM, PromptEncoder and LIDiT that differ from LI-DiT's."""

    source: str
    llm: dict[str, Any] = field(default_factory=dict)
    prompt_encoder: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] = field(default_factory=dict)


PRESETS = {
    "li-dit": Preset("Ma et al., NeurIPS 2024", {}, {"truncate": "after"}),
    "hunyuan": Preset("HunyuanVideo (arXiv 2412.03603)", {}, {"truncate": "before", "pool": "mlp", "fusion": "concat"}),
    "kandinsky": Preset(
        "Kandinsky 5.0",
        {"layer": -1},
        {"truncate": "before", "gating": "full", "positions": True, "fusion": "concat"},
    ),
    "lumina": Preset(
        "Lumina-Image 2.0 (arXiv 2503.21758)", {"layer": -2}, UNTIMED | {"truncate": "never", "positions": True}
    ),
    "norm-average": Preset("arXiv 2506.08210", {"layer": -1, "levels": "mean", "instruction": ""}, PLAIN),
    "layer-mix": Preset(
        "ELMo's learnt weights (Peters et al. 2018)",
        {"layer": -1, "levels": 6, "instruction": ""},
        PLAIN | {"levels": 6, "mix": "weights"},
    ),
    "krea": Preset(
        "Krea 2", {"layer": -1, "levels": 6}, UNTIMED | {"levels": 6, "mix": "attention", "truncate": "before"}
    ),
    "sana": Preset("SANA (arXiv 2410.10629)", {"layer": -1}, PLAIN | {"truncate": "never"}, {"text_scale": 0.01}),
    "plain": Preset("an LLM in T5's place", {"layer": -1, "instruction": ""}, PLAIN),
    "layerwise": Preset(
        "Playground v3 (arXiv 2409.10695)",
        {"layer": -1, "levels": 6, "instruction": ""},
        PLAIN | {"levels": 6, "mix": "per_block"},
    ),
}


def settings(name: str) -> Preset:
    """A preset by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
