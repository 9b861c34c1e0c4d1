"""A tiny TextToImage as `lidit fit` builds it, and batches that live in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from lidit.data.datamodule import Batch
from lidit.module import TextToImage

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": -1}


@pytest.fixture
def built(tmp_path: Path, tiny_llama: Path, tiny_qwen: Path, tiny_vae: Path) -> Callable[..., LightningCLI]:
    """Makes a trainer and an untrained model from what YAML could say; logs to CSV under `tmp_path`."""

    def build(*callbacks: dict, seed: int = 0, whiten: bool = False, **trainer: object) -> LightningCLI:
        llms = [{"name": str(folder), "dtype": "float32"} for folder in (tiny_llama, tiny_qwen)]
        encoder = {"heads": 4, "refiner_depth": 1, "mlp_ratio": 1.0, "whiten": whiten}
        backbone = {"depth": 1, "width": 32, "heads": 4}
        model = {
            "llms": llms,
            "vae": {"name": str(tiny_vae)},
            "prompt_encoder": {"class_path": "lidit.models.prompt_encoder.PromptEncoder", "init_args": encoder},
            "backbone": {"class_path": "lidit.models.lidit.LIDiT", "init_args": backbone},
            "objective": {"class_path": "lidit.objectives.RectifiedFlow"},
            "learning_rate": 0.01,
            "warmup_steps": 1,
        }
        logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}}
        settings = QUIET | {"logger": logger, "default_root_dir": str(tmp_path), "log_every_n_steps": 1}
        settings |= {"enable_checkpointing": False, "callbacks": list(callbacks)} | trainer
        return LightningCLI(
            TextToImage,
            run=False,
            args={"seed_everything": seed, "model": model, "trainer": settings},
            auto_configure_optimizers=False,
            save_config_callback=None,
        )

    return build


@pytest.fixture
def loader() -> Callable[..., DataLoader]:
    """Makes a loader of batches of two latents; those numbered `bad` hold a value that is not a number."""

    def make(count: int, bad: tuple[int, ...] = ()) -> DataLoader:
        batches = [batch(i, bad=i in bad) for i in range(count)]
        return DataLoader(batches, batch_size=None, collate_fn=as_it_is)

    return make


def batch(i: int, bad: bool) -> Batch:
    latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(i))
    if bad:
        latent[0, 0, 0, 0] = torch.nan
    return Batch([f"{i}-0", f"{i}-1"], ["a red circle", "a blue square above a star"], latent=latent)


def as_it_is(item: Batch) -> Batch:
    return item


@pytest.fixture
def logged(tmp_path: Path) -> Callable[[str], dict[int, float]]:
    """Reads one metric from the CSV log: value by step."""
    import csv

    def read(name: str) -> dict[int, float]:
        (file,) = tmp_path.rglob("metrics.csv")
        with file.open() as lines:
            return {int(row["step"]): float(row[name]) for row in csv.DictReader(lines) if row.get(name)}

    return read
