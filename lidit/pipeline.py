"""A checkpoint or an exported folder, and prompts, become images."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lidit.assets import resolve
from lidit.checkpoint import COMMITTED, Trained, check_llms, check_shapes, record, sizes_in
from lidit.checkpoint import read as read_checkpoint
from lidit.devices import Compute, Precision, chosen, computing, this_machine
from lidit.disk.folder import CHECKPOINTS, checkpoints_in
from lidit.models.older import updated_model
from lidit.models.trust import check_settings
from lidit.module import TextToImage
from lidit.pixels import to_uint8
from lidit.samplers import guided, sampler_for, watched

BUNDLED = "bundled:lidit"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


class Pipeline:
    """A trained model, ready to draw.

    Args:
        model: the model, built and loaded, for example by `Pipeline.load`.
        sizes: width and height in pixels of the images it was trained on, the most frequent first.
        dtype: of backbone and prompt encoder; float32 leaves a precision that is set around it as it is.
    """

    def __init__(self, model: TextToImage, sizes: Sequence[tuple[int, int]] = (), dtype: torch.dtype = torch.float32):
        self.model, self.sizes, self.dtype = model.eval(), sizes, dtype

    @classmethod
    def load(
        cls,
        source: str = BUNDLED,
        ema: bool = True,
        trust: Sequence[str] | str = (),
        device: str = "auto",
        dtype: Precision = "auto",
    ) -> Pipeline:
        """A pipeline from `bundled:NAME`, a folder of `lidit export`, a checkpoint, or a run's newest checkpoint.

        Args:
            source: where the weights are.
            ema: take a checkpoint's averaged weights; a checkpoint without them is then an error.
            trust: modules besides lidit whose classes the model's configuration may name.
            device: auto (a GPU if there is one), cpu, cuda, or cuda:N. On a GPU float32 products use TF32.
            dtype: auto (on a GPU as it was trained, on a CPU float32), float32 or bfloat16.

        Raises:
            FileNotFoundError: there is nothing at `source`.
            ValueError: there is no such device, `source` holds no such folder or checkpoint, or its weights do not fit
                its architecture.
        """
        compute = compute_of(source, device, dtype)
        compute.prepare()
        found = read(source, ema)
        model = build(found.config, trust)
        adopt(model, found.weights, found.llms, source)
        return cls(model.to(compute.device), found.sizes, compute.dtype)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels of most images it was trained on.

        Raises:
            ValueError: the checkpoint is of a version that did not record sizes.
        """
        return most_frequent(self.sizes)

    @torch.no_grad()
    def latents(
        self,
        prompts: list[str],
        noise: Float[Tensor, "b c h w"],
        steps: int = 25,
        guidance: float = 3.0,
        sampler: str | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
        watch: Callable[[Float[Tensor, "b c h w"]], None] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Clean latents for prompts, from given noise.

        Args:
            prompts: prompts, one per image.
            noise: starting noise, one per image.
            steps: number of sampler steps.
            guidance: classifier-free guidance scale; 1 is none.
            sampler: euler, heun or ddim; by default the first that fits the objective.
            interval: lowest and highest time with guidance.
            watch: called at each evaluation with the clean latents that follow from the prediction.
        """
        model, b = self.model, len(prompts)
        with computing(model.device, self.dtype):
            features = model.encode_prompts([*prompts, *[""] * b])
            with_text = [(tokens[:b], mask[:b], start[:b]) for tokens, mask, start in features]
            predict = guided(model.predictor(features), model.predictor(with_text), guidance, interval)
            objective = model.objective
            name = sampler or ("euler" if objective.predicts == "velocity" else "ddim")
            draw = sampler_for(name, objective.predicts, objective.alpha_sigma)
            if watch is not None:
                predict = watched(predict, objective.to_x0, watch)
            return draw(predict, noise.to(model.device), objective.times(steps, noise.shape[-2:]))

    def noise(self, seeds: list[int], width: int, height: int) -> Float[Tensor, "b c h w"]:
        """Starting noise, one image per seed, for an image size in pixels; the same on every device.

        Raises:
            ValueError: the size is not divisible by what the VAE and the patches need.
        """
        vae = self.model.vae
        step = vae.factor * self.model.backbone.patch
        if width < step or height < step or width % step or height % step:
            near = dict.fromkeys(f"{_multiple(width, step, up)}x{_multiple(height, step, up)}" for up in (False, True))
            raise ValueError(f"a size of {width}x{height} is not divisible by {step}; take {' or '.join(near)}")
        shape = (vae.channels, height // vae.factor, width // vae.factor)
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def __call__(
        self,
        prompts: list[str],
        seeds: list[int],
        size: tuple[int, int] | None = None,
        batch_size: int = 32,
        steps: int = 25,
        guidance: float = 3.0,
        sampler: str | None = None,
    ) -> list[np.ndarray]:
        """Images uint8 (h w 3), one per prompt and seed; an image depends on its own prompt and seed alone.

        Args:
            prompts: prompts, one per image.
            seeds: seeds of the noise, one per image.
            size: width and height in pixels; by default those of most training images.
            batch_size: number of images drawn at once.
            steps: number of sampler steps.
            guidance: classifier-free guidance scale; 1 is none.
            sampler: as for `latents`.
        """
        images, size = [], size or self.size
        for i in range(0, len(prompts), batch_size):
            noise = self.noise(seeds[i : i + batch_size], *size)
            latent = self.latents(prompts[i : i + batch_size], noise, steps, guidance, sampler)
            images += to_uint8(self.model.vae.load(latent.device).decode(latent))
        return images


def _multiple(side: int, step: int, up: bool) -> int:
    """The nearest multiple of a step below or above a side, at least one step."""
    return max(1, -(-side // step) if up else side // step) * step


def build(config: dict, trust: Sequence[str] | str = ()) -> TextToImage:
    """A TextToImage without weights, from the configuration in a checkpoint or an exported folder.

    Args:
        config: the settings of the model, as any version of lidit wrote them.
        trust: modules besides lidit whose classes the configuration may name; naming one imports it.

    Raises:
        ValueError: the configuration does not fit this version's classes, or names a class that is not trusted.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    config = updated_model(config)
    check_settings(
        config, list(inspect.signature(TextToImage).parameters), [trust] if isinstance(trust, str) else trust
    )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TextToImage, "model")
    try:
        return parser.instantiate(parser.parse_object({"model": config})).model
    except ArgumentError as error:
        raise ValueError(f"the model's configuration does not fit this version of lidit: {error}") from None


def read(source: str, ema: bool = True) -> Trained:
    """The trained model at any of the places that `Pipeline.load` accepts."""
    path = place(source)
    return read_export(path) if is_export(path) else read_checkpoint(path, ema)


def place(source: str) -> Path:
    """The path of a model that is given as `bundled:NAME`, a path, or a run's folder (its newest checkpoint).

    Raises:
        FileNotFoundError: there is nothing at `source`.
    """
    path = Path(resolve(source))
    if not path.exists():
        raise FileNotFoundError(
            f"no checkpoint, exported folder or run at {source}; without --checkpoint the bundled one is used"
        )
    return next(iter(checkpoints_in(path / CHECKPOINTS)), path)


def is_export(path: Path) -> bool:
    """Whether a path is an exported folder rather than a checkpoint: a folder without a checkpoint's index."""
    return path.is_dir() and not (path / COMMITTED).exists()


def adopt(model: TextToImage, weights: dict[str, Tensor], llms: list[dict], source: str) -> None:
    """Give a model weights; a model that is not built yet is built.

    Args:
        model: the model as configured.
        weights: weights and buffers of a model of the same architecture.
        llms: the identities of the LLMs that the weights were trained with.
        source: where the weights came from, named in the error.

    Raises:
        ValueError: the weights are of another architecture or were trained with other LLMs.
    """
    check_llms(llms, model.llms, source)
    model.adopt(weights, source)


def adopt_part(model: TextToImage, part: str, weights: dict[str, Tensor], source: str) -> None:
    """Build a model, and give one part of it the weights of the same part in another model.

    Args:
        model: the model as configured.
        part: the part, backbone or prompt_encoder.
        weights: weights and buffers of a model with the same part.
        source: where the weights came from, named in the error.

    Raises:
        ValueError: the part is of another architecture.
    """
    model.configure_model()
    taken = {name.removeprefix(f"{part}."): w for name, w in weights.items() if name.startswith(f"{part}.")}
    own = getattr(model, part)
    expected = {name: tuple(w.shape) for name, w in own.state_dict().items()}
    check_shapes({name: tuple(w.shape) for name, w in taken.items()}, expected, f"the {part} of {source}")
    own.load_state_dict(taken)


def size_of(source: str) -> tuple[int, int]:
    """Width and height in pixels of most images that a model was trained on; no weights are read.

    Raises:
        FileNotFoundError: there is nothing at `source`.
        ValueError: `source` holds no model, or a model that does not record its sizes.
    """
    return most_frequent(sizes_in(_about(place(source))))


def compute_of(source: str, device: str = "auto", dtype: Precision = "auto") -> Compute:
    """Where and in which precision a model draws, as `Pipeline.load` chooses it; no weights are read.

    Raises:
        FileNotFoundError: there is nothing at `source`.
        ValueError: there is no such device, or `source` holds no model.
    """
    return chosen(device, dtype, _about(place(source)).get("precision"), this_machine())


def _about(path: Path) -> dict[str, Any]:
    """What a checkpoint or an exported folder records of itself."""
    return read_config(path) if is_export(path) else record(path)


def most_frequent(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The first of the sizes that a model records.

    Raises:
        ValueError: the model records none.
    """
    if not sizes:
        raise ValueError("the checkpoint does not record which sizes it was trained on; say --size WIDTHxHEIGHT")
    return sizes[0]


def read_export(folder: Path) -> Trained:
    """The model of an exported folder.

    Raises:
        ValueError: one of its two files is missing or damaged.
    """
    about = read_config(folder)
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise _damaged(folder, error) from None
    return Trained(about["model"], weights, about.get("prompts", []), sizes_in(about), about.get("precision"))


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration in an exported folder.

    Raises:
        ValueError: one of the folder's two files is missing, or the configuration is damaged.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no exported model: it has no {name}; `lidit export` writes such folders")
    try:
        about = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise _damaged(folder, error) from None
    if not (isinstance(about, dict) and isinstance(about.get("model"), dict)):
        raise ValueError(f"{folder / CONFIG} describes no model; write the folder again with `lidit export`")
    return about


def _damaged(folder: Path, error: Exception) -> ValueError:
    return ValueError(f"{folder} is damaged ({error}); write it again with `lidit export`")
