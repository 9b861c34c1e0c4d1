"""LI-DiT at the paper's sizes on one GPU: images a second, model FLOP utilisation, memory.

Timed is a training step of prompt encoder and backbone (forward, backward, AdamW) in bf16-mixed precision, on latents
and LLM features that exist already, as from a cache. Utilisation is the model's number of operations a second
(`plan/operations.py`; what is recomputed does not count) over those of a large matrix product in bfloat16, measured in
the same run. A row that does not fit into the GPU's memory says so.

    python -m experiments.speed_gpu run --out experiments/results/speed_gpu.json
    python -m experiments.speed_gpu blocks --out experiments/results/speed_gpu_10b.json
"""

from __future__ import annotations

import gc
import json
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from experiments.cards import versions
from experiments.speed_data import machine
from experiments.speed_denoiser import Size, compile_blocks, pixart, timed, train
from lidit.models.lidit import LIDiT
from lidit.models.prompt_encoder import PromptEncoder
from lidit.parallel import Parallel, shard, units
from lidit.plan.operations import FORWARD_AND_BACKWARD, INSTRUCTION, DryRun, FeatureSizes, Sizes

Found = dict[str, Any]
# of a latent; of features; of a caption; of the image for one of the latent, along a side
CHANNELS, LLM_WIDTHS, TOKENS, PIXELS = 16, [4096, 4096], 120, 8
WIDTH_10B, HEADS_10B = 2816, 44  # Table 7


@dataclass(frozen=True)
class Setting:
    """What is measured in a row.

    Args:
        pixels: side of an image.
        batch: images in a step.
        compiled: compile the blocks with torch.compile.
        every: recompute every n-th block; 0: none.
        sharded: use FSDP2 on the one GPU, to see what it costs.
        model: LI-DiT, or PixArt of diffusers without a prompt encoder.
    """

    pixels: int = 256
    batch: int = 64
    compiled: bool = True
    every: int = 0
    sharded: bool = False
    model: str = "LI-DiT"


SETTINGS = [
    *(Setting(batch=batch) for batch in (32, 128, 256)),
    *(Setting(compiled=compiled, every=every) for compiled in (True, False) for every in (0, 1)),
    *(Setting(pixels=512, batch=32, every=every) for every in (0, 1)),
    Setting(sharded=True),
    *(Setting(model="PixArt", compiled=compiled) for compiled in (True, False)),
]


class Whole(nn.Module):
    """Prompt encoder and backbone as one module."""

    def __init__(self, depth: int, width: int, heads: int):
        super().__init__()
        self.backbone, self.prompt_encoder = parts(depth, width, heads)

    def forward(self, x: Tensor, t: Tensor, *features: Tensor) -> Tensor:
        mask = torch.ones(features[0].shape[:2], dtype=torch.bool, device=x.device)
        start = torch.full((len(x),), INSTRUCTION, device=x.device)
        return self.backbone(x, t, self.prompt_encoder([(each, mask, start) for each in features], t))


def parts(depth: int, width: int, heads: int) -> tuple[LIDiT, PromptEncoder]:
    """Backbone and prompt encoder."""
    return LIDiT(CHANNELS, depth, width, heads), PromptEncoder(LLM_WIDTHS, width, heads)


def flops(size: tuple[int, int, int], side: int) -> int:
    """Operations of an image, forward and backward."""
    features = tuple(FeatureSizes(INSTRUCTION + TOKENS, TOKENS, width) for width in LLM_WIDTHS)
    forward = DryRun(partial(parts, *size)).operations(Sizes((1, CHANNELS, side, side), features))
    return FORWARD_AND_BACKWARD * sum(forward)


def run(out: str, device: str = "cuda", rounds: int = 10, size: tuple[int, int, int] = (28, 1152, 16)) -> None:
    """Time every setting, print each row and write all as JSON.

    Args:
        out: JSON file, written after each row.
        device: cuda, or cpu for a test.
        rounds: steps that are timed, after three that are not.
        size: depth, width and heads of the backbone.
    """
    place = torch.device(device)
    rows: list[Found] = []
    found = {"machine": machine(), "versions": versions("torch", "diffusers"), "device": called(place), "rows": rows}
    found["matmul_tflops"] = rate = matmul_rate(place)
    for setting in SETTINGS:
        row = asdict(setting)
        try:
            row |= measured(setting, size, place, rounds, rate)
        except torch.OutOfMemoryError:
            row["fits"] = False
        print(json.dumps(row), flush=True)
        rows.append(row)
        torch._dynamo.reset()
        write(out, found)


def measured(setting: Setting, size: tuple[int, int, int], device: torch.device, rounds: int, rate: float) -> Found:
    """Images a second, utilisation and memory of a setting."""
    forget()
    depth, width, heads = size
    side, batch = setting.pixels // PIXELS, setting.batch
    with device:
        x, t = torch.randn(batch, CHANNELS, side, side), torch.rand(batch)
        if setting.model == "PixArt":
            model: Any = pixart(Size(depth, width, heads, side))
            inputs = (x, t, torch.randn(batch, 2 * TOKENS, width))
            if setting.compiled:
                compile_blocks(model.model)
        else:
            model = Whole(depth, width, heads)
            inputs = (x, t, *(torch.randn(batch, INSTRUCTION + TOKENS, e, dtype=torch.bfloat16) for e in LLM_WIDTHS))
            Parallel(setting.every, setting.compiled).apply(model.backbone)
    if setting.sharded:
        alone(device)
        mesh = init_device_mesh(device.type, (1,), mesh_dim_names=("shard",))
        shard(units(model.backbone, model.prompt_encoder), mesh, torch.bfloat16)
    image = None if setting.model == "PixArt" else flops(size, side)
    optimizer = torch.optim.AdamW(model.parameters())
    step = partial(train, model, optimizer, inputs, "bfloat16")
    for _ in range(3):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [timed(step, device) for _ in range(rounds)]
    images = batch / statistics.median(seconds)
    return {
        "fits": True,
        "images_per_second": images,
        "spread": statistics.pstdev(seconds) / statistics.mean(seconds),
        "utilisation": image and images * image / 1e12 / rate,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
    }


def forget() -> None:
    """Free the memory of earlier models; recomputed or compiled blocks refer to themselves and would stay."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def blocks(out: str, device: str = "cuda", batch: int = 8, pixels: int = 512, most: int = 64) -> None:
    """Find how many of the 10B's blocks fit into the GPU if all are recomputed; time them, print and write as JSON.

    Args:
        out: JSON file to write.
        device: cuda, or cpu for a test.
        batch: images in a step.
        pixels: side of an image.
        most: the most blocks to try: their number is doubled from 1 until they do not fit, then found by bisection.
    """
    place, fitting, failed = torch.device(device), 0, most + 1
    tried: list[Found] = []
    while failed - fitting > 1:
        depth = min(max(1, 2 * fitting) if failed > most else (fitting + failed) // 2, most)
        try:
            seconds = stack_seconds(depth, batch, pixels, place)
            fitting = depth
            tried.append({"blocks": depth, "seconds": seconds})
        except torch.OutOfMemoryError:
            failed = depth
        print(f"{depth} blocks: {'fit' if fitting == depth else 'do not fit'}", flush=True)
    write(out, {"machine": machine(), "device": called(place), "batch": batch, "pixels": pixels, "fitting": tried})


def stack_seconds(depth: int, batch: int, pixels: int, device: torch.device) -> float:
    """Median seconds of a forward and a backward pass of a model with this many of the 10B's blocks."""
    forget()
    width, heads = (WIDTH_10B, HEADS_10B) if device.type == "cuda" else (64, 2)
    side = pixels // PIXELS
    with device:
        model = Whole(depth, width, heads)
        Parallel(checkpoint_every=1).apply(model.backbone)
        inputs = (torch.randn(batch, CHANNELS, side, side), torch.rand(batch))
        features = [torch.randn(batch, INSTRUCTION + TOKENS, e, dtype=torch.bfloat16) for e in LLM_WIDTHS]

    def step() -> None:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(*inputs, *features).float().square().mean()
        loss.backward()

    step()
    return statistics.median(timed(step, device) for _ in range(3))


def matmul_rate(device: torch.device) -> float:
    """Speed of a large matrix product in bfloat16, in 10^12 operations a second."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = [timed(lambda: a @ b, device) for _ in range(20)]
    return 2 * n**3 / statistics.median(seconds[5:]) / 1e12


def alone(device: torch.device) -> None:
    """Start a process group that consists of this process alone."""
    if not torch.distributed.is_initialized():
        kind = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(kind, store=torch.distributed.HashStore(), rank=0, world_size=1)


def called(device: torch.device) -> str:
    """A device's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def write(out: str, found: Found) -> None:
    """Write the results as JSON."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli({"run": run, "blocks": blocks}, as_positional=False)
