"""What autograd saves of a forward pass for the backward pass, found without memory for it (`operations.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks

from lidit.parallel import Parallel
from lidit.plan.operations import DryRun, Sizes


def saved_by_recomputing(model: DryRun, sizes: Sizes, asked: int) -> dict[int, tuple[int, int]]:
    """Bytes that autograd saves, by n where every n-th block is recomputed: whatever the images, and of each image.

    Args:
        model: what is run; its blocks are left as they are.
        sizes: of a batch; the number of images does not matter.
        asked: the recipe's n; 0, no block, is counted as well, and where there are blocks also 1 and 2.

    Raises:
        ValueError: there are no blocks to recompute.
    """
    blocks = model.backbone.blocks
    whole = [block.forward for block in blocks]
    saved: dict[int, tuple[int, int]] = {}
    for every in sorted({0, 1, 2, asked} if len(blocks) else {0, asked}):
        Parallel(checkpoint_every=every).apply(model.backbone)
        one, two = (saved_bytes(lambda n=n: model(of_images(sizes, n))) for n in (1, 2))
        fixed, image = 2 * one - two, two - one
        if every:  # one of the recomputed blocks is whole at a time
            image += (saved[0][1] - image) // len(blocks[::every])
        saved[every] = (fixed, image)
        for block, original in zip(blocks, whole, strict=True):
            block.forward = original
    return saved


def of_images(sizes: Sizes, count: int) -> Sizes:
    """The same sizes for another number of images."""
    return replace(sizes, latent=(count, *sizes.latent[1:]))


def saved_bytes(run: Callable[[], object]) -> int:
    """Bytes of the tensors that autograd saves for the backward pass; each storage counts once, parameters do not."""
    alive: dict[int, tuple[Tensor, UntypedStorage]] = {}  # by the storage; what is alive keeps its identity

    def save(tensor: Tensor) -> Tensor:
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):  # a transposed one is a view
            storage = tensor.untyped_storage()
            alive[id(storage)] = tensor, storage
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for _, storage in alive.values())
