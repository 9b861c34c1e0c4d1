"""What reading a prompt costs, and how much can be saved.

An LLM of a given size, with random weights and a bundled tokenizer, reads captions of the miniature world:

- as with transformers alone: the whole model runs and gives all hidden states, of which one is used;
- stopped at the tapped block, like `FrozenLLM`: (L - 2) / L of the blocks and no head; the instruction, which all
  prompts share, is read for each prompt, or only once;
- with the captions sorted by length, as `lidit prep precompute` reads them, or unsorted;
- from a cache that `lidit prep precompute` has written.

All ways are timed in turn, for several rounds in one process, and compared within each round. Then follows the prompt
encoder's share of LI-DiT-1B: operations, and seconds of one forward pass of each part on this machine. LI-DiT's text
depends on the time; where that of a preset does not, sampling encodes it once and reuses each block's keys and values.

    python -m experiments.speed_prompt_encoding run --out experiments/results/speed_prompt_encoding.json
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from data_prep.precompute import precompute
from experiments.cards import versions
from experiments.speed_data import machine
from experiments.speed_files import SHARDS, photo, write_shards
from lidit.assets import resolve
from lidit.data.cache import Cache
from lidit.data.index import ShardIndex
from lidit.models.lidit import LIDiT
from lidit.models.llm import FrozenLLM
from lidit.models.prompt_encoder import PromptEncoder
from lidit.plan.operations import INSTRUCTION, DryRun, FeatureSizes, Sizes
from lidit.scenes import benchmarks

Found = dict[str, Any]
LLM_PARAMETERS = (6.54e9, 6.07e9)  # of the 30 blocks of LLaMA3-8B and Qwen1.5-7B up to the tapped state
TOKENS = 120  # tokens of a caption of LI-DiT-1B
IMAGE_TOKENS = 256  # tokens of an image of 256 px


def run(
    out: str,
    width: int = 512,
    depth: int = 24,
    prompts: int = 64,
    batch_size: int = 16,
    rounds: int = 5,
    backbone: tuple[int, int] = (28, 1152),
) -> None:
    """Time the ways to read, count operations, print both and write them as JSON.

    Args:
        out: JSON file to write.
        width: width of the LLM.
        depth: number of the LLM's blocks.
        prompts: number of captions, half of them short and half dense.
        batch_size: captions that are read at once.
        rounds: how many times all ways are timed in turn, after one round that does not count.
        backbone: depth and width of the transformer that reads the text.
    """
    settings, at_start = dict(locals()), machine()
    with tempfile.TemporaryDirectory(prefix="lidit-speed-") as name:
        reading = read_in_turn(Path(name), width, depth, prompts, batch_size, rounds)
    found = {"machine": at_start, "versions": versions("torch", "transformers"), "settings": settings}
    found |= {"reading": reading, "share": shares(*backbone, rounds)}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(found, indent=1) + "\n")


def read_in_turn(folder: Path, width: int, depth: int, count: int, batch_size: int, rounds: int) -> list[Found]:
    """For each way: captions a second, their ratio to the first way, and megabytes of weights."""
    made(folder, width, depth)
    texts = [q.text for name in ("attributes", "dense") for q in benchmarks.prompts(name, count, 0)[: count // 2]]
    mixed = [texts[i] for i in torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()]
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stopped = FrozenLLM(str(folder), dtype="float32").load()
    apart = Apart(str(folder), dtype="float32").load()
    from_cache = cached(folder / "cached", stopped, mixed)
    ways: dict[str, tuple[Callable[[list[str]], object], list[str], float]] = {
        "the whole model": (lambda batch: all_states(whole, stopped, batch), mixed, size(whole)),
        "stopped at the tapped block": (apart, mixed, stopped.nbytes),
        "and the instruction once": (stopped, mixed, stopped.nbytes),
        "and sorted by length": (stopped, sorted(mixed, key=len), stopped.nbytes),
        "from a cache": (from_cache, mixed, 0.0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, (read, captions, _) in ways.items():
            start = time.perf_counter()
            for i in range(0, len(captions), batch_size):
                read(captions[i : i + batch_size])
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, (_, captions, weights) in ways.items():
        ratios = [a / b for a, b in zip(seconds["the whole model"][1:], seconds[name][1:], strict=True)]
        rate = len(captions) / statistics.median(seconds[name][1:])
        rows.append({"way": name, "captions_per_second": rate, "over_whole": statistics.median(ratios)})
        rows[-1] |= {"spread": statistics.pstdev(ratios), "weights_mb": weights / 1e6}
        print(f"{name}: {rate:.1f} captions a second, {rows[-1]['over_whole']:.2f} times, {weights / 1e6:.0f} MB")
    return rows


def cached(folder: Path, llm: FrozenLLM, captions: list[str]) -> Callable[[list[str]], object]:
    """Write a cache of the captions' features; return a function that reads captions from it."""
    picture = photo(0, 64)
    write_shards(folder / "shards", [{"jpg": picture, "json": json.dumps({"caption": c}).encode()} for c in captions])
    index = ShardIndex(str(folder / "shards"))
    precompute(str(folder / "shards"), str(folder / "cache"), vae=None, llms=[llm], captions=("caption",))
    cache = Cache(str(folder / "cache"), index)
    place = {c: i for i, c in enumerate(c for shard in range(SHARDS) for c in captions[shard::SHARDS])}
    return lambda batch: cache.features(np.array([place[c] for c in batch]), False, np.zeros(len(batch), bool))


class Apart(FrozenLLM):
    """An LLM that reads the instruction again for each prompt."""

    def _shared(self, splits: list) -> int:
        return 0


def made(folder: Path, width: int, depth: int) -> None:
    """Write an LLM with random weights."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("bundled:llava_qwen"))
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=depth,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def all_states(model: Any, llm: FrozenLLM, batch: list[str]) -> Tensor:
    """The tapped hidden state, from a whole model that returns all of them."""
    ids, mask, _ = llm._pad([llm.prompts.split(prompt) for prompt in batch])
    return model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states[llm.layer]


def size(model: torch.nn.Module) -> int:
    """Bytes of a model's weights."""
    return sum(p.numel() * p.itemsize for p in model.parameters())


def shares(depth: int, width: int, rounds: int) -> Found:
    """The prompt encoder's share of a model that reads two LLMs of width 4096, by operations and by time."""
    tokens, side = INSTRUCTION + TOKENS, 2 * int(IMAGE_TOKENS**0.5)

    def build() -> tuple[LIDiT, PromptEncoder]:
        return LIDiT(16, depth, width), PromptEncoder([4096, 4096], width)

    backbone, encoder = build()
    forward = DryRun(build).operations(Sizes((1, 16, side, side), (FeatureSizes(tokens, TOKENS, 4096),) * 2))
    counted = {
        "LLMs": sum(2 * parameters * tokens for parameters in LLM_PARAMETERS),
        "prompt encoder": forward.encoder,
        "backbone": forward.backbone,
    }
    mask = torch.ones(1, tokens, dtype=torch.bool)
    features = [(torch.randn(1, tokens, 4096), mask, torch.tensor([INSTRUCTION]))] * 2
    latent, t = torch.randn(1, 16, side, side), torch.rand(1)
    with torch.no_grad():
        text = encoder(features, t)
        keys_values = backbone.keys_values(text)
        seconds = {
            "prompt encoder": once(lambda: encoder(features, t), rounds),
            "backbone": once(lambda: backbone(latent, t, text), rounds),
            "backbone, keys and values of the text kept": once(lambda: backbone(latent, t, text, keys_values), rounds),
        }
    step = counted["prompt encoder"] + counted["backbone"]
    found = {
        "gflop_of_a_forward_pass": {name: value / 1e9 for name, value in counted.items()},
        "seconds_of_a_forward_pass": seconds,
        "counted_of_a_sampling_step": counted["prompt encoder"] / step,
        "measured_of_a_sampling_step": seconds["prompt encoder"] / (seconds["prompt encoder"] + seconds["backbone"]),
        "counted_of_a_training_step_with_cache": counted["prompt encoder"] / step,
        "counted_of_a_training_step_without": (counted["LLMs"] + 3 * counted["prompt encoder"])
        / (counted["LLMs"] + 3 * step),
        "counted_over_25_steps_computed_once": counted["prompt encoder"]
        / (counted["prompt encoder"] + 25 * counted["backbone"]),
        "counted_keys_and_values_of_the_backbone": 4 * 2 * TOKENS * width**2 * depth / counted["backbone"],
    }
    print(json.dumps(found, indent=1))
    return found


def once(step: Callable[[], object], rounds: int) -> float:
    """Median seconds of a step, after one that does not count."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli({"run": run}, as_positional=False)
