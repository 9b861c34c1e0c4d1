"""Made-up files for timing data loaders: JPEGs as large as photographs, latents, features, and shards of these."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from lidit.data.cache import IDENTITY, shard_file
from lidit.data.index import ShardIndex
from lidit.data.tars import index_path, scan

SHARDS = 8
LATENT, WIDTH, TOKENS = (16, 32, 32), 4096, (20, 100)  # a 256 px latent; width of an 8B LLM; caption lengths


def photo(seed: int, pixels: int) -> bytes:
    """A JPEG of smooth colours with some grain, which has about as many bytes as a photograph of this size."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize(
        (pixels, pixels), Image.Resampling.BICUBIC
    )
    grain = np.asarray(smooth) + rng.normal(0, 8, (pixels, pixels, 1))
    buffer = io.BytesIO()
    Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def computed(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A random latent and random features of a caption, both float16."""
    rng = np.random.default_rng(seed)
    tokens = rng.standard_normal((int(rng.integers(*TOKENS)), WIDTH), np.float32)
    return rng.standard_normal(LATENT, np.float32).astype(np.float16), tokens.astype(np.float16)


def npy(array: np.ndarray) -> bytes:
    """An array as the bytes of an npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_shards(folder: Path, samples: list[dict[str, bytes]]) -> None:
    """Write samples into tars, with a caption for samples without one, and an index if they have images."""
    folder.mkdir(parents=True)
    caption = json.dumps({"caption": "a smooth field of colours with some grain, as a photograph has it"}).encode()
    for shard in range(min(SHARDS, len(samples))):
        tar = folder / f"{shard:05d}.tar"
        with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
            for i in range(shard, len(samples), SHARDS):
                for kind, data in ({"json": caption} | samples[i]).items():
                    info = tarfile.TarInfo(f"{i:08d}.{kind}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        if "jpg" in samples[0]:
            np.savez(index_path(tar), **scan(tar), tar_bytes=tar.stat().st_size)


def write_cache(folder: Path, index: ShardIndex) -> None:
    """Write a cache as `lidit prep precompute` does, but of random numbers."""
    folder.mkdir()
    for shard, (first, last) in enumerate(itertools.pairwise(index.starts.tolist())):
        latents, tokens = zip(*(computed(i) for i in range(first, last)), strict=True)
        offsets = np.cumsum([0, *map(len, tokens)])
        parts = {f"latent/{8 * LATENT[1]}x{8 * LATENT[2]}": np.stack(latents), "llm0/caption/offsets": offsets}
        parts |= {"llm0/caption/tokens": np.concatenate(tokens), "llm0/caption/start": np.zeros(last - first, np.int64)}
        save_file({name: torch.from_numpy(array) for name, array in parts.items()}, shard_file(folder, shard))
    save_file({"llm0/tokens": torch.zeros(1, WIDTH), "llm0/start": torch.tensor(0)}, folder / "empty.safetensors")
    identity = {"shards": index.digest, "dtype": "float16", "vae": {}, "llms": [{}], "captions": ["caption"]}
    (folder / IDENTITY).write_text(json.dumps(identity))
