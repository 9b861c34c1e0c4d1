"""Computes, once, what does not change during training: VAE latents, and the LLM features of every caption.

Features are stored without padding; `lidit/data/cache.py` documents the files. One shard is one unit of work, written
under a temporary name and then renamed, so an interrupted run continues after the last finished shard. Any number of
processes may share the work, and none waits for another:

    lidit prep precompute --shards shards/train --out cache/train --vae bundled:vae --llms '[bundled:llm_llama]'
    torchrun --nproc-per-node 8 --no-python lidit prep precompute --device cuda ...      (or: srun lidit prep ...)
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save_file

from data_prep.processes import begin, own_device
from lidit.data.cache import IDENTITY, KINDS, shard_file
from lidit.data.index import ShardIndex
from lidit.data.remote import Copies
from lidit.disk.whole import replacing
from lidit.jobs.ranks import share
from lidit.models.llm import FrozenLLM
from lidit.models.vae import FrozenVAE
from lidit.pixels import to_tensor

PROBED = 64  # captions whose tokens are counted, to estimate the tokens per character


def precompute(
    shards: str | list[str],
    out: str,
    vae: str | FrozenVAE | None = "",
    llms: list[str | FrozenLLM] | None = None,
    captions: tuple[Literal["caption", "dense"], ...] = KINDS,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    batch_size: int = 64,
    device: str = "cpu",
    threads: int | None = None,
    rank: int | None = None,
    world: int | None = None,
    shard_cache: str | None = None,
    shard_cache_gb: float = 100.0,
) -> None:
    """Write a cache for a set of shards. A second run with the same arguments computes only what is missing.

    Args:
        shards: the shards, named in the ways that `ShardData` reads.
        out: folder to write, new or begun with the same arguments.
        vae: the VAE whose latents are stored, for drawn scenes bundled:vae: a name, or the class with its settings;
            null: no latents. It has to be said: latents take hours, and training refuses those of another VAE.
        llms: the LLMs whose features are stored, in the model's order: names, or the class with its settings.
        captions: the kinds of caption whose features are stored.
        dtype: number type of the stored latents and features.
        batch_size: number of images or captions computed at one time.
        device: where the models run; `cuda` with several processes on a node: each on its own GPU.
        threads: number of CPU threads; none: torch's own choice.
        rank: this process's number, from 0; it takes every `world`-th shard. None: as torchrun or srun set it, else 0.
        world: number of processes that share the work. None: as torchrun or srun set it, else 1.
        shard_cache: folder on a local disk for copies of remote shards.
        shard_cache_gb: largest size of the copies, in 10^9 bytes.

    Raises:
        ValueError: no VAE is said, there is nothing to compute, the folder holds another cache, or a sample cannot be
            read.
    """
    if vae == "":
        raise ValueError(
            "say --vae, the VAE whose latents are kept: that of the recipe, which for drawn scenes is bundled:vae; "
            "--vae null keeps no latents, only the features of --llms"
        )
    part = share(rank, world)
    if threads is not None:
        torch.set_num_threads(threads)
    index = ShardIndex(shards, copies=Copies(shard_cache, int(shard_cache_gb * 1e9)) if shard_cache else None)
    vae = FrozenVAE(vae) if isinstance(vae, str) else vae
    models = [FrozenLLM(llm) if isinstance(llm, str) else llm for llm in llms or []]
    if vae is None and not models:
        raise ValueError("nothing to compute: name a vae, llms or both")
    made = {
        "shards": index.digest,
        "dtype": dtype,
        "vae": vae.identity if vae else None,
        "llms": [llm.identity for llm in models],
        "captions": list(captions) if models else [],
    }
    begin(Path(out), IDENTITY, made, {}, "this cache is stale: delete it and run again, or write to another folder")
    run = _Run(index, Path(out), vae, models, made["captions"], getattr(torch, dtype), batch_size, own_device(device))
    run.all(*part)


class _Run:
    """One call of `precompute`, with what its steps share."""

    def __init__(
        self,
        index: ShardIndex,
        out: Path,
        vae: FrozenVAE | None,
        llms: list[FrozenLLM],
        captions: list[str],
        dtype: torch.dtype,
        batch_size: int,
        device: str,
    ) -> None:
        self.index, self.out, self.vae, self.llms, self.captions = index, out, vae, llms, captions
        self.dtype, self.batch_size, self.device = dtype, batch_size, device

    @torch.inference_mode()
    def all(self, rank: int, world: int) -> None:
        """Write the missing shards of a process's share, and print a line for each."""
        count = len(self.index.paths)
        missing = [s for s in range(count) if not shard_file(self.out, s).is_file()]
        todo, empty = [s for s in missing if s % world == rank], self.out / "empty.safetensors"
        mine = f"; this process, {rank} of {world}, computes {len(todo)}" if world > 1 else ""
        print(f"{self.out}: {count - len(missing)} of {count} shards are there{mine}", flush=True)
        if not todo and (rank or empty.is_file()):
            return
        print(f"{self.out}: {self.bytes() / 1e6:.1f} MB for all {len(self.index)} samples", flush=True)
        for model in (self.vae, *self.llms):
            if model is not None:
                model.load(self.device)
        if not rank:
            _save(self.empty(), empty)
        self.compute(todo)

    def compute(self, todo: list[int]) -> None:
        """Write these shards, and print a line for each."""
        start = time.monotonic()
        for done, shard in enumerate(todo, start=1):
            _save(self.shard(shard), shard_file(self.out, shard))
            left = (time.monotonic() - start) / done * (len(todo) - done)
            print(f"{self.index.paths[shard]}: shard {done} of {len(todo)}, about {left:.0f} s left", flush=True)
        for llm in self.llms:
            if llm.cut:
                print(f"{llm.name}: cut {llm.cut} captions at max_tokens={llm.prompts.max_tokens}", flush=True)

    def bytes(self) -> int:
        """Bytes of the whole cache without headers, before a model is read: latents exactly, features estimated."""
        values = 0
        if self.vae is not None:
            pixels = self.index.column("height").astype(np.int64) * self.index.column("width")
            values += int(pixels.sum()) // self.vae.factor**2 * self.vae.channels
        values += sum(self.tokens(llm, kind) * llm.width for llm in self.llms for kind in self.captions)
        return values * self.dtype.itemsize

    def tokens(self, llm: FrozenLLM, kind: str) -> int:
        """How many tokens an LLM makes of all captions of a kind, estimated from the tokens of a few captions."""
        chars, split = self.index.column(f"{kind}_chars"), llm.prompts.split
        probed = np.unique(np.linspace(0, len(chars) - 1, min(PROBED, len(chars))).astype(int))
        around = len(split("").ids)  # the template and the instruction
        splits = [split(text) for text in self.texts(probed, kind, whole=False)]
        per_char = sum(len(ids) + cut - around for ids, _, cut in splits) / max(1, int(chars[probed].sum()))
        return len(chars) * around + int(np.minimum(chars * per_char, llm.prompts.max_tokens).sum())

    def empty(self) -> dict[str, torch.Tensor]:
        """Features of the empty caption, which replaces dropped captions."""
        tensors = {}
        for i, llm in enumerate(self.llms):
            ((tokens, start),) = self.features(llm, [""])
            tensors |= {f"llm{i}/tokens": tokens, f"llm{i}/start": torch.tensor(start)}
        return tensors

    def shard(self, shard: int) -> dict[str, torch.Tensor]:
        """All tensors of one shard."""
        samples = np.arange(self.index.starts[shard], self.index.starts[shard + 1])
        tensors = self.latents(samples) if self.vae is not None else {}
        for kind in self.captions:
            texts = self.texts(samples, kind)
            for i, llm in enumerate(self.llms):
                rows = self.features(llm, texts)
                offsets = torch.tensor([0, *(len(tokens) for tokens, _ in rows)]).cumsum(0)
                name = f"llm{i}/{kind}"
                tensors[f"{name}/tokens"] = torch.cat([tokens for tokens, _ in rows])
                tensors |= {f"{name}/offsets": offsets, f"{name}/start": torch.tensor([start for _, start in rows])}
        return tensors

    def latents(self, samples: np.ndarray) -> dict[str, torch.Tensor]:
        """Latents by image shape; within a shape, samples are in the order of the index."""
        shapes = np.stack([self.index.column("height")[samples], self.index.column("width")[samples]], axis=1)
        tensors = {}
        for height, width in np.unique(shapes, axis=0).tolist():
            same = samples[(shapes == (height, width)).all(axis=1)]
            batches = [self.encode(same[i : i + self.batch_size]) for i in range(0, len(same), self.batch_size)]
            tensors[f"latent/{height}x{width}"] = torch.cat(batches)
        return tensors

    def encode(self, samples: np.ndarray) -> torch.Tensor:
        """Latents of samples of one shape."""
        images = to_tensor([self.index.image(s) for s in samples.tolist()])
        return self.vae.encode(images.to(self.device)).to("cpu", self.dtype)

    def features(self, llm: FrozenLLM, texts: list[str]) -> list[tuple[torch.Tensor, int]]:
        """Each caption's tokens without padding (l e), and where the caption begins; similar lengths share a batch."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        rows = [None] * len(texts)
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            tokens, mask, start = llm([texts[i] for i in batch])
            padding = mask.long().argmax(1)  # padding before the first token, if the LLM pads on the left
            for row, i in enumerate(batch):
                rows[i] = (tokens[row][mask[row]].to("cpu", self.dtype), int(start[row] - padding[row]))
        return rows

    def texts(self, samples: np.ndarray, kind: str, whole: bool = True) -> list[str]:
        """Captions of one kind, empty if a sample has none; `whole` fetches a remote shard whole."""
        return [self.index.text(s, whole).get(kind) or "" for s in samples.tolist()]


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a file under a temporary name, and rename it once it is whole."""
    with replacing(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        shutil.copymode(path.with_name(IDENTITY), partial)  # safetensors makes files that only their owner can read


if __name__ == "__main__":
    from jsonargparse import auto_cli

    try:
        auto_cli(precompute, as_positional=False)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
