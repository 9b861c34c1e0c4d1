"""What autograd keeps of a forward pass for the backward pass, found without memory for it.

The functions run under torch's FakeTensorMode as they do outside of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lidit.models.lidit import LIDiT
from lidit.models.llm import FrozenLLM
from lidit.models.prompt_encoder import PromptEncoder
from lidit.parallel import Parallel

INSTRUCTION = 40  # tokens of template and instruction before a caption, about
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}  # of features


def kept_by_recomputing(
    backbone: LIDiT, encoder: PromptEncoder, run: Callable[[int], Tensor], intervals: set[int]
) -> dict[int, tuple[int, int]]:
    """Bytes that autograd keeps, where every n-th block is recomputed: whatever the images, and of each image.

    Args:
        backbone: what is checkpointed.
        encoder: of the text.
        run: a forward pass with a number of images.
        intervals: n; 0: no block.
    """
    encoder.eval()  # in training, whitening's first batches choose tokens by values
    whole = [block.forward for block in backbone.blocks]
    kept: dict[int, tuple[int, int]] = {}
    for every in sorted(intervals):
        Parallel(checkpoint_every=every).apply(backbone)
        one, two = (kept_bytes(partial(run, images)) for images in (1, 2))
        fixed, image = 2 * one - two, two - one
        if every:  # one of the recomputed blocks is whole at a time
            image += (kept[0][1] - image) // len(backbone.blocks[::every])
        kept[every] = (fixed, image)
        for block, original in zip(backbone.blocks, whole, strict=True):
            block.forward = original
    return kept


def forward(
    backbone: LIDiT,
    encoder: PromptEncoder,
    llms: list[FrozenLLM],
    tokens: list[int],
    side: int,
    bf16: bool,
    images: int,
) -> Tensor:
    """A pass as in training, with captions of the given lengths."""
    t = torch.rand(images)
    features = [
        (
            torch.randn(images, INSTRUCTION + n, llm.width).to(DTYPES[llm.dtype]),
            torch.ones(images, INSTRUCTION + n, dtype=torch.bool),
            torch.full((images,), INSTRUCTION),
        )
        for llm, n in zip(llms, tokens, strict=True)
    ]
    uncut = [] if encoder.truncate == "never" else list(llms)

    def cut(x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """As `prompt_encoder.truncate`, by no value: the first call for each LLM finds its instruction."""
        start = INSTRUCTION if uncut else 0
        del uncut[:1]
        return x[:, start:], kept[:, start:]

    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), patch("lidit.models.prompt_encoder.truncate", cut):
        return backbone(torch.randn(images, backbone.patchify.in_channels, side, side), t, encoder(features, t))


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass; each storage counts once, parameters do not."""
    sizes: dict[int, int] = {}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):  # a transposed one is a view
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(sizes.values())
