"""LAION's aesthetic score of images: a linear head over CLIP's image features, normalised to length 1.

The head `sa_0_4_vit_l_14_linear.pth` of github.com/LAION-AI/aesthetic-predictor belongs to OpenAI's CLIP ViT-L/14.
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_prep.filter_rules import Aesthetic
from lidit.eval.openclip import OpenCLIP


class AestheticModel:
    """Gives images their aesthetic scores.

    Args:
        rule: the head and the CLIP to use.
        device: where CLIP runs.
        batch_size: number of images that CLIP reads at one time.

    Raises:
        FileNotFoundError: the head is missing.
        ValueError: the head's file holds no linear head.
    """

    def __init__(self, rule: Aesthetic, device: str = "cpu", batch_size: int = 64) -> None:
        self.rule = rule
        self.clip = OpenCLIP(rule.model, rule.pretrained, device, batch_size)
        self.weight, self.bias = _read_head(Path(rule.head))
        told = f"{hashlib.sha256(Path(rule.head).read_bytes()).hexdigest()} {self.clip.describe()}"
        self.identity = hashlib.sha256(told.encode()).hexdigest()[:8]  # a hash of everything that scores depend on

    def __call__(self, images: list[np.ndarray]) -> list[float]:
        """The scores of uint8 RGB images (H W 3).

        Raises:
            ValueError: the head reads features of another width.
        """
        features = self.clip.images(images).cpu()
        if features.shape[1] != len(self.weight):
            raise ValueError(
                f"the head reads features of width {len(self.weight)}, and this CLIP's have {features.shape[1]}; "
                "name the CLIP that the head was trained with"
            )
        return (features @ self.weight + self.bias).tolist()


def _read_head(path: Path) -> tuple[Tensor, Tensor]:
    """The head's weight (e) and bias () in float32."""
    if not path.is_file():
        raise FileNotFoundError(
            f"the aesthetic head {path} is missing; get it from github.com/LAION-AI/aesthetic-predictor and name it as "
            "rules.aesthetic.head, or set rules.aesthetic to null and name a column with scores in rules.columns"
        )
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        weight, bias = state["weight"].float().flatten(), state["bias"].float().squeeze()
    except (
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        raise ValueError(f"{path} holds no linear head of `weight` and `bias`: {error}") from error
    return weight, bias
