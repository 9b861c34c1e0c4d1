"""The miniature benchmarks ask for held-out scenes and score their pictures by what the pictures show."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from lidit.scenes.benchmarks import TASKS, Prompt, prompts, score
from lidit.scenes.describe import RELATIONS, Fact, Look, place_name
from lidit.scenes.draw import COLORS, SHAPES, SIZES, TEXTURES, Object, Scene, draw, held_out

CELLS = [(row, col) for row in range(3) for col in range(3)]
BESIDE = {"to the left of": (1, 0), "to the right of": (1, 2), "above": (0, 1), "below": (2, 1)}
BLANK = np.full((64, 64, 3), 247, np.uint8)


def thing(look: Look, row: int, col: int) -> Object:
    """An object that looks as named, red, plain and large where nothing is said."""
    return Object(look.shape, look.color or "red", look.texture or "plain", look.size or "large", row, col)


def scene_of(facts: tuple[Fact, ...]) -> Scene:
    """A scene that shows a prompt's facts and nothing else."""
    placed = {f.place: f for f in facts if f.place}
    if placed:
        cells = {place_name((c + 0.5) / 3, (r + 0.5) / 3): (r, c) for r, c in CELLS}
        return Scene(tuple(thing(f.look, *cells[p]) for p, f in placed.items()))
    if facts[0].relation:
        (fact,) = facts
        return Scene((thing(fact.look, *BESIDE[fact.relation]), thing(fact.other, 1, 1)))
    looks = [f.look for f in facts for _ in range(f.count)]
    return Scene(tuple(thing(look, *cell) for look, cell in zip(looks, CELLS, strict=False)))


def pictures(asked: list[Prompt]) -> list[np.ndarray]:
    """One drawing for each prompt."""
    return [draw(scene_of(p.facts), seed=i) for i, p in enumerate(asked)]


@pytest.mark.parametrize("benchmark", list(TASKS))
def test_drawings_of_the_prompts_score_one(benchmark: str) -> None:
    asked = prompts(benchmark, 25, seed=0)
    scores = score(benchmark, asked, pictures(asked))
    expected = {"q1", "q2", "q3", "q4"} if benchmark == "positional_bias" else set(TASKS[benchmark])
    assert set(scores) == expected | {"overall"}
    assert all(value >= 0.99 for value in scores.values()), scores


@pytest.mark.parametrize("benchmark", list(TASKS))
def test_blank_images_score_zero(benchmark: str) -> None:
    asked = prompts(benchmark, 5, seed=0)
    assert set(score(benchmark, asked, [BLANK] * len(asked)).values()) == {0.0}


@pytest.mark.parametrize("benchmark", list(TASKS))
def test_prompts_are_a_function_of_the_seed_and_do_not_depend_on_the_count(benchmark: str) -> None:
    ten = prompts(benchmark, 10, seed=3)
    assert ten == prompts(benchmark, 10, seed=3)
    assert ten != prompts(benchmark, 10, seed=4)
    for task in TASKS[benchmark]:
        few = [p for p in prompts(benchmark, 4, seed=3) if p.task == task]
        assert few == [p for p in ten if p.task == task][:4]


@pytest.mark.parametrize("benchmark", list(TASKS))
def test_prompts_use_no_word_that_captions_do_not(benchmark: str) -> None:
    known = {*SHAPES, *COLORS, *TEXTURES, *SIZES, "crosses", *(s + "s" for s in SHAPES)}
    known |= {*" ".join(RELATIONS).split(), "a", "an", "and", "that", "is", "two", "three", "four"}
    if benchmark != "dense":
        for p in prompts(benchmark, 40, seed=1):
            assert set(re.findall("[a-z]+", p.text)) <= known, p.text


def named_objects(facts: tuple[Fact, ...]) -> list[Object]:
    """The objects that facts name, plain where no texture is named."""
    looks = [f.look for f in facts for _ in range(f.count) if not f.relation or len(facts) == 1]
    looks += [f.other for f in facts if f.other and len(facts) == 1]
    return [thing(look, 0, 0) for look in looks]


@pytest.mark.parametrize("benchmark", list(TASKS))
def test_prompts_that_name_colors_are_held_out(benchmark: str) -> None:
    asked = [p for p in prompts(benchmark, 40, seed=2) if p.task not in ("shape", "single_object", "two_object")]
    for p in asked:
        if p.task in ("texture", "spatial"):  # their facts leave out the colours that the text names
            phrases = re.findall(rf"(?:({'|'.join(TEXTURES)}) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})", p.text)
            objects = [Object(shape, color, texture or "plain", "large", 0, 0) for texture, color, shape in phrases]
        else:
            objects = named_objects(p.facts)
        assert objects
        assert held_out(objects), p.text


def test_turning_a_relation_round_scores_zero() -> None:
    asked = [p for p in prompts("geneval", 10, seed=0) if p.task == "position"]
    turned = {"to the left of": "to the right of", "above": "below"}
    turned |= {b: a for a, b in turned.items()}
    wrong = [replace(p, facts=(replace(p.facts[0], relation=turned[p.facts[0].relation]),)) for p in asked]
    assert score("geneval", asked, pictures(wrong))["position"] == 0


def test_exchanging_two_colors_scores_zero() -> None:
    asked = [p for p in prompts("attributes", 20, seed=0) if p.task == "color"]
    swapped = []
    for p in asked:
        a, b = (f.look for f in p.facts)
        swapped.append(replace(p, facts=(Fact(replace(a, color=b.color)), Fact(replace(b, color=a.color)))))
    assert score("attributes", asked, pictures(swapped)) == {"color": 0.0, "overall": 0.0}


def test_one_object_too_many_is_a_wrong_count() -> None:
    asked = [p for p in prompts("geneval", 20, seed=0) if p.task == "counting"]
    more = [replace(p, facts=(replace(p.facts[0], count=p.facts[0].count + 1),)) for p in asked]
    assert {p.facts[0].count for p in asked} == {2, 3, 4}
    assert score("geneval", asked, pictures(more))["counting"] == 0


def test_half_a_prompt_counts_half_for_attributes_and_nothing_for_geneval() -> None:
    facts = (Fact(Look("circle", "red")), Fact(Look("square", "blue")))
    half = draw(scene_of(facts[:1]))
    text = "a red circle and a blue square"
    assert score("attributes", [Prompt(text, facts, "color")], [half])["color"] == 0.5
    assert score("geneval", [Prompt(text, facts, "color_attribution")], [half])["color_attribution"] == 0


def listed(count: int, shown: int) -> tuple[Prompt, np.ndarray]:
    """A list of so many segments and a picture of the first few."""
    looks = [Look(shape, color) for shape, color in zip(SHAPES, COLORS, strict=True)][:count]
    facts = tuple(Fact(look) for look in looks)
    return Prompt("", facts, "list"), draw(scene_of(facts[:shown]))


def test_four_segments_are_one_to_a_quarter() -> None:
    for shown in range(1, 5):
        prompt, image = listed(4, shown)
        scores = score("positional_bias", [prompt], [image])
        assert [scores[f"q{q}"] for q in range(1, 5)] == [float(q <= shown) for q in range(1, 5)]
        assert scores["overall"] == shown / 4


def test_quarters_are_averaged_within_a_prompt_first() -> None:
    eight, six = listed(8, 3), listed(6, 6)  # 2 2 2 2 and 2 1 2 1 segments to the quarters
    scores = score("positional_bias", [eight[0], six[0]], [eight[1], six[1]])
    assert [scores[f"q{q}"] for q in range(1, 5)] == [1.0, 0.75, 0.5, 0.5]


def test_overall_is_the_mean_over_tasks_not_prompts() -> None:
    asked = prompts("geneval", 3, seed=0)
    asked = [p for p in asked if p.task != "colors"] + [p for p in asked if p.task == "colors"][:1]
    images = [BLANK if p.task == "counting" else i for p, i in zip(asked, pictures(asked), strict=True)]
    assert score("geneval", asked, images)["overall"] == pytest.approx(5 / 6)


def test_wrong_calls_are_refused_with_the_reason() -> None:
    asked = prompts("geneval", 1, seed=0)
    with pytest.raises(ValueError, match="known: attributes, geneval"):
        prompts("drawbench", 1, seed=0)
    with pytest.raises(ValueError, match="one image for each prompt, not 1 for 6"):
        score("geneval", asked, [BLANK])
    with pytest.raises(ValueError, match="not 0 for 0"):
        score("geneval", [], [])
    with pytest.raises(ValueError, match="are not of benchmark 'dense'"):
        score("dense", asked, [BLANK] * 6)


def test_dense_prompts_have_forty_words() -> None:
    assert min(len(p.text.split()) for p in prompts("dense", 60, seed=0)) >= 40
