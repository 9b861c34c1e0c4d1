"""The rules of `lidit prep filter`, as a recipe names them, and which records break them.

The paper removes LAION pairs with an aesthetic score below 4.7, images of low resolution and captions with URLs or
tags; `experiments/configs/filter_paper.yaml` holds these rules. The other rules are ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

HASH_BITS = 64
# UNSTATED: the paper does not say what a URL is; we take addresses, and names that end in a common domain.
URL = re.compile(
    r"https?:|www\.|\b[a-z0-9-]+\.(com|net|org|info|biz|edu|gov|io|ru|de|fr|cn|jp|co\.uk)\b", re.IGNORECASE
)
IDEOGRAPH = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{IDEOGRAPH}]|[^\W{IDEOGRAPH}]+(?:['’-]\w+)*")
HASHTAG = re.compile(r"(?<!\w)#\w+")
HTML = re.compile(r"</?[a-z][^<>]*>", re.IGNORECASE)
SEPARATOR = re.compile(r"[,;|，、；]")
WORDS_OF_A_TAG = 2  # most words that the tags of a list have on average


@dataclass(frozen=True)
class Limit:
    """The values that a column of the collection may have.

    Args:
        min: smallest number allowed.
        max: largest number allowed.
        allowed: the only values allowed, as text.
        missing: whether a record without a value stays.
    """

    min: float | None = None
    max: float | None = None
    allowed: list[str] | None = None
    missing: bool = False

    def broken_by(self, value: Any) -> str:
        """Why a value is not allowed; empty if it is."""
        if value is None or value == "" or value != value:
            return "" if self.missing else "no value"
        if self.allowed is not None and str(value) not in self.allowed:
            return f"{value} is not one of {', '.join(self.allowed)}"
        if self.min is None and self.max is None:
            return ""
        try:
            number = float(value)
        except (TypeError, ValueError):
            return f"{value!r} is not a number"
        if self.min is not None and not number >= self.min:
            return f"{number:g} is below {self.min:g}"
        return f"{number:g} is above {self.max:g}" if self.max is not None and not number <= self.max else ""


@dataclass(frozen=True)
class Aesthetic:
    """LAION's score from about 1 to 10: a linear head over the normalised image features of CLIP ViT-L/14.

    Args:
        min: smallest score allowed.
        head: file with the head's weights, from github.com/LAION-AI/aesthetic-predictor, or a safetensors of `weight`
            and `bias`.
        model: CLIP's architecture, as open_clip names it.
        pretrained: CLIP's weights: a tag of open_clip, a checkpoint, or a folder in open_clip's format.
    """

    min: float = 4.7
    head: str = "sa_0_4_vit_l_14_linear.pth"
    model: str = "ViT-L-14-quickgelu"
    pretrained: str = "openai"


@dataclass(frozen=True)
class Rules:
    """The rules in the order in which they are tried; a rule that is left out removes nothing.

    A record counts for the first rule that it breaks.

    Args:
        min_side: smallest shorter side of an image, in pixels.
        max_aspect: largest ratio of an image's longer side to its shorter side.
        min_words: fewest words of a caption; 2 removes captions of one word. A Chinese or Japanese character is a word.
        remove_urls: remove captions that hold an address or a name like shop.com.
        max_tags: most tags in a caption: its hashtags, and the pieces between commas, semicolons or bars if those have
            at most two words on average. A caption with HTML tags is removed in any case.
        columns: limits for columns of the collection, by name: a precomputed aesthetic score, watermarks, NSFW.
        aesthetic: the aesthetic score to compute, and its limit.
        remove_duplicates: remove files with the same SHA-256 as an earlier one. Of a picture with several captions, one
            pair stays.
        near_duplicate_bits: remove pictures whose 64-bit hash differs from another's in at most this many bits, 0 to 7;
            the picture with most pixels stays. 3 bits work for some millions of pictures; the time grows fast with more
            bits or more pictures. Plain backgrounds with little on them look alike to the hash: try it with `dry_run`.
    """

    min_side: int | None = None
    max_aspect: float | None = None
    min_words: int | None = None
    remove_urls: bool = False
    max_tags: int | None = None
    columns: dict[str, Limit] = field(default_factory=dict)
    aesthetic: Aesthetic | None = None
    remove_duplicates: bool = False
    near_duplicate_bits: int | None = None

    def check(self) -> None:
        """Refuse rules that remove nothing, or that cannot be applied.

        Raises:
            ValueError: a rule is refused; the message names it.
        """
        if self == Rules():
            raise ValueError("there are no rules; give them as rules, or with --config filter_paper.yaml")
        if not 0 <= (self.near_duplicate_bits or 0) <= 7:
            raise ValueError(f"near_duplicate_bits is {self.near_duplicate_bits}; it is 0 to 7 of {HASH_BITS} bits")
        if self.max_aspect is not None and self.max_aspect < 1:
            raise ValueError(f"max_aspect is {self.max_aspect}; it is the longer side over the shorter, at least 1")
        for name, limit in self.columns.items():
            if limit.min is None and limit.max is None and limit.allowed is None:
                raise ValueError(f"columns.{name} has no min, max or allowed; give it one")

    def broken_by(self, size: tuple[int, int], caption: str, columns: dict[str, Any]) -> tuple[str, str] | None:
        """The first rule about one record that this record breaks, and how; None if it breaks none."""
        return next(self._broken(size, caption, columns), None)

    def _broken(self, size: tuple[int, int], caption: str, columns: dict[str, Any]) -> Iterator[tuple[str, str]]:
        shape = f"{size[0]}x{size[1]}"
        if self.min_side is not None and min(size) < self.min_side:
            yield "min_side", shape
        if self.max_aspect is not None and max(size) > self.max_aspect * min(size):
            yield "max_aspect", shape
        if self.min_words is not None and len(WORD.findall(caption)) < self.min_words:
            yield "min_words", caption
        if self.remove_urls and URL.search(caption):
            yield "remove_urls", caption
        if self.max_tags is not None and (HTML.search(caption) or tags(caption) > self.max_tags):
            yield "max_tags", caption
        for name, limit in self.columns.items():
            if why := limit.broken_by(columns.get(name)):
                yield f"columns.{name}", why


def tags(caption: str) -> int:
    """How many tags a caption has.

    UNSTATED: the paper does not say what tags are; we take hashtags, and lists of pieces of about two words at most.
    """
    pieces = [piece for piece in SEPARATOR.split(HASHTAG.sub("", caption)) if piece.strip()]
    words = sum(len(WORD.findall(piece)) for piece in pieces)
    listed = len(pieces) if len(pieces) > 1 and words <= WORDS_OF_A_TAG * len(pieces) else 0
    return len(HASHTAG.findall(caption)) + listed


def dhash(image: Image.Image) -> int:
    """A hash of 64 bits that hardly changes when a picture is scaled or compressed.

    Krawetz's difference hash: of the picture as 9x8 grey pixels, a bit says whether a pixel is darker than the next one
    to the right.
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX))
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def near_duplicates(hashes: list[int], bits: int) -> dict[int, int]:
    """Which hashes differ in at most `bits` bits from an earlier hash that stays, and from which.

    Two such hashes have at least one of `bits` + 1 bands in common, so only hashes that share a band are compared.
    """
    edges = [HASH_BITS * i // (bits + 1) for i in range(bits + 2)]
    alike: list[dict[int, list[int]]] = [{} for _ in range(bits + 1)]
    found = {}
    for i, own in enumerate(hashes):
        bands = [own >> low & (1 << high - low) - 1 for low, high in pairwise(edges)]
        candidates = (j for group, band in zip(alike, bands, strict=True) for j in group.get(band, ()))
        match = next((j for j in candidates if (own ^ hashes[j]).bit_count() <= bits), None)
        if match is not None:
            found[i] = match
            continue
        for group, band in zip(alike, bands, strict=True):
            group.setdefault(band, []).append(i)
    return found
