"""What the tables share: the two scales, the LLMs by their names in the paper, and rows in the paper's words.

The miniature deviates from the paper's setting, in all tables alike: the world, the judge and its prompts are drawn
ones; the average that stands for T2I-CompBench's attributes is over colour, shape, texture and spatial relations;
features are whitened, the instruction is cut before the refiners and not after, and training begins with the bundled
backbone, made with two other LLMs, of which only what reads text goes on learning
(`experiments/configs/mini_ablation.yaml`).
"""

from __future__ import annotations

from typing import Any

PROMPTS = {  # where the benchmarks' published prompt files are put; the README says where they come from
    "t2i-compbench": "--prompts-dir prompts/t2i-compbench",
    "dpg-bench": "--prompts-dir prompts/dpg-bench",
    "geneval": "--prompts-dir prompts/geneval",
}
SETTING = {
    "mini": {
        "config": "experiments/configs/mini_ablation.yaml",
        "prepare": ["lidit prep shard --out data/ablation/train --count 12000 --seed 0"],
        "cache": {"out": "data/ablation/cache", "options": "--shards data/ablation/train", "vae": "bundled:vae"},
        "sample": {"all": "--count_per_task 60 --steps 12 --guidance 3 --batch_size 100"},
        "commands": {
            "scene-questions": "python -m experiments.scene_questions score --llms LLMS --out OUT",
            "text-gain": "python -m experiments.text_gain score --checkpoint RUN/checkpoints/latest --out OUT",
        },
    },
    "paper": {
        "config": "experiments/configs/ablation.yaml",
        "sample": PROMPTS
        | {
            # UNSTATED: sampler, steps and guidance of the paper's scores
            "all": "--size 256x256 --steps 50 --guidance 5",
            "positional-bias": PROMPTS["t2i-compbench"],
        },
        "score": {name: f"{PROMPTS.get(name, '')} --device cuda" for name in (*PROMPTS, "positional-bias")},
    },
}

T2I_AVERAGE = {"mini": ("scenes-attributes", "overall", 100), "paper": ("t2i-compbench", "attributes np8", 100)}
DPG_AVERAGE = {"mini": ("scenes-dense", "overall", 100), "paper": ("dpg-bench", "official average", 1)}
# beside the paper's columns: minus 100 times the loss on held-out scenes, which is finer than the judge of few pictures
FIT = {"held-out fit": {"mini": ("text-gain", "loss", -100), "paper": None}}
COLUMNS = {"T2I-CompBench": T2I_AVERAGE, "DPG-Bench": DPG_AVERAGE} | FIT

T5 = "lidit.models.t5.FrozenT5"
BASE, TUNED = {"template": "plain"}, {}
LLMS: dict[str, dict[str, dict[str, Any]]] = {  # by their names here: at each scale, what the recipe says
    "llama_base": {
        "mini": {"name": "bundled:llm_llama_base", **BASE},
        "paper": {"name": "meta-llama/Meta-Llama-3-8B", **BASE},
    },
    "llama": {"mini": {"name": "bundled:llava_llama"}, "paper": {"name": "llava-hf/llama3-llava-next-8b-hf"}},
    "qwen_base": {
        "mini": {"name": "bundled:llm_qwen_base", **BASE},
        "paper": {"name": "Qwen/Qwen1.5-7B", **BASE},
    },
    "qwen": {"mini": {"name": "bundled:llava_qwen"}, "paper": {"name": "llava-hf/llava-interleave-qwen-7b-hf"}},
    # UNSTATED: which T5 Table 3 uses; the one that the paper's first finding names
    "t5": {"mini": {"name": "bundled:t5"}, "paper": {"name": "google/t5-v1_1-xl"}},
    "t5_xxl": {"paper": {"name": "google/t5-v1_1-xxl"}},
    "llama_1": {"paper": {"name": "huggyllama/llama-7b", **BASE}},
    "llama_2": {"paper": {"name": "meta-llama/Llama-2-7b-hf", **BASE}},
}
COMMON = {"mini": {"dtype": "float32", "max_tokens": 128}, "paper": {}}


def llm(name: str, scale: str, instruction: bool) -> dict[str, Any]:
    """An LLM as a recipe names it."""
    settings = LLMS[name][scale] | COMMON[scale] | ({} if instruction else {"instruction": ""})
    if name.startswith("t5"):  # its layer is said, since over a recipe's LLM the layer of that one stays
        return {"class_path": T5, "init_args": settings | {"layer": -1}}
    return settings


def row(*llms: str, instruction: bool = False, refiner: int = 0, fusion: str = "concat", **encoder: Any) -> dict:
    """A row: its LLMs by their names here, and the prompt encoder's settings.

    Args:
        llms: keys of LLMS.
        instruction: the paper's, before the caption.
        refiner: blocks of the token refiners; 0: none.
        fusion: how several LLMs meet.
        encoder: further arguments of `PromptEncoder`.
    """
    settings = {"refiner_depth": refiner, "fusion": fusion, **encoder}
    keys = {f"model.prompt_encoder.init_args.{key}": value for key, value in settings.items()}
    scales = [scale for scale in SETTING if all(scale in LLMS[name] for name in llms)]
    return {scale: {"model.llms": [llm(name, scale, instruction) for name in llms]} | keys for scale in scales}
