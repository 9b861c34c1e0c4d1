"""A checkpoint becomes a folder of safetensors and configuration, which `Pipeline.load` reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from lidit.checkpoint import check_llms, read
from lidit.disk.whole import replacing
from lidit.pipeline import CONFIG, WEIGHTS, build, place


def export(
    checkpoint: str,
    out: str,
    ema: bool = True,
    dtype: Literal["float32", "bfloat16"] = "float32",
    trust: list[str] | str | None = None,
) -> None:
    """Write a folder of safetensors and configuration from a checkpoint; `lidit sample --checkpoint` reads it.

    Args:
        checkpoint: a checkpoint of `lidit fit`, or a run's folder for its newest checkpoint.
        out: the folder to write; it must not exist.
        ema: write the averaged weights instead of the trained ones.
        dtype: precision of the stored weights.
        trust: modules besides lidit whose classes the checkpoint may name, such as `--trust mine`.
    """
    if Path(out).exists():
        raise ValueError(f"{out} exists; choose another folder or remove it first")
    config, weights, llms, sizes, precision = read(place(checkpoint), ema)
    model = build(config, trust or ())
    check_llms(llms, model.llms, checkpoint)
    model.check_weights(weights, checkpoint)
    trained, count = {name for name, _ in model.skeleton().named_parameters()}, sum(w.numel() for w in weights.values())
    record = {"model": config, "prompts": [llm.identity for llm in model.llms], "ema": ema, "sizes": sizes}
    record |= {"precision": precision} if precision else {}
    with replacing(Path(out)) as folder:
        folder.mkdir()
        (folder / CONFIG).write_text(json.dumps(record, indent=2) + "\n")
        save_file(converted(weights, trained, getattr(torch, dtype)), folder / WEIGHTS)
        shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors lets nobody but the writer read its files
    print(f"{out}: {count / 1e6:.1f}M parameters in {dtype}")


def converted(weights: dict[str, Tensor], trained: set[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Trained weights in another precision, and buffers as they are; each is taken out of `weights`, to save memory."""
    result = {}
    for name in list(weights):
        weight = weights.pop(name)
        result[name] = (weight.to(dtype) if name in trained else weight).contiguous()
    return result
