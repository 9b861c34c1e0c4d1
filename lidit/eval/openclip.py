"""CLIP and SigLIP models of open_clip as judges: they make embeddings of length 1 of images and prompts.

They are held outside the module tree, so no checkpoint of a training that they score holds their weights.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from lidit.assets import resolve
from lidit.eval.suite import BenchmarkError

# architecture and tag of the weights that published scores are computed with
CLIP = ("ViT-L-14-quickgelu", "openai")  # CLIP score, and the colours of GenEval
SIGLIP = ("ViT-SO400M-14-SigLIP-384", "webli")
CONFIG = "open_clip_config.json"
PREPROCESSING = {
    "mean": "image_mean",
    "std": "image_std",
    "interpolation": "image_interpolation",
    "resize_mode": "image_resize_mode",
}
UNREADABLE = (RuntimeError, ValueError, OSError, KeyError, TypeError, pickle.UnpicklingError, SafetensorError)

Images = Tensor | np.ndarray | Sequence[np.ndarray]


class OpenCLIP:
    """A CLIP or SigLIP with the preprocessing and tokenizer of its training, read at the first use or by `load`.

    A prompt longer than the model reads is cut before its end token, since CLIP pools there. `cut` counts such prompts,
    and a warning names the first.

    Args:
        name: architecture, as in open_clip.list_models(). A folder or a hub model has its own, and this is ignored.
        pretrained: the weights, one of
            a tag of that architecture, as in open_clip.list_pretrained();
            `hf-hub:OWNER/NAME`, a model on the hub in open_clip's format;
            a folder with open_clip_config.json, weights (open_clip_model.safetensors or another .safetensors, .bin or
            .pth), and the tokenizer if the config names one (hf_tokenizer_name);
            `bundled:NAME`, such a folder within lidit;
            a checkpoint file of that architecture, with the preprocessing of the architecture's tags.
        device: device to run on; the embeddings are on it, too.
        batch_size: number of images or prompts that run at one time.
    """

    def __init__(
        self,
        name: str = CLIP[0],
        pretrained: str = CLIP[1],
        device: str | torch.device = "cpu",
        batch_size: int = 32,
    ) -> None:
        self.name, self.pretrained = name, pretrained
        self.device, self.batch_size = torch.device(device), batch_size
        self.cut = 0
        self._model: Any = None
        self._preprocess: Any = None
        self._tokenizer: Any = None

    def describe(self) -> dict[str, str]:
        """What a result says about its judge."""
        own = self._source()[0].startswith(("local-dir:", "hf-hub:"))
        return {"pretrained": self.pretrained} if own else {"name": self.name, "pretrained": self.pretrained}

    def load(self, device: str | torch.device | None = None) -> OpenCLIP:
        """Read the weights at the first call, and put them on a device. Random states stay as they are.

        Raises:
            BenchmarkError: there is no such model, or it cannot be read or fetched.
        """
        self.device = torch.device(device or self.device)
        if self._model is None:
            with torch.random.fork_rng(devices=[]):  # open_clip first fills the model with random numbers
                self._read()
        self._model.to(self.device)
        return self

    @property
    def context_length(self) -> int:
        """Largest number of tokens of a prompt, including the start and end tokens."""
        return int(self.load()._tokenizer.context_length)

    @property
    def sigmoid(self) -> bool:
        """Whether the model is a SigLIP, which was trained on each pair by itself: only then its logits have a bias."""
        return self.load()._model.logit_bias is not None

    @torch.no_grad()
    def images(self, images: Images) -> Float[Tensor, "b e"]:
        """Embeddings of uint8 RGB images: a tensor b 3 h w, an array b h w 3, or a list of arrays h w 3.

        Raises:
            ValueError: there are no images, or they have another type or shape.
        """
        arrays = as_arrays(images)
        self.load()
        rows = []
        for start in range(0, len(arrays), self.batch_size):
            pictures = [Image.fromarray(array) for array in arrays[start : start + self.batch_size]]
            pixels = torch.stack([self._preprocess(picture) for picture in pictures])
            rows.append(self._embed(self._model.encode_image, pixels))
        return torch.cat(rows)

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Float[Tensor, "b e"]:
        """Embeddings of prompts.

        Raises:
            ValueError: there are no prompts.
        """
        ids = self.tokens(prompts)
        return torch.cat([self._embed(self._model.encode_text, part) for part in ids.split(self.batch_size)])

    def tokens(self, prompts: Sequence[str]) -> Int[Tensor, "b l"]:
        """Token ids, padded to the context length as by the model's tokenizer, with an end token in every row.

        Raises:
            ValueError: there are no prompts.
        """
        if not prompts or isinstance(prompts, str):  # to Python, a text is a sequence of letters
            raise ValueError(f"{self.pretrained} reads a list of at least one prompt, got {prompts!r}")
        length = self.context_length
        ids = self._tokenizer(list(prompts))
        for row, prompt in enumerate(prompts):
            whole, end = self._whole(prompt)
            if len(whole) > length:
                self._count(len(whole), length)
                if end is not None and end not in ids[row]:
                    ids[row, -1] = end
        return ids

    def _embed(self, encode: Any, batch: Tensor) -> Float[Tensor, "b e"]:
        with torch.autocast(self.device.type, enabled=False):  # a surrounding training may run in half precision
            return encode(batch.to(self.device), normalize=True).float()

    def _whole(self, prompt: str) -> tuple[list[int], int | None]:
        """A prompt's tokens before it is cut, and the id of its end token, if it has one."""
        if hasattr(self._tokenizer, "eot_token_id"):  # CLIP's own tokenizer
            ids = self._tokenizer.encode(prompt)
            return [self._tokenizer.sot_token_id, *ids, self._tokenizer.eot_token_id], self._tokenizer.eot_token_id
        inner, clean = self._tokenizer.tokenizer, getattr(self._tokenizer, "clean_fn", str)
        ids = inner(clean(prompt), verbose=False)["input_ids"]
        return ids, ids[-1] if ids and ids[-1] in inner.all_special_ids else None

    def _count(self, tokens: int, length: int) -> None:
        if not self.cut:
            warnings.warn(
                f"{self.pretrained}: a prompt of {tokens} tokens is cut to {length}, and its end token stays; later "
                "prompts are only counted",
                stacklevel=4,
            )
        self.cut += 1

    def _source(self) -> tuple[str, str | None]:
        """The name and the pretrained argument for open_clip."""
        import open_clip

        place = Path(resolve(self.pretrained)).expanduser()
        if place.is_dir():
            return f"local-dir:{place}", None
        if self.pretrained.startswith("hf-hub:"):
            return self.pretrained, None
        if open_clip.get_model_config(self.name) is None:
            raise BenchmarkError(f"open_clip has no architecture {self.name}; open_clip.list_models() names them")
        if place.is_file():
            return self.name, str(place)
        tags = open_clip.list_pretrained_tags_by_model(self.name)
        if self.pretrained.lower().replace("-", "_") not in tags:
            raise BenchmarkError(
                f"{self.pretrained} is no file, no folder, no hf-hub:OWNER/NAME and no tag of {self.name}; tags are: "
                f"{', '.join(tags) or 'none'}"
            )
        _refuse_other_gelu(self.name, self.pretrained)
        return self.name, self.pretrained

    def _read(self) -> None:
        import open_clip

        name, pretrained = self._source()
        settings = _preprocessing(name) if pretrained and Path(pretrained).is_file() else {}
        try:
            model, self._preprocess = open_clip.create_model_from_pretrained(name, pretrained, **settings)
            self._tokenizer = open_clip.get_tokenizer(name)
        except UNREADABLE as error:
            reason = str(error).partition("\n")[0]
            raise BenchmarkError(
                f"open_clip cannot load {self.pretrained}: {reason}; without a network, name a folder with {CONFIG}, "
                "weights and tokenizer"
            ) from error
        self._model = model.eval().requires_grad_(False)


def as_arrays(images: Images) -> Sequence[np.ndarray]:
    """Images as arrays of height x width x 3.

    Raises:
        ValueError: there are no images, or they are not uint8 RGB images.
    """
    if isinstance(images, Tensor):
        images = images.movedim(1, -1).cpu().numpy() if images.ndim == 4 else images.cpu().numpy()
    if not len(images):
        raise ValueError("there are no images to score")
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(
                f"give uint8 RGB images, a tensor b 3 h w or arrays h w 3, not {image.dtype} {image.shape}"
            )
    return [np.ascontiguousarray(image) for image in images]


def _refuse_other_gelu(name: str, tag: str) -> None:
    """Refuse a mismatch that open_clip only warns about, though scores would be wrong."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    quick = get_pretrained_cfg(name, tag).get("quick_gelu", False)
    if quick and open_clip.get_model_config(f"{name}-quickgelu") is not None:
        raise BenchmarkError(f"{name} with {tag} was trained with QuickGELU; name {name}-quickgelu")


def _preprocessing(name: str) -> dict[str, Any]:
    """How to preprocess images for a checkpoint file, which does not say it: as for all tags of its architecture.

    Raises:
        BenchmarkError: the tags differ.
    """
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    configs = [get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    ways = [{new: config[key] for key, new in PREPROCESSING.items() if config.get(key)} for config in configs]
    if len({json.dumps(way) for way in ways}) > 1:
        raise BenchmarkError(
            f"files of {name} are preprocessed in different ways; put this one in a folder with an {CONFIG} that has "
            "preprocess_cfg, and name the folder"
        )
    return ways[0] if ways else {}
