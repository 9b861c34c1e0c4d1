"""Captions say what is drawn, in the forms of the paper's benchmarks, and know which facts they state."""

from __future__ import annotations

import numpy as np
import pytest

from lidit.scenes.describe import (
    FORMS,
    RELATIONS,
    Caption,
    Fact,
    Look,
    article,
    dense_caption,
    enumerate_words,
    full_look,
    in_place,
    phrase,
    phrase_after,
    place_name,
    relation_between,
    short_caption,
)
from lidit.scenes.draw import Object, Scene, random_scene

RED = Object("circle", "red", "plain", "large", 1, 0)
BLUE = Object("square", "blue", "striped", "small", 1, 2)


def captions(scene: Scene, form: str, count: int = 60) -> list[Caption]:
    """Many captions of one scene in one form."""
    return [short_caption(scene, np.random.default_rng(i), form=form) for i in range(count)]


def test_attributes_stand_before_the_noun_in_english_order() -> None:
    assert phrase(Look("circle", "red", "striped", "small")) == "a small striped red circle"
    assert phrase(Look("star", "orange")) == "an orange star"


def test_attributes_stand_after_the_noun_when_asked() -> None:
    assert phrase_after(Look("circle", "red", "striped", "small")) == "a circle that is small, striped and red"
    assert phrase_after(Look("ring", "cyan")) == "a ring that is cyan"
    assert phrase_after(Look("heart")) == "a heart"


def test_several_alike_are_counted_in_the_plural() -> None:
    assert phrase(Look("triangle", "yellow"), 3) == "three yellow triangles"
    assert phrase(Look("cross"), 2) == "two crosses"


def test_lists_are_joined_as_the_paper_joins_them() -> None:
    assert enumerate_words(["a green star"]) == "a green star"
    assert enumerate_words(["a green star", "a red circle"]) == "a green star and a red circle"
    three = enumerate_words(
        [phrase(Look("star", "green")), phrase(Look("circle", "red")), phrase(Look("square", "blue"))]
    )
    assert three == "a green star, a red circle, and a blue square"
    assert article("orange ring") == "an orange ring"


def test_relations_are_seen_with_y_pointing_down() -> None:
    assert [relation_between(a, (1, 1)) for a in ((0, 1), (2, 1), (1, 0), (1, 2))] == list(RELATIONS)
    assert relation_between((0, 0.9), (1, 1)) == "to the left of"
    assert relation_between((0, 0), (1, 1)) is None


def test_nine_places_are_named_by_thirds() -> None:
    names = [place_name(x, y) for y in (0.1, 0.5, 0.9) for x in (0.1, 0.5, 0.9)]
    assert names == ["top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right"]
    assert place_name(1, 1) == "bottom right"
    places = [in_place(p) for p in ("top left", "top", "right", "center")]
    assert places == ["in the top left", "at the top", "on the right", "in the center"]


def test_a_relation_caption_is_true_either_way_round() -> None:
    for caption in captions(Scene((RED, BLUE)), "relation"):
        (fact,) = caption.facts
        first_is_red = fact.look.shape == "circle"
        assert fact.relation == ("to the left of" if first_is_red else "to the right of")
        assert caption.text == f"{phrase(fact.look)} {fact.relation} {phrase(fact.other)}"


def test_a_form_that_does_not_fit_becomes_a_list() -> None:
    diagonal = Scene((RED, Object("star", "green", "plain", "small", 0, 1)))
    alike = Scene((RED, Object("circle", "red", "plain", "large", 2, 0)))
    for scene, form in ((diagonal, "relation"), (alike, "relation"), (alike, "after")):
        for caption in captions(scene, form):
            assert not any(word in caption.text for word in (*RELATIONS, "that is"))
    assert {c.facts[0].count for c in captions(alike, "list")} == {2}


def test_a_located_caption_names_each_objects_place() -> None:
    for caption in captions(Scene((RED, BLUE)), "located"):
        assert {f.look.shape: f.place for f in caption.facts} == {"circle": "left", "square": "right"}
        assert "on the left" in caption.text
        assert "on the right" in caption.text


def test_captions_name_more_or_less_and_sometimes_no_color() -> None:
    made = captions(Scene((BLUE,)), "list", 400)
    texts = {c.text for c in made}
    assert texts == {"a striped blue square", "a small striped blue square", "a square"}
    assert 0.03 < np.mean([c.text == "a square" for c in made]) < 0.15


def test_every_form_is_drawn_and_an_unknown_one_is_refused() -> None:
    texts = [short_caption(Scene((RED, BLUE)), np.random.default_rng(i)).text for i in range(200)]
    for mark in (" that is ", " of ", " on the ", "circle and a"):
        assert any(mark in text for text in texts), mark
    with pytest.raises(ValueError, match=", ".join(FORMS)):
        short_caption(Scene((RED,)), np.random.default_rng(0), form="poem")


def test_the_same_generator_gives_the_same_captions() -> None:
    scene = random_scene(np.random.default_rng(5))
    for make in (short_caption, dense_caption):
        assert make(scene, np.random.default_rng(1)) == make(scene, np.random.default_rng(1))


@pytest.mark.parametrize("count", range(1, 9))
def test_dense_captions_have_forty_words_and_name_every_attribute(count: int) -> None:
    for seed in range(40):
        scene = random_scene(np.random.default_rng(seed), count=count)
        caption = dense_caption(scene, np.random.default_rng(seed))
        assert len(caption.text.split()) >= 40
        assert len([f for f in caption.facts if f.place]) == count
        for o in scene.objects:
            words = [o.shape, o.color, o.size, *([o.texture] if o.texture != "plain" else [])]
            assert all(word in caption.text.lower() for word in words), (words, caption.text)


def test_a_dense_caption_of_two_objects_relates_them_unless_they_lie_diagonally() -> None:
    caption = dense_caption(Scene((RED, BLUE)), np.random.default_rng(0))
    assert any(f.relation for f in caption.facts)
    diagonal = Scene((RED, Object("star", "green", "plain", "small", 0, 1)))
    assert not any(f.relation for f in dense_caption(diagonal, np.random.default_rng(0)).facts)


def test_a_look_matches_what_has_everything_it_names() -> None:
    assert Look("square").matches(BLUE)
    assert Look("square", "blue", "striped", "small").matches(BLUE)
    assert not Look("square", "red").matches(BLUE)
    assert full_look(RED) == Look("circle", "red", None, "large")
    assert Fact(Look("circle")) == Fact(Look("circle"), 1, None, None, None)
