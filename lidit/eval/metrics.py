"""Scores of images by pretrained encoders, as torchmetrics metrics that reduce over ranks.

None of them is in the paper; each class says what exactly its number is. Encoders stay outside the module tree: a
metric holds only sums, so no checkpoint holds an encoder, and `.to` moves the sums alone.

Metrics with the same open_clip encoder can share its work: compute `encoder.images` and `encoder.texts` once, and give
the embeddings in place of images and prompts.
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
    """The mean of all values added, over all updates and ranks; nan before the first."""

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
        """Add values to the mean; call this within `update`."""
        self.total += values.double().sum().to(self.device)
        self.count += len(values)

    def compute(self) -> Tensor:
        """The mean as a scalar."""
        return (self.total / self.count).float()


class Agreement(Mean):
    """The mean of 100 cos between each image's embedding and its prompt's.

    Args:
        encoder: a CLIP or SigLIP of open_clip.
        sigmoid: whether the encoder must be a SigLIP; False: it must not be one.
    """

    def __init__(self, encoder: OpenCLIP, sigmoid: bool) -> None:
        super().__init__()
        self.encoder, self.sigmoid = encoder, sigmoid

    def scores(self, images: Images, prompts: Sequence[str] | Tensor) -> Float[Tensor, " b"]:
        """100 cos of each image with its prompt, in [-100, 100], without adding it to the mean.

        Args:
            images: uint8 b 3 h w, or arrays h w 3, or their embeddings b e from `encoder.images`.
            prompts: one prompt for each image, or their embeddings b e from `encoder.texts`.

        Raises:
            ValueError: there is not one prompt for each image, or there are no images.
            BenchmarkError: the encoder cannot be read, or is of the other kind.
        """
        if len(images) != len(prompts):
            raise ValueError(f"each image has a prompt, but there are {len(images)} and {len(prompts)}")
        _check_kind(self, self.encoder, self.sigmoid)
        texts = prompts if isinstance(prompts, Tensor) else self.encoder.texts(prompts)
        return 100 * (_embedded(self.encoder, images) * texts).sum(-1)

    def update(self, images: Images, prompts: Sequence[str] | Tensor) -> None:
        """Add the scores of images to the mean; arguments are those of `scores`."""
        self.add(self.scores(images, prompts))


class CLIPScore(Agreement):
    """CLIPScore as torchmetrics defines it: the mean of 100 cos over images, but at least 0.

    The cosine is that of the image's and its prompt's embeddings. A single image may be below 0; only the mean may not.
    Hessel et al. (2021), who proposed the score, take 2.5 max(cos, 0) per image instead. A prompt longer than the model
    reads (77 tokens) is cut before its end token.

    Args:
        encoder: a CLIP of open_clip; by default ViT-L-14-quickgelu with OpenAI's weights, as in torchmetrics.
    """

    def __init__(self, encoder: OpenCLIP | None = None) -> None:
        super().__init__(encoder or OpenCLIP(), sigmoid=False)

    def compute(self) -> Tensor:
        """The mean, but at least 0."""
        return super().compute().clamp(min=0)


class SigLIPScore(Agreement):
    """The mean over images of 100 times SigLIP's cosine, which may be below 0; it is not sigmoid(logit).

    Its numbers are not on CLIPScore's scale. Prompts are padded to the context length (64 tokens), as in SigLIP's
    training, and a longer prompt is cut before its end token.

    Args:
        encoder: a SigLIP of open_clip; by default ViT-SO400M-14-SigLIP-384, trained on webli.
    """

    def __init__(self, encoder: OpenCLIP | None = None) -> None:
        super().__init__(encoder or OpenCLIP(*SIGLIP), sigmoid=True)


class CLIPIQA(Mean):
    """CLIP-IQA (Wang et al., 2023) with any CLIP: the mean probability of "Good photo." over "Bad photo.", in [0, 1].

    The probability is the softmax of 100 cos over the two prompts. DEVIATION: the paper takes a ResNet-50 without
    position embeddings, at the image's own size; we take any model of open_clip, at its usual input size.

    Args:
        encoder: a CLIP of open_clip; by default ViT-L-14-quickgelu with OpenAI's weights.
    """

    def __init__(self, encoder: OpenCLIP | None = None) -> None:
        super().__init__()
        self.encoder = encoder or OpenCLIP()

    def scores(self, images: Images) -> Float[Tensor, " b"]:
        """Each image's probability of being good, without adding it to the mean.

        Args:
            images: uint8 b 3 h w, or arrays h w 3, or their embeddings b e from `encoder.images`.

        Raises:
            ValueError: there are no images.
            BenchmarkError: the encoder cannot be read, or is a SigLIP.
        """
        _check_kind(self, self.encoder, sigmoid=False)
        logits = 100 * _embedded(self.encoder, images) @ self.encoder.texts(QUALITY).T
        return logits.softmax(-1)[:, 0]

    def update(self, images: Images, prompts: Sequence[str] | Tensor | None = None) -> None:
        """Add the scores of images to the mean; prompts, which other metrics take, are not used."""
        self.add(self.scores(images))


class Diversity(Mean):
    """How much a prompt's images differ: the mean over prompts of their mean pairwise 1 - cos, in [0, 2].

    All images of a prompt must be in one update.

    Args:
        features: network that makes features b e of uint8 images b 3 h w, such as `TimmFeatures`.
    """

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = Outside(features)

    def scores(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " p"]:
        """Each prompt's distance, in order of the prompts' first images, without adding it to the mean.

        Raises:
            ValueError: there is not one prompt for each image, there are no images, or a prompt has only one.
        """
        if len(images) != len(prompts):
            raise ValueError(f"each image has a prompt, but there are {len(images)} and {len(prompts)}")
        features = F.normalize(self.features(as_tensor(images)).double(), dim=-1)
        rows = {prompt: [i for i, other in enumerate(prompts) if other == prompt] for prompt in dict.fromkeys(prompts)}
        if alone := [prompt for prompt, places in rows.items() if len(places) < 2]:
            raise ValueError(f"diversity needs two images of a prompt in one update, but {alone[0]!r} has one")
        return torch.stack([_mean_distance(features[places]) for places in rows.values()]).float()

    def update(self, images: Images, prompts: Sequence[str]) -> None:
        """Add the distances of prompts to the mean; arguments are those of `scores`."""
        self.add(self.scores(images, prompts))


class FID(FrechetInceptionDistance):
    """Frechet distance between the features of real and drawn images, by means and covariances (Heusel et al., 2017).

    It depends on the reference set, the number of images, their resolution and the resize filter: report all of these
    with it. Only with Inception is it the FID of other papers. It means little with fewer images than features.

    Args:
        features: network with `num_features` that makes features b e of uint8 images b 3 h w, such as `TimmFeatures`;
            by default torch-fidelity's Inception-v3, with its 2,048 pooled features.
        weights: file of Inception's weights; by default torch-fidelity fetches them.

    Raises:
        BenchmarkError: Inception is to be used, and torch-fidelity is not installed or its weights cannot be read.
    """

    def __init__(self, features: nn.Module | None = None, weights: str | None = None) -> None:
        super().__init__(Outside(inception(weights) if features is None else features))
        self.orig_dtype = torch.float32  # needed where a rank without images computes, too

    def update(self, images: Images, real: bool) -> None:
        """Add real or drawn images: uint8 b 3 h w, or arrays h w 3.

        Raises:
            ValueError: there are no images, or they have another type or shape.
        """
        super().update(as_tensor(images).to(self.device), real)


class TimmFeatures(nn.Module):
    """Pooled features of a timm image encoder, for `FID` and `Diversity`.

    Images are squashed to the encoder's input size by antialiased bicubic resampling, not cropped, and normalised as in
    its training.

    Args:
        name: timm's name with its tag (`vit_small_patch14_dinov2.lvd142m`), `hf-hub:OWNER/NAME`, or a folder with
            timm's config.json and weights.
        pretrained: read the weights; False leaves them random.

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
    """Uses a network without owning it: it has no parameters and no state here, and stays on its device.

    Args:
        network: makes features b e of images b 3 h w.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._held = (network.eval(),)  # in a tuple, it is not a submodule
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
    """Load FID's Inception-v3, with its 2,048 pooled features.

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
        ValueError: there are no images, or they are not uint8 RGB images of one size.
    """
    right = isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3
    if right and len(images):
        return images
    arrays = as_arrays(images)
    if len({array.shape for array in arrays}) > 1:
        raise ValueError("images of one update must have one size")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def _embedded(encoder: OpenCLIP, images: Images) -> Float[Tensor, "b e"]:
    if isinstance(images, Tensor) and images.ndim == 2 and images.is_floating_point():
        return images
    return encoder.images(images)


def _check_kind(metric: Any, encoder: OpenCLIP, sigmoid: bool) -> None:
    if encoder.sigmoid != sigmoid:
        kinds = ("a SigLIP", "not a SigLIP")
        raise BenchmarkError(
            f"{encoder.pretrained} is {kinds[sigmoid]}; {type(metric).__name__} needs {'one' if sigmoid else 'a CLIP'}"
        )


def _mean_distance(features: Float[Tensor, "n e"]) -> Float[Tensor, ""]:
    """Mean 1 - cos over all pairs of rows, which have length 1."""
    count = len(features)
    return 1 - (features.sum(0).square().sum() - count) / (count * (count - 1))
