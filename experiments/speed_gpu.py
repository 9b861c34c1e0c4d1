"""LI-DiT at the paper's sizes on one GPU: images a second, model FLOP utilisation, memory.

A training step of prompt encoder and backbone (forward, backward, AdamW) in bf16-mixed precision, on latents and LLM
features that are there already, as from a cache. Utilisation is the operations of the model a second
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
from lidit.plan.operations import FORWARD_AND_BACKWARD, INSTRUCTION, FeatureSizes, Rehearsal, Sizes

Found = dict[str, Any]
CHANNELS, LLM_WIDTHS, TOKENS, PIXELS = 16, [4096, 4096], 120, 8  # of latent; of features; of captions; a latent's side
WIDTH_10B, HEADS_10B = 2816, 44  # Table 7


@dataclass(frozen=True)
class Setting:
    """Of a row.

    Args:
        pixels: side of a picture.
        batch: images of a step.
        compiled: blocks by torch.compile.
        every: recompute every n-th block; 0: none.
        sharded: FSDP2 over the one GPU, for what it costs.
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
    """Prompt encoder and backbone behind one call."""

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
    forward = Rehearsal(partial(parts, *size)).operations(Sizes((1, CHANNELS, side, side), features))
    return FORWARD_AND_BACKWARD * sum(forward)


def run(out: str, device: str = "cuda", rounds: int = 10, size: tuple[int, int, int] = (28, 1152, 16)) -> None:
    """Time every setting, print each row and write all as JSON.

    Args:
        out: JSON file to write; after each row.
        device: cuda; cpu for a test.
        rounds: steps that are timed, after three that are not.
        size: depth, width and heads.
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
    """Give back the memory of earlier models: blocks that are recomputed or compiled refer to themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def blocks(out: str, device: str = "cuda", batch: int = 8, pixels: int = 512, most: int = 64) -> None:
    """Forward and backward of the 10B's blocks, all recomputed, as deep as the GPU holds; print and write as JSON.

    Args:
        out: JSON file to write.
        device: cuda; cpu for a test.
        batch: images.
        pixels: side of a picture.
        most: blocks at most; doubled from 1, and what does not fit is halved towards what does.
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
    """Seconds of forward and backward pass of a stack of the 10B's blocks with its gradients."""
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
    """10^12 operations a second of a large matrix product in bfloat16."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = [timed(lambda: a @ b, device) for _ in range(20)]
    return 2 * n**3 / statistics.median(seconds[5:]) / 1e12


def alone(device: torch.device) -> None:
    """A process group of this process."""
    if not torch.distributed.is_initialized():
        kind = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(kind, store=torch.distributed.HashStore(), rank=0, world_size=1)


def called(device: torch.device) -> str:
    """A device's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def write(out: str, found: Found) -> None:
    """As JSON."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli({"run": run, "blocks": blocks}, as_positional=False)
