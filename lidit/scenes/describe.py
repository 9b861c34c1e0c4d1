"""Captions of scenes, made by a grammar, each with the facts that it states.

The short forms are those of the paper's benchmarks (lists of adjective-noun segments, counts, relations); the dense
form stands in for the CogVLM captions that the paper mixes with the original ones. Attributes come before or after the
noun; under a causal mask a noun cannot see those after it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from lidit.scenes.draw import Object, Scene

RELATIONS = ("to the left of", "to the right of", "above", "below")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
FORMS = ("list", "after", "relation", "located")
PLURALS = {"cross": "crosses"}


@dataclass(frozen=True)
class Look:
    """What a phrase says about an object; None for an attribute that it does not name."""

    shape: str
    color: str | None = None
    texture: str | None = None
    size: str | None = None

    def matches(self, thing: Object | Look) -> bool:
        """Whether an object has every attribute that this phrase names."""
        return all(getattr(self, f.name) in (None, getattr(thing, f.name)) for f in fields(self))

    @property
    def adjectives(self) -> list[str]:
        """The named attributes in the order of English: size, texture, colour."""
        return [word for word in (self.size, self.texture, self.color) if word]


@dataclass(frozen=True)
class Fact:
    """One statement of a caption, which the judge finds true or false.

    It says that at least one object looks like `look`, or exactly `count` objects if `count` is above one. With a
    `place`, one of them lies there; with a `relation`, one of them has this relation to an object like `other`.
    """

    look: Look
    count: int = 1
    place: str | None = None
    relation: str | None = None
    other: Look | None = None


@dataclass(frozen=True)
class Caption:
    """A caption and the facts that it states."""

    text: str
    facts: tuple[Fact, ...]


def article(words: str) -> str:
    """The words with 'a' or 'an' before them."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def phrase(look: Look, count: int = 1) -> str:
    """A phrase with attributes before the noun: 'a small striped red circle', 'three yellow triangles'."""
    if count == 1:
        return article(" ".join([*look.adjectives, look.shape]))
    return " ".join([NUMBERS[count], *look.adjectives, PLURALS.get(look.shape, look.shape + "s")])


def phrase_after(look: Look) -> str:
    """A phrase with attributes after the noun: 'a circle that is small, striped and red'."""
    words = look.adjectives
    if not words:
        return article(look.shape)
    joined = words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
    return f"{article(look.shape)} that is {joined}"


def enumerate_words(items: list[str]) -> str:
    """The items as an English list: 'a', 'a and b', 'a, b, and c'."""
    if len(items) < 3:
        return " and ".join(items)
    return ", ".join(items[:-1]) + ", and " + items[-1]


def relation_between(a: tuple[float | int, float | int], b: tuple[float | int, float | int]) -> str | None:
    """The relation of centre a to centre b (each x, y in any unit); None on a diagonal."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    if abs(dx) == abs(dy):
        return None
    if abs(dx) > abs(dy):
        return RELATIONS[0] if dx < 0 else RELATIONS[1]
    return RELATIONS[2] if dy < 0 else RELATIONS[3]


def place_name(x: float | int, y: float | int) -> str:
    """Which ninth of the image a relative position (x, y in [0, 1]) lies in, such as 'top left'."""
    column = ("left", "", "right")[min(2, int(x * 3))]
    row = ("top", "", "bottom")[min(2, int(y * 3))]
    return " ".join(word for word in (row, column) if word) or "center"


def in_place(place: str) -> str:
    """A place with its preposition: 'in the top left', 'at the top', 'on the right', 'in the center'."""
    preposition = {"top": "at", "bottom": "at", "left": "on", "right": "on"}.get(place, "in")
    return f"{preposition} the {place}"


def full_look(o: Object, size: bool = True) -> Look:
    """All that can be said about an object; a plain texture is not mentioned."""
    return Look(o.shape, o.color, None if o.texture == "plain" else o.texture, o.size if size else None)


def _list(scene: Scene, looks: list[Look], rng: np.random.Generator) -> Caption:
    groups = list(dict.fromkeys(looks))
    text = enumerate_words([phrase(look, looks.count(look)) for look in groups])
    return Caption(text, tuple(Fact(look, sum(look.matches(o) for o in scene.objects)) for look in groups))


def _after(scene: Scene, looks: list[Look], rng: np.random.Generator) -> Caption:
    return Caption(enumerate_words([phrase_after(look) for look in looks]), tuple(Fact(look) for look in looks))


def _relation(scene: Scene, looks: list[Look], rng: np.random.Generator) -> Caption | None:
    if len(scene.objects) != 2 or looks[0] == looks[1]:
        return None
    i, j = rng.permutation(2)
    a, b = scene.objects[i], scene.objects[j]
    relation = relation_between((a.col, a.row), (b.col, b.row))
    if relation is None:
        return None
    fact = Fact(looks[i], relation=relation, other=looks[j])
    return Caption(f"{phrase(looks[i])} {relation} {phrase(looks[j])}", (fact,))


def _located(scene: Scene, looks: list[Look], rng: np.random.Generator, shape: tuple[int, int]) -> Caption:
    places = [place_of(o, shape) for o in scene.objects]
    parts = [f"{phrase(look)} {in_place(place)}" for look, place in zip(looks, places, strict=True)]
    return Caption(enumerate_words(parts), tuple(Fact(look, place=p) for look, p in zip(looks, places, strict=True)))


def place_of(o: Object, grid_shape: tuple[int, int]) -> str:
    """Which ninth of the image an object's cell lies in, for a grid of (rows, columns)."""
    return place_name((o.col + 0.5) / grid_shape[1], (o.row + 0.5) / grid_shape[0])


def short_caption(
    scene: Scene, rng: np.random.Generator, grid_shape: tuple[int, int] = (3, 3), form: str | None = None
) -> Caption:
    """A caption of one phrase, in one of FORMS, with the objects in random order.

    Args:
        scene: the scene to describe.
        rng: chooses the form, the order and which attributes are named.
        grid_shape: rows and columns of the scene's grid.
        form: one of FORMS; by default a random one. A form that does not fit the scene becomes a list.

    Raises:
        ValueError: the form is unknown.
    """
    if form is None:
        form = str(rng.choice(FORMS, p=(0.33, 0.12, 0.30, 0.25)))
    if form not in FORMS:
        raise ValueError(f"unknown caption form {form!r}; known: {', '.join(FORMS)}")
    order = rng.permutation(len(scene.objects))
    scene = Scene(tuple(scene.objects[i] for i in order))
    size, color = rng.random() < 0.25, rng.random() < 0.92
    looks = [full_look(o, size) for o in scene.objects]
    if not color:
        looks = [Look(look.shape) for look in looks]
    made = None
    if form == "relation":
        made = _relation(scene, looks, rng)
    elif form == "after" and len(set(looks)) == len(looks):
        made = _after(scene, looks, rng)
    elif form == "located":
        made = _located(scene, looks, rng, grid_shape)
    return made or _list(scene, looks, rng)


def dense_caption(scene: Scene, rng: np.random.Generator, grid_shape: tuple[int, int] = (3, 3)) -> Caption:
    """A caption of 40 words or more that names every attribute and place, and the relation of two objects.

    Args:
        scene: the scene to describe.
        rng: chooses the order of the objects and the form of each sentence.
        grid_shape: rows and columns of the scene's grid.
    """
    objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    n = len(objects)
    sentences = [f"The image shows {NUMBERS[n]} {'object' if n == 1 else 'objects'} on a plain white background."]
    facts: list[Fact] = []
    for o in objects:
        look, place = full_look(o), place_of(o, grid_shape)
        sentences.append(_brief(look, place) if n > 3 else _sentence(look, place, style=int(rng.integers(3))))
        facts.append(Fact(look, place=place))
    if n == 2:
        sentences += _relate(objects[0], objects[1], facts)
    for filler in ("There is nothing else to be seen in the picture.", "The drawing is simple, flat and clean."):
        if sum(len(s.split()) for s in sentences) < 40:
            sentences.append(filler)
    return Caption(" ".join(sentences), tuple(facts))


def _relate(a: Object, b: Object, facts: list[Fact]) -> list[str]:
    """A sentence on the relation of object a to b, whose fact is added; none on a diagonal or if both look alike."""
    relation = relation_between((a.col, a.row), (b.col, b.row))
    look, other = Look(a.shape, a.color), Look(b.shape, b.color)
    if relation is None or look == other:
        return []
    facts.append(Fact(look, relation=relation, other=other))
    return [f"The {a.color} {a.shape} is {relation} the {b.color} {b.shape}."]


def _brief(look: Look, place: str) -> str:
    where = in_place(place)
    return f"{where[0].upper()}{where[1:]} is {phrase(look)}."


def _sentence(look: Look, place: str, style: int) -> str:
    texture, where = look.texture or "plain", in_place(place)
    if style == 0:
        start = f"{where[0].upper()}{where[1:]} there is a {look.size} {look.shape}"
        return f"{start} whose color is {look.color} and whose surface is {texture}."
    if style == 1:
        words = article(f"{look.color} {look.shape}")
        return f"There is {words} with a {texture} texture {where}, and its size is {look.size}."
    words = phrase(Look(look.shape, look.color, texture, look.size))
    return f"{words[0].upper()}{words[1:]} can be found {where} of the picture."
