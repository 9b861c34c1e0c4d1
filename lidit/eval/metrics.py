"""Scores of images by pretrained encoders, as torchmetrics metrics that reduce over ranks.

None of them is in the paper; each class says what exactly its number is. Their encoders stay outside the module tree:
a metric holds sums, so that no checkpoint carries an encoder and `.to` moves the sums alone.

Those over open_clip share its work where they share an encoder: `encoder.images` and `encoder.texts` once, and the
embeddings in place of the images and the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance

from lidit.eval.openclip import SIGLIP, Images, OpenCLIP, as_arrays
from lidit.eval.suite import BenchmarkError

QUALITY = ("Good photo.", "Bad photo.")


class Mean(Metric):
    """The mean of what is added, over all updates and ranks; nan before any."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def add(self, values: Float[Tensor, " b"]) -> None:
        """Count these in; to be called within `update`."""
        self.total += values.double().sum().to(self.device)
        self.count += len(values)

    def compute(self) -> Tensor:
        """The mean as a scalar."""
        return (self.total / self.count).float()


class Agreement(Mean):
    """The mean of 100 cos between each image's embedding and its prompt's.

    Args:
        encoder: a CLIP or SigLIP of open_clip.
        sigmoid: whether it has to be a SigLIP, or may not be.
    """

    def __init__(self, encoder: OpenCLIP, sigmoid: bool) -> None:
        super().__init__()
        self.encoder, self.sigmoid = encoder, sigmoid

    def scores(self, images: Images, prompts: Sequence[str] | Tensor) -> Float[Tensor, " b"]:
        """100 cos of each image with its prompt, in [-100, 100]; nothing is counted in.

        Args:
            images: uint8 b 3 h w, or arrays h w 3, or their embeddings b e of `encoder.images`.
            prompts: one for each image, or their embeddings b e of `encoder.texts`.

        Raises:
            ValueError: not one prompt for each image, or no images.
            BenchmarkError: the encoder cannot be read, or is of the other kind.
        """
        if len(images) != len(prompts):
            raise ValueError(f"each image has a prompt, but there are {len(images)} and {len(prompts)}")
        _check_kind(self, self.encoder, self.sigmoid)
        texts = prompts if isinstance(prompts, Tensor) else self.encoder.texts(prompts)
        return 100 * (_embedded(self.encoder, images) * texts).sum(-1)

    def update(self, images: Images, prompts: Sequence[str] | Tensor) -> None:
        """Count in the scores of images, given as to `scores`."""
        self.add(self.scores(images, prompts))


class CLIPScore(Agreement):
    """CLIPScore as torchmetrics defines it: 100 cos per image, their mean, and 0 if that is less.

    The cosine is that of the image's and its prompt's embeddings. A single image may be below 0; only the mean is kept
    from it. Hessel et al. (2021), whose score it is, give 2.5 max(cos, 0) per image instead. Longer prompts than the
    model reads (77 tokens) are cut with their end token kept.

    Args:
        encoder: a CLIP of open_clip; by default ViT-L-14-quickgelu with OpenAI's weights, as in torchmetrics.
    """

    def __init__(self, encoder: OpenCLIP | None = None) -> None:
        super().__init__(encoder or OpenCLIP(), sigmoid=False)

    def compute(self) -> Tensor:
        """The mean, no less than 0."""
        return super().compute().clamp(min=0)


class SigLIPScore(Agreement):
    """The mean over images of SigLIP's cosine x 100, which may be below 0; it is not sigmoid(logit).

    Its numbers are not on CLIPScore's scale. Prompts are padded to the context length (64 tokens), as SigLIP was
    trained, and longer ones are cut with their end token kept.

    Args:
        encoder: a SigLIP of open_clip; by default ViT-SO400M-14-SigLIP-384 of webli.
    """

    def __init__(self, encoder: OpenCLIP | None = None) -> None:
        super().__init__(encoder or OpenCLIP(*SIGLIP), sigmoid=True)


class CLIPIQA(Mean):
    """CLIP-IQA (Wang et al., 2023) with any CLIP: the mean probability of "Good photo." over "Bad photo.", in [0, 1].

    The probability is the softmax of 100 cos over the two prompts. DEVIATION: the paper takes a ResNet-50 without
    position embeddings, at the image's own size; an open_clip model gets its usual input.

    Args:
        encoder: a CLIP of open_clip; by default ViT-L-14-quickgelu with OpenAI's weights.
    """

    def __init__(self, encoder: OpenCLIP | None = None) -> None:
        super().__init__()
        self.encoder = encoder or OpenCLIP()

    def scores(self, images: Images) -> Float[Tensor, " b"]:
        """Each image's probability of being good; nothing is counted in.

        Args:
            images: uint8 b 3 h w, or arrays h w 3, or their embeddings b e of `encoder.images`.

        Raises:
            ValueError: no images.
            BenchmarkError: the encoder cannot be read, or is a SigLIP.
        """
        _check_kind(self, self.encoder, sigmoid=False)
        logits = 100 * _embedded(self.encoder, images) @ self.encoder.texts(QUALITY).T
        return logits.softmax(-1)[:, 0]

    def update(self, images: Images, prompts: Sequence[str] | Tensor | None = None) -> None:
        """Count in the scores of images; prompts, which other scores take, play no part."""
        self.add(self.scores(images))


class Diversity(Mean):
    """How different a prompt's images are: their mean pairwise cosine distance, 1 - cos, in [0, 2]; the prompts' mean.

    All images of a prompt come in one update.

    Args:
        features: network of uint8 images b 3 h w to features b e, such as `TimmFeatures`.
    """

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = Outside(features)

    def scores(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " p"]:
        """Each prompt's distance, in the order in which the prompts first come; nothing is counted in.

        Raises:
            ValueError: not one prompt for each image, no images, or only one of a prompt.
        """
        if len(images) != len(prompts):
            raise ValueError(f"each image has a prompt, but there are {len(images)} and {len(prompts)}")
        features = F.normalize(self.features(as_tensor(images)).double(), dim=-1)
        rows = {prompt: [i for i, other in enumerate(prompts) if other == prompt] for prompt in dict.fromkeys(prompts)}
        if alone := [prompt for prompt, places in rows.items() if len(places) < 2]:
            raise ValueError(f"diversity needs two images of a prompt in one update, but {alone[0]!r} has one")
        return torch.stack([_mean_distance(features[places]) for places in rows.values()]).float()

    def update(self, images: Images, prompts: Sequence[str]) -> None:
        """Count in the distances of prompts, given as to `scores`."""
        self.add(self.scores(images, prompts))


class FID(FrechetInceptionDistance):
    """Frechet distance of features' means and covariances between real and drawn images (Heusel et al., 2017).

    It depends on the reference set, the count of images, their resolution and the resize filter, all to be stated with
    it. Only with Inception is it the FID of other papers; needs more images than features to be meaningful.

    Args:
        features: network of uint8 images b 3 h w to features b e, with `num_features`, such as `TimmFeatures`; by
            default Inception-v3 of torch-fidelity, its 2,048 pooled features.
        weights: file of Inception's weights; by default torch-fidelity fetches them.

    Raises:
        BenchmarkError: Inception is asked for, and torch-fidelity is not installed or its weights cannot be read.
    """

    def __init__(self, features: nn.Module | None = None, weights: str | None = None) -> None:
        super().__init__(Outside(inception(weights) if features is None else features))
        self.orig_dtype = torch.float32  # a rank without images computes too

    def update(self, images: Images, real: bool) -> None:
        """Count in real or drawn images, given as uint8 b 3 h w or arrays h w 3.

        Raises:
            ValueError: no images, or of another type or shape.
        """
        super().update(as_tensor(images).to(self.device), real)


class TimmFeatures(nn.Module):
    """Pooled features of a timm image encoder, for `FID` and `Diversity`.

    Images are squashed to its input size by antialiased bicubic resampling, not cropped, and normalised as it was
    trained.

    Args:
        name: of timm, with its tag (`vit_small_patch14_dinov2.lvd142m`), `hf-hub:OWNER/NAME`, or a folder with timm's
            config.json and weights.
        pretrained: read the weights; without, they are random.

    Raises:
        BenchmarkError: timm does not know the name, or cannot read or fetch the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, pretrained: bool = True) -> None:
        import timm

        super().__init__()
        folder = Path(name).expanduser()
        source = f"local-dir:{folder}" if folder.is_dir() else name
        try:
            self.model = timm.create_model(source, pretrained=pretrained, num_classes=0).eval().requires_grad_(False)
        except (RuntimeError, ValueError, OSError, KeyError) as error:
            reason = str(error).partition("\n")[0]
            raise BenchmarkError(f"timm cannot give {name} ({reason}); timm.list_pretrained() names models") from error
        config = timm.data.resolve_model_data_config(self.model)
        self.size = tuple(config["input_size"][1:])
        self.num_features = int(getattr(self.model, "head_hidden_size", None) or self.model.num_features)
        self.register_buffer("mean", torch.tensor(config["mean"])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(config["std"])[:, None, None], persistent=False)

    @torch.no_grad()
    def forward(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        """Features of images, on the encoder's device."""
        pixels = images.to(self.mean.device).float()
        pixels = F.interpolate(pixels, self.size, mode="bicubic", antialias=True).clamp(0, 255) / 255
        return self.model((pixels - self.mean) / self.std)


class Outside(nn.Module):
    """A network that is used but not owned: no parameters, no state, not moved; features come back to the images.

    Args:
        network: of images b 3 h w to features b e.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._held = (network.eval(),)  # in a tuple it is no submodule
        if hasattr(network, "num_features"):
            self.num_features = network.num_features

    @torch.no_grad()
    def forward(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        """Features of images, on the images' device."""
        (network,) = self._held
        first = next(network.parameters(), None)
        with torch.autocast(images.device.type, enabled=False):
            return network(images if first is None else images.to(first.device)).to(images.device)


def inception(weights: str | None = None) -> nn.Module:
    """FID's Inception-v3, with its 2,048 pooled features.

    Raises:
        BenchmarkError: torch-fidelity is not installed, or the weights cannot be read or fetched.
    """
    if find_spec("torch_fidelity") is None:
        raise BenchmarkError("FID with Inception needs torch-fidelity: pip install torch-fidelity, or pass features")
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], weights)
    except (OSError, RuntimeError) as error:
        raise BenchmarkError(f"Inception's weights cannot be read ({error}); pass their file as weights") from error
    network.num_features = 2048
    return network


def as_tensor(images: Images) -> UInt8[Tensor, "b 3 h w"]:
    """Images of one size as a tensor.

    Raises:
        ValueError: there are none, or they are no uint8 RGB images of one size.
    """
    right = isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3
    if right and len(images):
        return images
    arrays = as_arrays(images)
    if len({array.shape for array in arrays}) > 1:
        raise ValueError("images of one update have one size")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def _embedded(encoder: OpenCLIP, images: Images) -> Float[Tensor, "b e"]:
    if isinstance(images, Tensor) and images.ndim == 2 and images.is_floating_point():
        return images
    return encoder.images(images)


def _check_kind(metric: Any, encoder: OpenCLIP, sigmoid: bool) -> None:
    if encoder.sigmoid != sigmoid:
        kinds = ("a SigLIP", "no SigLIP")
        raise BenchmarkError(
            f"{encoder.pretrained} is {kinds[sigmoid]}; {type(metric).__name__} needs {'one' if sigmoid else 'a CLIP'}"
        )


def _mean_distance(features: Float[Tensor, "n e"]) -> Float[Tensor, ""]:
    """Of all pairs of rows of length 1."""
    count = len(features)
    return 1 - (features.sum(0).square().sum() - count) / (count * (count - 1))
