"""How fast the denoiser trains and predicts per operation, against the transformers of diffusers, at equal sizes.

LIDiT and the transformers of PixArt and Stable Diffusion 3 have the same latents, text, depth, width, heads and patch.
They are timed in turn, for several rounds in one process, and compared within each round, so that other work of the
machine slows all of them. For each, torch counts the operations (matrix products, convolutions, attention). Memory is
what autograd saves for the backward pass of one step, plus weights, gradients and AdamW's states.

    python -m experiments.speed_denoiser run --out experiments/results/speed_denoiser.json
    python -m experiments.speed_denoiser run --device cuda --sizes '[[28, 1152, 16, 32]]' --batch_size 64 --out FILE
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models import PixArtTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

from experiments.cards import versions
from experiments.speed_data import machine
from lidit.models.contracts import Text
from lidit.models.lidit import LIDiT
from lidit.plan import operations
from lidit.plan.activations import saved_bytes

CHANNELS, TOKENS, PATCH = 16, 120, 2  # latent channels; text tokens
BYTES_OF_STATES = 16  # for each parameter: weight, gradient and AdamW's two states, in float32
TO_REACH = 1.15  # operations a second in training to reach, divided by PixArt's
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """The size of a denoiser and its input."""

    depth: int
    width: int
    heads: int
    side: int  # side of the latent


class Denoiser(nn.Module):
    """A model that is called in the same way as the others: latent (b c h w), time (b), text (b l d) -> prediction."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.call(self.model, x, t, text)


def ours(size: Size) -> Denoiser:
    """LIDiT, with text in the form that its prompt encoder gives."""

    def call(model: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        return model(x, t, Text(text, mask, text.mean(1)))

    return Denoiser(LIDiT(CHANNELS, size.depth, size.width, size.heads, PATCH), call)


def pixart(size: Size) -> Denoiser:
    """PixArt's transformer: cross-attention, modulation shared by the blocks, text projected by an MLP."""
    model = PixArtTransformer2DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.width // size.heads,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=size.depth,
        cross_attention_dim=size.width,
        caption_channels=size.width,
        sample_size=size.side,
        patch_size=PATCH,
        use_additional_conditions=False,
    )
    nothing = {"resolution": None, "aspect_ratio": None}
    return Denoiser(model, lambda model, x, t, text: model(x, text, 1000 * t, added_cond_kwargs=nothing).sample)


def sd3(size: Size) -> Denoiser:
    """Stable Diffusion 3's transformer: text and image in one attention, each with its own weights."""
    model = SD3Transformer2DModel(
        sample_size=size.side,
        patch_size=PATCH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=size.depth,
        attention_head_dim=size.width // size.heads,
        num_attention_heads=size.heads,
        joint_attention_dim=size.width,
        caption_projection_dim=size.width,
        pooled_projection_dim=size.width,
        pos_embed_max_size=size.side // PATCH,
    )
    return Denoiser(model, lambda model, x, t, text: model(x, text, text.mean(1), 1000 * t).sample)


MODELS = {"LIDiT": ours, "PixArt": pixart, "SD3": sd3}


def run(
    out: str,
    sizes: list[tuple[int, int, int, int]] = [(8, 384, 6, 16), (4, 1152, 16, 16)],  # noqa: B006
    batch_size: int = 4,
    rounds: int = 7,
    dtypes: list[str] = ["float32", "bfloat16"],  # noqa: B006
    compiled: list[bool] = [False, True],  # noqa: B006
    device: str = "cpu",
) -> None:
    """Time every model at every size, print a table and write it as JSON.

    Args:
        out: JSON file to write.
        sizes: depth, width, heads, and side of the latent.
        batch_size: images in a step.
        rounds: how many times the models are timed in turn, after one round that does not count.
        dtypes: dtypes in which matrix products are computed; weights are float32.
        compiled: whether blocks are compiled with torch.compile; a list of both measures both.
        device: cpu or cuda.
    """
    settings, at_start = dict(locals()), machine()
    torch.set_num_threads(1)
    rows: list[Row] = []
    found = {"machine": at_start, "versions": versions("torch", "diffusers"), "settings": settings, "rows": rows}
    for size in (Size(*each) for each in sizes):
        for dtype in dtypes:
            for compile_ in compiled:
                rows += compare(size, batch_size, rounds, dtype, compile_, torch.device(device))
                print(table(rows[-len(MODELS) :]), flush=True)
                Path(out).parent.mkdir(parents=True, exist_ok=True)  # written after each, in case memory runs out
                Path(out).write_text(json.dumps(found | {"reached": reached(rows)}, indent=1) + "\n")


def compare(size: Size, batch: int, rounds: int, dtype: str, compiled: bool, device: torch.device) -> list[Row]:
    """A row for each model, timed in turn."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    gc.collect()  # frees earlier models, which their compiled blocks may still refer to
    inputs = (
        torch.randn(batch, CHANNELS, size.side, size.side, device=device),
        torch.rand(batch, device=device),
        torch.randn(batch, TOKENS, size.width, device=device),
    )
    models = {name: make(size).to(device) for name, make in MODELS.items()}
    rows = {name: counted(model, inputs, dtype) for name, model in models.items()}
    steps: dict[str, dict[str, Callable[[], object]]] = {}
    for name, model in models.items():
        if compiled:
            compile_blocks(model.model)
            rows[name]["peak_mb"] = None  # hooks on what autograd saves do not see into compiled blocks
        optimizer = torch.optim.AdamW(model.parameters())
        steps[name] = {
            "training": lambda model=model, optimizer=optimizer: train(model, optimizer, inputs, dtype),
            "inference": lambda model=model: predict(model, inputs, dtype),
        }
    for what in ("training", "inference"):
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(rounds + 1):
            for name in models:
                seconds[name].append(timed(steps[name][what], device))
        for name, row in rows.items():
            passes = 3 if what == "training" else 1
            rates = [passes * row["forward_gflop"] / each for each in seconds[name][1:]]
            first = [passes * rows["PixArt"]["forward_gflop"] / each for each in seconds["PixArt"][1:]]
            row[f"{what}_gflops"] = statistics.median(rates)
            row[f"{what}_over_pixart"] = statistics.median(a / b for a, b in zip(rates, first, strict=True))
            row[f"{what}_spread"] = statistics.pstdev(rates) / statistics.mean(rates)
    about = {**size.__dict__, "batch": batch, "dtype": dtype, "compiled": compiled}
    return [{"model": name, **about, **row} for name, row in rows.items()]


def compile_blocks(model: nn.Module) -> None:
    """Compile each block of a transformer, as `lidit fit` does with LIDiT's; equal blocks share the compiled code."""
    for block in model.blocks if isinstance(model, LIDiT) else model.transformer_blocks:
        block.compile()


def counted(model: Denoiser, inputs: tuple[Tensor, ...], dtype: str) -> Row:
    """Parameters, operations of a forward pass, and bytes of a training step."""
    _, forward = operations.counted(lambda: predict(model, inputs, dtype))
    parameters = sum(p.numel() for p in model.parameters())
    saved = saved_bytes(lambda: computed(model, inputs, dtype))
    return {
        "parameters": parameters,
        "forward_gflop": forward / 1e9,
        "peak_mb": (BYTES_OF_STATES * parameters + saved) / 1e6,
    }


def computed(model: nn.Module, inputs: tuple[Tensor, ...], dtype: str) -> Tensor:
    """A prediction with matrix products in this dtype, as in mixed-precision training."""
    with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        return model(*inputs)


@torch.no_grad()
def predict(model: nn.Module, inputs: tuple[Tensor, ...], dtype: str) -> Tensor:
    """An inference step."""
    return computed(model, inputs, dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: tuple[Tensor, ...], dtype: str) -> None:
    """A training step: forward, backward, optimizer."""
    loss = (computed(model, inputs, dtype) - inputs[0]).float().square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of a step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def reached(rows: list[Row]) -> dict[str, bool]:
    """Whether each aim is reached at every size and setting that was measured."""
    ours_, theirs = ([r for r in rows if r["model"] == name] for name in ("LIDiT", "PixArt"))
    speeds = [row["training_over_pixart"] >= TO_REACH for row in ours_]
    found = {f"training per operation at least {TO_REACH} of PixArt's": all(speeds)}
    memories = [a["peak_mb"] <= b["peak_mb"] for a, b in zip(ours_, theirs, strict=True) if a["peak_mb"] is not None]
    return found | ({"no more peak memory than PixArt": all(memories)} if memories else {})


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| model | depth x width | dtype | compiled | M parameters | GFLOP | training GFLOP/s | over PixArt | "
        "inference GFLOP/s | over PixArt | peak MB |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        peak = "" if r["peak_mb"] is None else f"{r['peak_mb']:.0f}"
        lines.append(
            f"| {r['model']} | {r['depth']} x {r['width']} | {r['dtype']} | {r['compiled']} | "
            f"{r['parameters'] / 1e6:.1f} | {r['forward_gflop']:.1f} | {r['training_gflops']:.1f} | "
            f"{r['training_over_pixart']:.2f} | "
            f"{r['inference_gflops']:.1f} | {r['inference_over_pixart']:.2f} | {peak} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli({"run": run}, as_positional=False)
