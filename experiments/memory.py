"""What a rank of a cluster would hold, from the recipes alone: nothing is read, no weight is allocated.

Trained states are counted by the sharding plan. Activations are what autograd would keep, counted without computing
anything; attention runs in float32 on the CPU, so that on a GPU it is less. Frozen LLMs are those of `LLMS`, since the
hub's configurations need a network.

    python -m experiments.memory lidit_1b                # with cluster/lidit_1b.yaml
    python -m experiments.memory lidit_10b lidit_10b_1024
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any
from unittest.mock import patch

import torch
import yaml
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from lidit.models.lidit import LIDiT
from lidit.models.prompt_encoder import PromptEncoder
from lidit.parallel import BYTES_PER_PARAMETER, Parallel

LLMS = {  # width of the features; parameters of embeddings and of the blocks up to the third-to-last hidden state
    "llava-hf/llama3-llava-next-8b-hf": (4096, 128_320 * 4096 + 30 * 218_112_000),
    "llava-hf/llava-interleave-qwen-7b-hf": (4096, 152_000 * 4096 + 30 * 202_391_552),
}
CHANNELS, FACTOR, PIXELS = 16, 8, {"lidit_1b": 256, "ablation": 256, "lidit_10b": 512, "lidit_10b_1024": 1024}
TOKENS = 256  # of a caption, at most
GB = 1e9


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    states: int
    llms: int
    activations: int
    images: int  # of one forward pass

    def __str__(self) -> str:
        parts = {"states": self.states, "LLMs": self.llms, f"activations of {self.images}": self.activations}
        total = sum(parts.values())
        return f"{total / GB:.0f} GB: " + ", ".join(f"{name} {size / GB:.1f}" for name, size in parts.items())


def recipe(*names: str) -> dict[str, Any]:
    """The recipes, laid over one another as `lidit fit` does, the last with its cluster overlay."""
    folder = files("experiments") / "configs"
    merged: dict[str, Any] = {}
    for path in (*(folder / f"{name}.yaml" for name in names), folder / "cluster" / f"{names[-1]}.yaml"):
        merged = overlaid(merged, yaml.safe_load(path.read_text()))
    return merged


def overlaid(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """A recipe with another one over it."""
    nested = {k: overlaid(base[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | over | nested


def memory(*names: str) -> Memory:
    """What a rank holds with these recipes and the last one's cluster overlay."""
    given = recipe(*names)
    trainer, llms = given["trainer"], [LLMS[llm["name"]] for llm in given["model"]["llms"]]
    ranks = trainer["devices"] * trainer["num_nodes"]
    strategy = trainer["strategy"]
    shares = ranks // strategy["init_args"]["replicate"] if isinstance(strategy, dict) else 1
    images = given["data"]["batch_size"] // ranks
    with FakeTensorMode():
        backbone, encoder = build(given["model"], [width for width, _ in llms])
        trained = sum(p.numel() for part in (backbone, encoder) for p in part.parameters())
        step = partial(forward, backbone, encoder, images, PIXELS[names[-1]] // FACTOR)
        whole = kept_bytes(step)
        every = given["parallel"]["checkpoint_every"]
        Parallel(checkpoint_every=every).apply(backbone)
        kept = kept_bytes(step)
        if every:
            kept += (whole - kept) // len(backbone.blocks[::every])  # recomputed, one block at a time
    states = trained * sum(BYTES_PER_PARAMETER.values()) // shares
    return Memory(states, sum(2 * count for _, count in llms), kept, images)


def build(model: dict[str, Any], widths: list[int]) -> tuple[LIDiT, PromptEncoder]:
    """What is trained."""
    backbone = LIDiT(CHANNELS, **model["backbone"]["init_args"])
    return backbone, PromptEncoder(widths, backbone.width, **model["prompt_encoder"]["init_args"])


def forward(backbone: LIDiT, encoder: PromptEncoder, images: int, side: int) -> Tensor:
    """A pass with the longest captions, as in training."""
    t = torch.rand(images)
    instruction, length = 40, 40 + TOKENS
    features = [
        (
            torch.randn(images, length, part.in_features, dtype=torch.bfloat16),
            torch.ones(images, length, dtype=torch.bool),
            torch.full((images,), instruction),
        )
        for part in encoder.project
    ]
    with torch.autocast("cpu", torch.bfloat16), patch("lidit.models.prompt_encoder.truncate", cut):
        return backbone(torch.randn(images, CHANNELS, side, side), t, encoder(features, t))


def cut(x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """As `prompt_encoder.truncate` for captions of equal length: how many tokens are kept depends on no value."""
    return x[:, -TOKENS:], kept[:, -TOKENS:]


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass; each storage counts once, parameters do not."""
    sizes: dict[int, int] = {}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(sizes.values())


if __name__ == "__main__":
    import sys

    print(memory(*sys.argv[1:]))
