"""Miniature twins of the paper's benchmarks: prompts made from a seed, and scores given by the judge in `judge.py`.

| benchmark | twin of | tasks | score of a prompt |
|---|---|---|---|
| attributes | T2I-CompBench | color, shape, texture, spatial | share of its facts that hold |
| geneval | GenEval | single_object to color_attribution | 1 if all its facts hold |
| positional_bias | Figure 3, appendix A.3 | list | share of its segments that hold, by quarter of the list |
| dense | DPG-Bench | dense | share of its facts that hold |
| heldout | none; the project's own numbers | single, two, position, counting | 1 if all its facts hold |

Prompts use the language of `describe.py`, because miniature models know no other. A prompt that names the colour and
shape of every object is held out: its objects (plain where it names no texture) are a set that `draw.held_out` excludes
from the training data, although training shows each of them in other sets. This holds for all tasks but three, which
name only shapes: shape of attributes, single_object and two_object of geneval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lidit.scenes.corpus import training_scene
from lidit.scenes.describe import (
    Caption,
    Fact,
    Look,
    dense_caption,
    enumerate_words,
    full_look,
    phrase,
    phrase_after,
    relation_between,
    short_caption,
)
from lidit.scenes.draw import SHAPES, Object, Scene, held_out, random_scene
from lidit.scenes.judge import facts_held

QUARTERS = ("q1", "q2", "q3", "q4")
SHORTEST_LIST, LONGEST_LIST = 4, 8  # UNSTATED: the paper says up to 8 segments; from 4 on every quarter has one
MOST_ALIKE = 4  # prompts for counting ask for two to four


@dataclass(frozen=True)
class Prompt:
    """A text to draw, the facts by which its picture is judged, and the task of the benchmark that it belongs to."""

    text: str
    facts: tuple[Fact, ...]
    task: str


def prompts(benchmark: str, count_per_task: int, seed: int) -> list[Prompt]:
    """The prompts of a benchmark, task by task; a task's prompt i does not depend on `count_per_task`.

    Raises:
        ValueError: the benchmark is unknown.
    """
    made = []
    for t, (task, make) in enumerate(_tasks(benchmark).items()):
        for i in range(count_per_task):
            caption = make(np.random.default_rng([seed, list(TASKS).index(benchmark), t, i]))
            made.append(Prompt(caption.text, caption.facts, task))
    return made


def score(benchmark: str, prompts: Sequence[Prompt], images: Sequence[np.ndarray]) -> dict[str, float]:
    """Scores of images, in [0, 1]: one for each task (positional_bias: each quarter), and their mean, `overall`.

    Args:
        benchmark: one of the names in TASKS.
        prompts: some or all of the benchmark's prompts.
        images: one uint8 RGB image of height x width x 3 for each prompt.

    Raises:
        ValueError: the benchmark is unknown, there are no prompts, some belong to another benchmark, or there is not
            one image for each prompt.
    """
    tasks = list(_tasks(benchmark))
    if not prompts or len(prompts) != len(images):
        raise ValueError(f"score needs one image for each prompt, not {len(images)} for {len(prompts)}")
    if foreign := {p.task for p in prompts} - set(tasks):
        raise ValueError(
            f"tasks {', '.join(sorted(foreign))} are not of benchmark {benchmark!r}, which has {', '.join(tasks)}"
        )
    held = [facts_held(p.facts, image) for p, image in zip(prompts, images, strict=True)]
    if benchmark == "positional_bias":
        parts = _by_quarter(held)
    else:
        worth = np.mean if benchmark in ("attributes", "dense") else all
        parts = {
            task: [float(worth(h)) for h, p in zip(held, prompts, strict=True) if p.task == task] for task in tasks
        }
    scores = {name: float(np.mean(values)) for name, values in parts.items() if values}
    return scores | {"overall": float(np.mean(list(scores.values())))}


def _tasks(benchmark: str) -> dict[str, Callable[[np.random.Generator], Caption]]:
    if benchmark not in TASKS:
        raise ValueError(f"unknown benchmark {benchmark!r}; known: {', '.join(TASKS)}")
    return TASKS[benchmark]


def _by_quarter(held: list[list[bool]]) -> dict[str, list[float]]:
    """For each quarter of the list: every prompt's share of segments in it that hold (appendix A.3)."""
    parts: dict[str, list[float]] = {name: [] for name in QUARTERS}
    for segments in held:
        quarter = np.arange(len(segments)) * 4 // len(segments)
        for q in np.unique(quarter):
            parts[QUARTERS[q]].append(float(np.mean(np.array(segments)[quarter == q])))
    return parts


def _objects(
    rng: np.random.Generator, count: int, accept: Callable[[Sequence[Object]], bool], plain: bool = True
) -> Sequence[Object]:
    """Objects on a 3x3 grid that are together held out of training and that `accept` accepts."""
    while True:
        objects = random_scene(rng, count=count).objects
        if plain:
            objects = tuple(replace(o, texture="plain") for o in objects)
        if held_out(objects) and accept(objects):
            return objects


def _differ(*names: str) -> Callable[[Sequence[Object]], bool]:
    """A test of objects: whether any two of them differ in each of these attributes."""
    return lambda objects: all(len({getattr(o, name) for o in objects}) == len(objects) for name in names)


def _distinct(objects: Sequence[Object]) -> bool:
    """Whether no object fits the description of another one, even where a plain texture is not named."""
    return len({(o.shape, o.color) for o in objects}) == len(objects)


def _listed(looks: Sequence[Look]) -> Caption:
    return Caption(enumerate_words([phrase(look) for look in looks]), tuple(Fact(look) for look in looks))


def _looks(objects: Sequence[Object]) -> list[Look]:
    return [full_look(o, size=False) for o in objects]


def _colored(rng: np.random.Generator) -> Caption:
    return _listed(_looks(_objects(rng, 2, _differ("color", "shape"))))


def _shapes(rng: np.random.Generator, count: int = 2) -> Caption:
    return _listed([Look(str(shape)) for shape in rng.choice(SHAPES, count, replace=False)])


def _textured(rng: np.random.Generator) -> Caption:
    """Two textured objects. The facts leave out the colours; the text cannot, for the language always names them."""

    def accept(objects: Sequence[Object]) -> bool:
        return _differ("texture", "shape")(objects) and all(o.texture != "plain" for o in objects)

    looks = _looks(_objects(rng, 2, accept, plain=False))
    return Caption(_listed(looks).text, tuple(Fact(Look(look.shape, texture=look.texture)) for look in looks))


def _related(rng: np.random.Generator, by_color: bool) -> Caption:
    """One object beside, above or below another; the facts name colours, or only the shapes, as UniDet judges."""
    a, b = _objects(rng, 2, lambda objects: _differ("color", "shape")(objects) and _relation(objects) is not None)
    relation = _relation((a, b))
    first, second = _looks((a, b))
    text = f"{phrase(first)} {relation} {phrase(second)}"
    if not by_color:
        first, second = Look(a.shape), Look(b.shape)
    return Caption(text, (Fact(first, relation=relation, other=second),))


def _relation(objects: Sequence[Object]) -> str | None:
    a, b = objects
    return relation_between((a.col, a.row), (b.col, b.row))


def _counted(rng: np.random.Generator) -> Caption:
    """Two to four plain objects that look alike."""
    objects = _alike(rng, plain=True).objects
    look, count = Look(objects[0].shape, objects[0].color), len(objects)
    return Caption(phrase(look, count), (Fact(look, count),))


def _alike(rng: np.random.Generator, plain: bool = False) -> Scene:
    """A held-out scene of two to four objects that differ only in their cells."""
    while True:
        objects = random_scene(rng, count=int(rng.integers(2, MOST_ALIKE + 1))).objects
        first = replace(objects[0], texture="plain") if plain else objects[0]
        alike = tuple(replace(first, row=o.row, col=o.col) for o in objects)
        if held_out(alike):
            return Scene(alike)


def _one_colored(rng: np.random.Generator) -> Caption:
    """One plain object, its colour before or after the noun."""
    (look,) = _looks(_objects(rng, 1, _distinct))
    return Caption(phrase(look) if rng.random() < 0.5 else phrase_after(look), (Fact(look),))


def _list(rng: np.random.Generator) -> Caption:
    count = int(rng.integers(SHORTEST_LIST, LONGEST_LIST + 1))
    return _listed(_looks(_objects(rng, count, _distinct)))


def _dense(rng: np.random.Generator) -> Caption:
    return dense_caption(training_scene(rng, held=True), rng)


def _as_trained(rng: np.random.Generator, scene: Scene, forms: Sequence[str]) -> Caption:
    """A caption worded as in training, in one of these forms, that names every colour."""
    while True:
        caption = short_caption(scene, rng, form=str(rng.choice(forms)))
        if all(fact.look.color for fact in caption.facts):
            return caption


def _single(rng: np.random.Generator) -> Caption:
    return _as_trained(rng, Scene(tuple(_objects(rng, 1, _distinct, plain=False))), ("list", "after"))


def _two(rng: np.random.Generator) -> Caption:
    return _as_trained(rng, Scene(tuple(_objects(rng, 2, _distinct, plain=False))), ("list", "after"))


def _position(rng: np.random.Generator) -> Caption:
    objects = _objects(rng, 2, lambda pair: _distinct(pair) and _relation(pair) is not None, plain=False)
    return _as_trained(rng, Scene(tuple(objects)), ("relation",))


def _counting(rng: np.random.Generator) -> Caption:
    return _as_trained(rng, _alike(rng), ("list",))


TASKS: dict[str, dict[str, Callable[[np.random.Generator], Caption]]] = {
    "attributes": {
        "color": _colored,
        "shape": _shapes,
        "texture": _textured,
        "spatial": lambda rng: _related(rng, by_color=False),
    },
    "geneval": {
        "single_object": lambda rng: _shapes(rng, 1),
        "two_object": _shapes,
        "counting": _counted,
        "colors": _one_colored,
        "position": lambda rng: _related(rng, by_color=True),
        "color_attribution": _colored,
    },
    "positional_bias": {"list": _list},
    "dense": {"dense": _dense},
    "heldout": {"single": _single, "two": _two, "position": _position, "counting": _counting},
}
