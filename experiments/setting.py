"""What the tables share: the two scales, the LLMs under their names in the paper, and rows in the paper's words.

In all tables the miniature deviates from the paper's setting in the same way. Scenes are drawn, and the prompts and the
judge are made for them. The average that stands for T2I-CompBench's attributes is over colour, shape, texture and
spatial relations. Features are whitened. The instruction is cut before the refiners, not after. Training begins with
the bundled backbone, which was trained with two other LLMs, and goes on only in those of its parts that read text
(`experiments/configs/mini_ablation.yaml`).
"""

from __future__ import annotations

from typing import Any

PROMPTS = {  # where the benchmarks' published prompt files are put; docs/benchmarks.md says whence
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
            # UNSTATED: the paper does not say with what sampler, steps and guidance it drew the pictures it scored
            "all": "--size 256x256 --steps 50 --guidance 5",
            "positional-bias": PROMPTS["t2i-compbench"],
        },
        "score": {name: f"{PROMPTS.get(name, '')} --device cuda" for name in (*PROMPTS, "positional-bias")},
    },
}

T2I_AVERAGE = {"mini": ("scenes-attributes", "overall", 100), "paper": ("t2i-compbench", "attributes np8", 100)}
DPG_AVERAGE = {"mini": ("scenes-dense", "overall", 100), "paper": ("dpg-bench", "official average", 1)}
# beside the paper's columns: minus 100 times the loss on held-out scenes, a finer measure than a judge of few pictures
FIT = {"held-out fit": {"mini": ("text-gain", "loss", -100), "paper": None}}
COLUMNS = {"T2I-CompBench": T2I_AVERAGE, "DPG-Bench": DPG_AVERAGE} | FIT

T5 = "lidit.models.t5.FrozenT5"
BASE, TUNED = {"template": "plain"}, {}
LLMS: dict[str, dict[str, dict[str, Any]]] = {  # by our names: the settings in the recipe of each scale
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
    # UNSTATED: the paper does not say which T5 Table 3 uses; we take the one that its first finding names
    "t5": {"mini": {"name": "bundled:t5"}, "paper": {"name": "google/t5-v1_1-xl"}},
    "t5_xxl": {"paper": {"name": "google/t5-v1_1-xxl"}},
    "llama_1": {"paper": {"name": "huggyllama/llama-7b", **BASE}},
    "llama_2": {"paper": {"name": "meta-llama/Llama-2-7b-hf", **BASE}},
}
COMMON = {"mini": {"dtype": "float32", "max_tokens": 128}, "paper": {}}


def llm(name: str, scale: str, instruction: bool) -> dict[str, Any]:
    """The settings of an LLM, as a recipe gives them."""
    settings = LLMS[name][scale] | COMMON[scale] | ({} if instruction else {"instruction": ""})
    if name.startswith("t5"):  # the layer is given, or else the layer of the recipe's own LLM would stay
        return {"class_path": T5, "init_args": settings | {"layer": -1}}
    return settings


# UNSTATED: whether Table 2's first row, an LLM in T5's place, reads the last block; our rows read the third to last.
def row(*llms: str, instruction: bool = False, refiner: int = 0, fusion: str = "concat", **encoder: Any) -> dict:
    """A row of a table: the settings of its LLMs and of the prompt encoder, at each scale that has all these LLMs.

    Args:
        llms: keys of LLMS.
        instruction: whether the paper's instruction stands before the caption.
        refiner: number of blocks of each token refiner; 0: no refiner.
        fusion: how the features of several LLMs are joined.
        encoder: further arguments of `PromptEncoder`.
    """
    settings = {"refiner_depth": refiner, "fusion": fusion, **encoder}
    keys = {f"model.prompt_encoder.init_args.{key}": value for key, value in settings.items()}
    scales = [scale for scale in SETTING if all(scale in LLMS[name] for name in llms)]
    return {scale: {"model.llms": [llm(name, scale, instruction) for name in llms]} | keys for scale in scales}
