"""From a checkpoint or an exported folder and prompts to images."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lidit.assets import resolve
from lidit.checkpoint import COMMITTED, check_llms, check_shapes
from lidit.checkpoint import read as read_checkpoint
from lidit.module import TextToImage
from lidit.older import updated_model
from lidit.pixels import to_uint8
from lidit.samplers import guided, sampler_for, watched

BUNDLED = "bundled:lidit"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FACTORIES = ("prompt_encoder", "backbone", "objective", "vae")  # keys of a model's settings whose values name a class


class Pipeline:
    """A trained model, ready to draw.

    Args:
        model: built and loaded, for example by `Pipeline.load`.
    """

    def __init__(self, model: TextToImage):
        self.model = model.eval()

    @classmethod
    def load(cls, source: str = BUNDLED, ema: bool = True, trust: Sequence[str] = ()) -> Pipeline:
        """A pipeline from `bundled:NAME`, a folder written by `lidit export`, or a checkpoint of `lidit fit`.

        Args:
            source: where the weights are.
            ema: from a checkpoint, take the averaged weights; a checkpoint without them is an error then.
            trust: modules besides lidit whose classes it may name.

        Raises:
            FileNotFoundError: there is nothing at that place.
            ValueError: what is there is no such folder or checkpoint, or its weights do not fit its architecture.
        """
        config, weights, llms = read(source, ema)
        model = build(config, trust)
        adopt(model, weights, llms, source)
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu"))

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
            prompts: one per image.
            noise: the starting points.
            steps: of the sampler.
            guidance: classifier-free guidance scale; 1 is none.
            sampler: euler, heun or ddim; by default the first that fits the objective.
            interval: lowest and highest time with guidance.
            watch: is shown what the clean latents would be, at each evaluation.
        """
        model, b = self.model, len(prompts)
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
            near = dict.fromkeys(f"{fit(width, step, up)}x{fit(height, step, up)}" for up in (False, True))
            raise ValueError(f"a size of {width}x{height} does not divide by {step}; take {' or '.join(near)}")
        shape = (vae.channels, height // vae.factor, width // vae.factor)
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def __call__(
        self,
        prompts: list[str],
        seeds: list[int],
        size: tuple[int, int] = (64, 64),
        batch_size: int = 32,
        steps: int = 25,
        guidance: float = 3.0,
        sampler: str | None = None,
    ) -> list[np.ndarray]:
        """Images uint8 (h w 3), one per prompt and seed; an image depends on its own prompt and seed alone.

        Args:
            prompts: one per image.
            seeds: of the noise, one per image.
            size: width and height in pixels.
            batch_size: images drawn at once.
            steps: of the sampler.
            guidance: classifier-free guidance scale; 1 is none.
            sampler: as for `latents`.
        """
        images = []
        for i in range(0, len(prompts), batch_size):
            noise = self.noise(seeds[i : i + batch_size], *size)
            latent = self.latents(prompts[i : i + batch_size], noise, steps, guidance, sampler)
            images += to_uint8(self.model.vae.load(latent.device).decode(latent))
        return images


def fit(side: int, step: int, up: bool) -> int:
    """The nearest multiple of a step below or above a side, at least one step."""
    return max(1, -(-side // step) if up else side // step) * step


def build(config: dict, trust: Sequence[str] = ()) -> TextToImage:
    """A TextToImage from the configuration a checkpoint or an exported folder carries; weights come later.

    Args:
        config: the settings of the model, as any version of lidit wrote them.
        trust: modules besides lidit whose classes the configuration may name; naming one imports it.

    Raises:
        ValueError: it does not fit this version's classes, or names a class of a module that is not trusted.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    config = updated_model(config)
    check_trusted(config, trust)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TextToImage, "model")
    try:
        return parser.instantiate(parser.parse_object({"model": config})).model
    except ArgumentError as error:
        raise ValueError(f"the model's configuration does not fit this version of lidit: {error}") from None


def check_trusted(config: object, trust: Sequence[str]) -> None:
    """Refuse a configuration that names a class outside of lidit, since importing its module would run its code.

    Args:
        config: the settings of a model, or a part of them.
        trust: modules that may be named, with their submodules.

    Raises:
        ValueError: naming the class, and how to allow it.
    """
    if isinstance(config, list | tuple):
        for part in config:
            check_trusted(part, trust)
    elif isinstance(config, dict):
        _check_path(config.get("class_path", "lidit."), ("lidit", *trust))
        for key in FACTORIES:  # a recipe may also name a function that makes the part
            if isinstance(config.get(key), str):
                _check_path(config[key], trust)
        for part in config.values():
            check_trusted(part, trust)


def _check_path(path: object, modules: Sequence[str]) -> None:
    if not str(path).startswith(tuple(f"{module}." for module in modules)):
        module = str(path).partition(".")[0]
        raise ValueError(
            f"the model's configuration names {path}, which is not lidit's: loading it runs that code. If you trust it "
            f"and Python can import it, say --trust {module}"
        )


def read(source: str, ema: bool = True) -> tuple[dict, dict[str, Tensor], list[dict]]:
    """Configuration, weights and the LLMs' identities from any of the places that `Pipeline.load` names."""
    path = Path(resolve(source))
    if path.is_dir() and not (path / COMMITTED).exists():
        return read_export(path)
    if path.exists():
        return read_checkpoint(path, ema)
    raise FileNotFoundError(
        f"no checkpoint or exported folder at {source}; without --checkpoint the bundled one is used"
    )


def adopt(model: TextToImage, weights: dict[str, Tensor], llms: list[dict], source: str) -> None:
    """Give a model weights, and build what is trained, if it is not built yet.

    Args:
        model: as configured.
        weights: of a model of the same architecture.
        llms: the identities of the LLMs they were trained with.
        source: where the weights came from, named in the error.

    Raises:
        ValueError: they are of another architecture or were trained with other LLMs.
    """
    check_llms(llms, model.llms, source)
    model.adopt(weights, source)


def adopt_part(model: TextToImage, part: str, weights: dict[str, Tensor], source: str) -> None:
    """Build what is trained, and give one part of it its weights of another model, whatever the rest of that is.

    Args:
        model: as configured.
        part: backbone or prompt_encoder.
        weights: of a model with the same part.
        source: of the weights, for messages.

    Raises:
        ValueError: the part is of another architecture.
    """
    model.configure_model()
    taken = {name.removeprefix(f"{part}."): w for name, w in weights.items() if name.startswith(f"{part}.")}
    own = getattr(model, part)
    expected = {name: tuple(w.shape) for name, w in own.state_dict().items()}
    check_shapes({name: tuple(w.shape) for name, w in taken.items()}, expected, f"the {part} of {source}")
    own.load_state_dict(taken)


def read_export(folder: Path) -> tuple[dict, dict[str, Tensor], list[dict]]:
    """Configuration and weights of an exported folder, and the identities of the LLMs it was trained with.

    Raises:
        ValueError: one of its two files is missing or damaged.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no exported model: it has no {name}; `lidit export` writes such folders")
    try:
        record, weights = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged ({error}); write it again with `lidit export`") from None
    if not (isinstance(record, dict) and isinstance(record.get("model"), dict)):
        raise ValueError(f"{folder / CONFIG} describes no model; write the folder again with `lidit export`")
    return record["model"], weights, record.get("prompts", [])
