"""Makes a batch of a plan's samples; samples that cannot be read are left out, named and counted.

A rank whose share of a global batch holds an unreadable sample shows a smaller batch, so its other samples weigh a
little more in that step's gradient; the other ranks notice nothing, and every rank steps. If no sample of a rank's
share can be read, the rank shows the first readable sample of the other ranks' shares, and logs it. If no sample of the
whole global batch can be read, every rank finds that out for itself and stops.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lidit.data.cache import Cache, Features
from lidit.data.index import ShardIndex
from lidit.data.reader import Unreadable
from lidit.data.stream import Plan
from lidit.pixels import signed

log = logging.getLogger(__name__)


@dataclass
class Batch:
    """One rank's share of a global batch; all images have one shape."""

    key: list[str]
    prompt: list[str]
    image: Tensor | None = None  # (b 3 H W), uint8 as read, float32 in [-1, 1] in a step; None if latents are cached
    latent: Tensor | None = None  # float32 (b c h w)
    features: list[Features] | None = (
        None  # per LLM tokens (b l e), mask (b l), prompt_start (b); None: to be computed in the step
    )
    longest: list[int] | None = None  # per LLM the tokens of its longest caption, if there are features
    ahead: Any = None  # what the model made of the captions in the process that read them; see `ShardData.read_ahead`
    lent: bool = False  # no sample of the share can be read, and the one here is another rank's
    skipped: list[str] = field(default_factory=list)  # for each sample of the share that is missing, why

    def signed(self) -> Batch:
        """This batch with float32 pixels in [-1, 1]. They take four times the bytes, so do this on the device."""
        if self.image is None or self.image.dtype != torch.uint8:
            return self
        return replace(self, image=signed(self.image))


class _Shown(NamedTuple):
    """A sample that could be read."""

    sample: int
    blank: bool
    prompt: str


class Samples(Dataset):
    """Reads the batch of a plan: the captions, and the images only if no latents are cached."""

    def __init__(self, index: ShardIndex, cache: Cache | None = None) -> None:
        self.index, self.cache = index, cache

    def __getitem__(self, plan: Plan) -> Batch:
        """The batch of a plan.

        Raises:
            ValueError: no sample of the global batch can be read.
        """
        shown, pixels, skipped = self._read(plan)
        lent = not shown
        if not shown and plan.spare is not None:
            shown, pixels, _ = self._read(plan.spare, enough=1)
            key = self.index.key(shown[0].sample) if shown else "none"
            log.warning(
                "batch %d: no sample of this rank's share can be read; of another rank's it shows %s", plan.number, key
            )
        if not shown:
            raise ValueError(f"no sample of global batch {plan.number} can be read; the first reason: {skipped[0]}")
        return replace(self._batch(shown, pixels[: len(shown)], plan.dense, skipped), lent=lent)

    def _read(self, plan: Plan, enough: int | None = None) -> tuple[list[_Shown], np.ndarray, list[str]]:
        """The samples of a plan that can be read, at most `enough`; their pixels; and why others cannot be read."""
        shown, skipped, pixels = [], [], self._room(plan.samples)
        near = [True] * len(plan.samples) if plan.near is None else plan.near.tolist()
        for sample, blank, whole in zip(plan.samples.tolist(), plan.blank.tolist(), near, strict=True):
            try:
                text = self.index.text(sample, whole)  # of a dropped caption too: what is damaged is left out
                prompt = "" if blank else text["dense" if plan.dense else "caption"]
                if not self._latents:
                    pixels[len(shown)] = self.index.image(sample, whole)
                shown.append(_Shown(sample, blank, prompt))
            except Unreadable as error:
                skipped.append(str(error))
            if len(shown) == enough:
                break
        return shown, pixels, skipped

    def _room(self, samples: np.ndarray) -> np.ndarray:
        """Uninitialised memory for the pixels of samples of one shape: a tenth faster than to stack the images."""
        height, width = (int(self.index.column(name)[samples[0]]) for name in ("height", "width"))
        return np.empty((0 if self._latents else len(samples), height, width, 3), np.uint8)

    def _batch(self, shown: list[_Shown], pixels: np.ndarray, dense: bool, skipped: list[str]) -> Batch:
        samples = np.array([one.sample for one in shown])
        keys = [self.index.key(one.sample) for one in shown]
        batch = Batch(keys, [one.prompt for one in shown], skipped=skipped)
        if self.cache is not None:
            batch.features = self.cache.features(samples, dense, np.array([one.blank for one in shown]))
        if batch.features:  # while they are in this memory, since to read it from a device is to wait
            batch.longest = [int((mask.sum(1) - start).max()) for _, mask, start in batch.features]
        if self.cache is not None and self._latents:
            batch.latent = self.cache.latents(samples)
        else:
            batch.image = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return batch

    @property
    def _latents(self) -> bool:
        return self.cache is not None and self.cache.has_latents


class Tally:
    """Counts the samples that a rank skipped, logs each reason once, and stops the run if there are too many.

    Args:
        allowed: share of the samples that may be skipped, 0 to 1.

    Raises:
        ValueError: the share is out of range.
    """

    def __init__(self, allowed: float) -> None:
        if not 0 <= allowed <= 1:
            raise ValueError(f"max_skipped is {allowed}; it is a share from 0 to 1")
        self.read = self.skipped = 0
        self.reasons: dict[str, int] = {}  # each with the number of samples skipped for it
        self._allowed, self._expected = allowed, 0.0

    def expect(self, samples: float) -> None:
        """Allow a share of `samples` (those of an epoch), even before so many have been read."""
        self._expected = max(self._expected, samples)

    def count(self, batch: Batch) -> None:
        """Count a batch.

        Raises:
            ValueError: more was skipped than is allowed.
        """
        self.read += len(batch.key) + len(batch.skipped)
        self.skipped += len(batch.skipped)
        for reason in batch.skipped:
            if reason not in self.reasons:
                log.warning("skipped: %s", reason)
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if batch.skipped and self.skipped > self._allowed * max(self.read, self._expected):
            raise ValueError(
                f"{self.skipped} samples of this rank could not be read, more than {self._allowed:.2%} of those that "
                f"it shows; mend them (`lidit prep check` lists them) or raise data.max_skipped. {batch.skipped[-1]}"
            )

    def __str__(self) -> str:
        """How many samples were skipped, and for how many reasons, as a line of the log."""
        return f"{self.skipped} of {self.read} samples skipped, for {len(self.reasons)} reasons"
