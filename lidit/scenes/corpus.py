"""Training data of the miniature world: scenes in useful proportions with captions, and texts for the small LLMs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from lidit.scenes.describe import (
    FORMS,
    NUMBERS,
    Caption,
    Fact,
    Look,
    dense_caption,
    in_place,
    short_caption,
)
from lidit.scenes.draw import Scene, draw, grid, held_out, random_scene

COUNT_WEIGHTS = (0.20, 0.38, 0.14, 0.10, 0.06, 0.04, 0.04, 0.04)  # shares of scenes with one to eight objects
ALIKE_SHARE = 0.6  # share of scenes of three to five objects that look alike: 'three red stars'
# Shares of FORMS among the captions of pictures. Only two objects that are not on a diagonal have a relation: with the
# share of 0.30 in describe.py only 7 % of the captions state one, and LI-DiT had not learnt it after 7,500 batches.
PICTURE_FORMS = (0.15, 0.10, 0.55, 0.20)


@dataclass(frozen=True)
class Example:
    """A drawn scene with its two captions."""

    scene: Scene
    image: np.ndarray  # uint8, height x width x 3
    short: Caption
    dense: Caption


def training_scene(rng: np.random.Generator, width: int = 64, height: int = 64, held: bool = False) -> Scene:
    """A scene in the proportions of training: never a held-out one, or with `held` only held-out ones."""
    rows, cols = grid(width, height)
    weights = np.array(COUNT_WEIGHTS[: rows * cols])
    while True:
        count = int(rng.choice(len(weights), p=weights / weights.sum())) + 1
        scene = random_scene(rng, width, height, count)
        if rng.random() < (ALIKE_SHARE if 3 <= count <= 5 else 0.15 if count == 2 else 0):
            first = scene.objects[0]
            scene = Scene(tuple(replace(first, row=o.row, col=o.col) for o in scene.objects))
        if held_out(scene.objects) == held:
            return scene


def examples(seed: int, count: int, width: int = 64, height: int = 64, held: bool = False) -> Iterator[Example]:
    """Scenes with pictures and captions, the same for the same arguments; example i does not depend on `count`."""
    for i in range(count):
        rng = np.random.default_rng([seed, i, int(held)])
        scene = training_scene(rng, width, height, held)
        image = draw(scene, width, height, seed=int(rng.integers(2**31)))
        shape = grid(width, height)
        form = str(rng.choice(FORMS, p=PICTURE_FORMS))
        yield Example(scene, image, short_caption(scene, rng, shape, form), dense_caption(scene, rng, shape))


def answer(facts: tuple[Fact, ...]) -> str:
    """What an instruction-tuned LLM should answer about a caption: every object in it, attribute by attribute."""
    objects = [f for f in facts if f.relation is None]
    related = [f for f in facts if f.relation is not None]
    if not objects:
        objects = [Fact(look) for f in related for look in (f.look, f.other) if look]
    total = sum(f.count for f in objects)
    sentences = [f"There {'is' if total == 1 else 'are'} {NUMBERS[min(total, 8)]} in all."]
    sentences += [_describe(f) for f in objects]
    for f in related:
        if f.other:
            sentences.append(f"{_the(f.look)} is {f.relation} {_the(f.other).lower()}.")
    return " ".join(sentences)


def _the(look: Look) -> str:
    return "The " + " ".join([*look.adjectives, look.shape])


def _describe(fact: Fact) -> str:
    look = fact.look
    parts = [f"{NUMBERS[fact.count]} of shape {look.shape}"]
    parts += [f"{name} {value}" for name in ("color", "texture", "size") if (value := getattr(look, name))]
    if fact.place:
        parts.append(in_place(fact.place))
    return ", ".join(parts).capitalize() + "."


def texts(seed: int, count: int, held: bool = False) -> Iterator[str]:
    """Texts for next-token prediction: a short caption, a dense one, or one after the other."""
    for i in range(count):
        rng = np.random.default_rng([seed, i, 3, int(held)])
        scene = training_scene(rng, *((64, 64), (96, 64), (64, 96))[int(rng.integers(3))], held=held)
        short, dense = short_caption(scene, rng, _extent(scene)), dense_caption(scene, rng, _extent(scene))
        kind = rng.integers(3)
        yield short.text if kind == 0 else dense.text if kind == 1 else f"{short.text}. {dense.text}"


def dialogues(seed: int, count: int, held: bool = False) -> Iterator[tuple[str, str]]:
    """Pairs of a caption and the answer to the paper's instruction about it."""
    for i in range(count):
        rng = np.random.default_rng([seed, i, 5, int(held)])
        scene = training_scene(rng, held=held)
        caption = short_caption(scene, rng) if rng.random() < 0.7 else dense_caption(scene, rng)
        yield caption.text, answer(caption.facts)


def _extent(scene: Scene) -> tuple[int, int]:
    """Rows and columns of the smallest grid, at least three by three, that a scene fits into."""
    return max(3, *(o.row + 1 for o in scene.objects)), max(3, *(o.col + 1 for o in scene.objects))
