"""Writes synthetic captions beside the original ones, with any image-text-to-text model that transformers knows.

The images are copied byte by byte into new shards; `dense` in a sample's JSON is the new caption, and `caption` stays
as it is. Training mixes the two by `dense_probability`. One shard is one unit of work: an interrupted run continues
after the last finished shard, and any number of processes may share the work.

    lidit prep caption --shards shards/raw --out shards/train --model llava-hf/llava-1.5-7b-hf --device cuda
    torchrun --nproc-per-node 8 --no-python lidit prep caption ...      (or: srun lidit prep caption ...)
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
import time
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from data_prep.processes import begin, own_device
from data_prep.shard import finished
from lidit.data.index import MANIFEST, ShardIndex, index_path, scan
from lidit.disk.whole import replacing
from lidit.jobs.ranks import share
from lidit.models.llm import quiet
from lidit.models.source import describe, find_file, load_name

# UNSTATED: the paper does not say what it asked CogVLM; we ask for what its instruction to the LLM names.
INSTRUCTION = (
    "Describe this image in one paragraph: the color, shape, size, texture and quantity of the objects, any text, "
    "and the spatial relationships between them. Say only what can be seen."
)


def caption(
    shards: str | list[str],
    out: str,
    model: str,
    instruction: str = INSTRUCTION,
    max_new_tokens: int = 256,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    revision: str | None = None,
    batch_size: int = 16,
    device: str = "cpu",
    rank: int | None = None,
    world: int | None = None,
) -> None:
    """Write shards with synthetic captions. A second run with the same arguments writes only what is missing.

    A sample whose image cannot be decoded is named, counted and copied as it is.

    Args:
        shards: the shards, named in the ways that `ShardData` reads.
        out: folder to write, new or begun with the same arguments.
        model: Hugging Face id or folder of the model that writes the captions.
        instruction: what the model is asked about each image; `{caption}` stands for the sample's original caption.
        max_new_tokens: largest number of tokens of a caption; captions that reach it are counted.
        dtype: number type that the model computes in.
        revision: branch, tag or commit on the hub.
        batch_size: number of images captioned at one time.
        device: where the model runs; `cuda` with several processes on a node: each on its own GPU.
        rank: this process's number, from 0; it takes every `world`-th shard. None: as torchrun or srun set it, else 0.
        world: number of processes that share the work. None: as torchrun or srun set it, else 1.

    Raises:
        ValueError: the folder holds other files, the model is of another kind, or a shard cannot be read.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens} and batch_size is {batch_size}; both are at least 1")
    rank, world = share(rank, world)
    if remote := [name for name in ([shards] if isinstance(shards, str) else shards) if "://" in name]:
        raise ValueError(f"{remote[0]} is remote; copy the shards here to caption them")
    index, folder = ShardIndex(shards), Path(out)
    captioner = Captioner(model, instruction, max_new_tokens, dtype, revision)
    tars = [folder / f"{i:05d}.tar" for i in range(len(index.paths))]
    made = {"source": "caption", "shards": index.digest, **captioner.identity}
    begin(folder, MANIFEST, made, {"tars": [tar.name for tar in tars]}, "write to another folder or delete this one")
    todo = [i for i in range(rank, len(tars), world) if not finished(tars[i])]
    print(f"{folder}: process {rank} of {world} captions {len(todo)} of {len(tars)} shards", flush=True)
    if todo:
        captioner.load(own_device(device))
    start = time.monotonic()
    for done, shard in enumerate(todo, start=1):
        texts = _captions(index, shard, captioner, batch_size)
        _write(index, index.paths[shard], texts, tars[shard])
        left = (time.monotonic() - start) / done * (len(todo) - done)
        print(f"{tars[shard]}: shard {done} of {len(todo)}, about {left:.0f} s left", flush=True)
    if captioner.cut or captioner.empty:
        print(f"{captioner.cut} captions were cut at {max_new_tokens} tokens; {captioner.empty} are empty")


class Captioner:
    """An image-text-to-text model with its processor and one instruction.

    Args:
        name: Hugging Face id or folder of the model.
        instruction: what the model is asked about each image; `{caption}` stands for the original caption.
        max_new_tokens: largest number of tokens of a caption.
        dtype: number type that the model computes in.
        revision: branch, tag or commit on the hub.
    """

    def __init__(self, name: str, instruction: str, max_new_tokens: int, dtype: str, revision: str | None) -> None:
        self.name, self.instruction, self.max_new_tokens = name, instruction, max_new_tokens
        self.dtype, self.revision = getattr(torch, dtype), revision
        self.cut = self.empty = 0  # captions that reached max_new_tokens, and captions without a word
        self._model: Any = None

    @cached_property
    def _config_file(self) -> Path:
        return find_file(self.name, "config.json", self.revision)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that captions depend on.

        Raises:
            ValueError: the model is not one that reads images and writes text.
        """
        kind = json.loads(self._config_file.read_text()).get("model_type")
        if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise ValueError(
                f"{self.name}: model type {kind!r} is not an image-text-to-text model of transformers; "
                "name one that is, for example llava-hf/llava-1.5-7b-hf"
            )
        return {
            "model": describe(self.name, self._config_file),
            "instruction": self.instruction,
            "max_new_tokens": self.max_new_tokens,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @cached_property
    def _processor(self) -> Any:
        processor = AutoProcessor.from_pretrained(load_name(self.name), revision=self.revision)
        if not getattr(processor, "chat_template", None):
            raise ValueError(f"the processor of {self.name} has no chat template; put a chat_template.jinja beside it")
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"  # so that the answer follows the question directly
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return processor

    def load(self, device: str = "cpu") -> Captioner:
        """Read the processor and the weights, and put the weights on a device.

        Raises:
            ValueError: the model has no chat template, or its weights are incomplete.
        """
        name, _ = load_name(self.name), self._processor
        with quiet():
            model, report = AutoModelForImageTextToText.from_pretrained(
                name, revision=self.revision, dtype=self.dtype, output_loading_info=True
            )
        if wrong := {kind: report[kind] for kind in ("missing_keys", "mismatched_keys") if report[kind]}:
            raise ValueError(f"the weights of {self.name} do not fit its config.json: {wrong}; fetch it again, whole")
        self._model = model.eval().requires_grad_(False).to(device)
        return self

    @torch.inference_mode()
    def __call__(self, images: list[np.ndarray], originals: list[str]) -> list[str]:
        """A caption for each image: the likeliest words, on one line.

        Args:
            images: uint8 (H W 3) each, of any sizes.
            originals: the images' original captions, for an instruction that holds `{caption}`.
        """
        turns = [self._ask(image, original) for image, original in zip(images, originals, strict=True)]
        inputs = self._processor.apply_chat_template(
            turns,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self._model.device, self.dtype)
        pad = self._processor.tokenizer.pad_token_id
        ids = self._model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, pad_token_id=pad)
        said = ids[:, inputs["input_ids"].shape[1] :]
        texts = [self._clean(text) for text in self._processor.batch_decode(said, skip_special_tokens=True)]
        self.cut += int((~torch.isin(said, self._ends(said.device)).any(1)).sum())
        self.empty += texts.count("")
        return texts

    def _ask(self, image: np.ndarray, original: str) -> list[dict]:
        text = self.instruction.replace("{caption}", original)
        return [
            {
                "role": "user",
                "content": [{"type": "image", "image": Image.fromarray(image)}, {"type": "text", "text": text}],
            }
        ]

    def _ends(self, device: torch.device) -> torch.Tensor:
        """The tokens that end a caption."""
        ends = self._model.generation_config.eos_token_id
        return torch.tensor([] if ends is None else ends, dtype=torch.long, device=device)

    @staticmethod
    def _clean(text: str) -> str:
        """A caption on one line, without a last character that the limit cut in two."""
        return " ".join(text.rstrip("\ufffd").split())


def _captions(index: ShardIndex, shard: int, captioner: Captioner, batch_size: int) -> dict[int, str]:
    """A caption for each sample of a shard whose image can be read; images of similar size share a batch."""
    samples = np.arange(index.starts[shard], index.starts[shard + 1])
    area = index.column("width")[samples].astype(np.int64) * index.column("height")[samples]
    samples = samples[np.argsort(area, kind="stable")]
    texts = {}
    for first in range(0, len(samples), batch_size):
        images = _images(index, samples[first : first + batch_size].tolist())
        if images:
            texts |= zip(images, _said(index, images, captioner), strict=True)
    if unreadable := len(samples) - len(texts):
        print(f"{index.paths[shard]}: {unreadable} images cannot be decoded and get no caption", flush=True)
    return texts


def _said(index: ShardIndex, images: dict[int, np.ndarray], captioner: Captioner) -> list[str]:
    """The captions of a batch. A processor may refuse an image, such as one that is far wider than high."""
    try:
        return captioner(list(images.values()), [index.text(sample)["caption"] for sample in images])
    except ValueError as error:
        keys = ", ".join(f"{index.key(sample)} ({i.shape[1]}x{i.shape[0]})" for sample, i in images.items())
        raise ValueError(
            f"{captioner.name} cannot caption one of {keys}: {error}; leave it out of the shards"
        ) from error


def _images(index: ShardIndex, samples: list[int]) -> dict[int, np.ndarray]:
    """The images that can be decoded; the others are named in the output."""
    images = {}
    for sample in samples:
        try:
            images[sample] = index.image(sample)
        except ValueError as error:
            print(error, flush=True)
    return images


def _write(index: ShardIndex, source: Path, texts: dict[int, str], target: Path) -> None:
    """Copy a shard with the new captions, and index it. The tar comes last, so a tar that exists is whole."""
    new = {}
    for sample, text in texts.items():
        record = json.dumps(index.text(sample) | {"dense": text}, ensure_ascii=False)
        new[int(index.column("text_offset")[sample])] = record.encode()
    with replacing(target) as partial:
        _copy(source, partial, new)
        with replacing(index_path(target)) as partial_index, partial_index.open("wb") as file:
            np.savez(file, **scan(partial), tar_bytes=partial.stat().st_size)


def _copy(source: Path, target: Path, new: dict[int, bytes]) -> None:
    """Copy a tar's files, but those that begin at an offset in `new` get its bytes. Equal files give equal tars."""
    with tarfile.open(source, "r:") as there, tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for member in there:
            if member.isfile():
                info, data = tarfile.TarInfo(member.name), new.get(member.offset_data)
                info.size = member.size if data is None else len(data)
                archive.addfile(info, there.extractfile(member) if data is None else io.BytesIO(data))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    try:
        auto_cli(caption, as_positional=False)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
