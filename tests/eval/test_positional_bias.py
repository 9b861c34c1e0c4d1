"""Position and content are not confounded in the prompts, and the figure's numbers are means by quarter."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lidit.eval import positional_bias
from lidit.eval.positional_bias import (
    QUARTERS,
    bootstrap,
    by_quarter,
    draw_set,
    figures,
    orders,
    plot,
    score,
    sentence,
    suite,
    things,
)
from lidit.eval.suite import BenchmarkError

SHARED = Path(os.environ.get("LIDIT_SHARED", Path(__file__).parents[2] / "../shared"))
PROMPTS_DIR = SHARED / "data/t2i_compbench"
needs_prompts = pytest.mark.skipif(not PROMPTS_DIR.is_dir(), reason="no data in LIDIT_SHARED")


def made(pairs: int = 4, seed: int = 0) -> list[dict]:
    return json.loads(suite(PROMPTS_DIR, seed, pairs).files["segments.json"])["prompts"]


@pytest.mark.parametrize("count", [4, 5, 8])
def test_each_thing_stands_once_at_each_place(count: int) -> None:
    square = orders(count)
    for rows in (square, square.T):
        assert all(sorted(row) == list(range(count)) for row in rows.tolist())


@pytest.mark.parametrize("count", [4, 8])
def test_each_thing_follows_each_other_one_once(count: int) -> None:
    followed = Counter((int(a), int(b)) for row in orders(count) for a, b in zip(row, row[1:], strict=False))
    assert len(followed) == count * (count - 1)
    assert set(followed.values()) == {1}


@needs_prompts
@pytest.mark.parametrize("pairs", [4, 8])
def test_a_thousand_prompts_in_which_places_share_their_things(pairs: int) -> None:
    prompts = made(pairs)
    assert len(prompts) == len({p["prompt"] for p in prompts}) == 1000
    at = [Counter(p["segments"][i] for p in prompts) for i in range(pairs)]
    assert all(counts == at[0] for counts in at)
    kinds = Counter(p["kind"] for p in prompts)
    assert set(kinds) == {"color", "shape", "texture"}
    assert max(kinds.values()) - min(kinds.values()) <= pairs


@needs_prompts
@pytest.mark.parametrize("pairs", [4, 8])
def test_things_of_a_prompt_are_of_one_kind_and_cannot_be_mistaken(pairs: int) -> None:
    listed, _ = things(PROMPTS_DIR)
    kinds = {kind: {" ".join(thing): thing for thing in found} for kind, found in listed.items()}
    for prompt in made(pairs):
        found = [kinds[prompt["kind"]][segment] for segment in prompt["segments"]]
        assert len({adjective for _, adjective, _ in found}) == pairs
        assert len({noun.split()[-1] for _, _, noun in found}) == pairs


@needs_prompts
def test_no_noun_is_a_colour() -> None:
    listed, sources = things(PROMPTS_DIR)
    assert not any("orange" in noun.split() for found in listed.values() for _, _, noun in found)
    assert ("an", "oval", "sink") in listed["shape"]
    assert [Path(path).name for path in sources] == ["color_val.txt", "shape_val.txt", "texture_val.txt"]


@needs_prompts
def test_the_seed_decides_the_prompts() -> None:
    assert made(seed=3) == made(seed=3)
    assert made(seed=3) != made(seed=4)


@needs_prompts
def test_four_samples_of_each_prompt() -> None:
    wanted = suite(PROMPTS_DIR)
    assert len(wanted.pictures) == 4000
    assert [p.sample for p in wanted.pictures[:5]] == [0, 1, 2, 3, 0]
    assert wanted.pictures[4].path == "samples/000004.png"
    assert wanted.pictures[4].prompt == made()[1]["prompt"] != wanted.pictures[3].prompt


def test_too_few_things_are_refused() -> None:
    with pytest.raises(BenchmarkError, match="no 3 things"):
        draw_set(np.random.default_rng(0), [("a", "red", "car"), ("a", "red", "box"), ("a", "blue", "toy car")], 3)


def test_a_list_reads_as_in_the_paper() -> None:
    segments = ["a green bench", "a red car", "a blue bowl", "a pink apple"]
    assert sentence(segments) == "A green bench, a red car, a blue bowl, and a pink apple."


def test_segments_fall_into_quarters() -> None:
    assert by_quarter([1.0, 2.0, 3.0, 4.0]) == [1.0, 2.0, 3.0, 4.0]
    assert by_quarter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]) == [1.5, 3.5, 5.5, 7.5]
    assert by_quarter([1.0, 2.0, 3.0, 4.0, 5.0]) == [1.0, 2.0, 3.5, 5.0]


def test_intervals_cover_the_mean_and_know_groups() -> None:
    rng = np.random.default_rng(0)
    groups = np.arange(400) // 4
    shared = rng.normal(5.0, 1.0, 100)[groups][:, None]
    low, high = bootstrap(shared, np.arange(400), 0, 500)
    wide_low, wide_high = bootstrap(shared, groups, 0, 500)
    assert low < shared.mean() < high
    # rows of a group are copies, so that 400 prompts are worth 100: twice as wide
    assert (wide_high - wide_low)[0] == pytest.approx(2 * (high - low)[0], rel=0.25)
    assert (high - low)[0] == pytest.approx(2 * 1.96 * shared.std() / 20, rel=0.25)


def test_first_minus_last_is_of_the_same_prompts() -> None:
    rng = np.random.default_rng(0)
    details = [{"set": i // 4, "scores": [b + 0.1, b, b, b]} for i, b in enumerate(rng.uniform(0, 0.9, 40).tolist())]
    found = figures(details, 0, 200)
    assert found["first_minus_last"]["mean"] == pytest.approx(10)
    assert found["first_minus_last"]["interval_prompts"] == pytest.approx([10, 10])
    low, high = found["quarters"]["0-25"]["interval_prompts"]
    assert low < found["quarters"]["0-25"]["mean"] < high


class StubJudge:
    """Answers by place: 0.8 for the first segment, 0.2 less for each later one, 0.1 less in odd samples."""

    def __init__(self, name: str, device: str):
        self.name = name

    def __call__(self, image: np.ndarray, questions: list[str]) -> list[float]:
        assert all(question.startswith(("a ", "an ")) and question.endswith("?") for question in questions)
        return [0.8 - 0.2 * i - 0.1 * (image[0, 0, 0] % 2) for i in range(len(questions))]

    def describe(self) -> dict:
        return {"name": self.name}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two prompts drawn, of one set."""
    monkeypatch.setattr(positional_bias, "BlipVQA", StubJudge)
    segments = ["a red car", "a blue cup", "an orange hat", "a pink key"]
    prompts = [{"set": 0, "kind": "color", "prompt": sentence(s), "segments": s} for s in (segments, segments[::-1])]
    folder = tmp_path / "model"
    (folder / "samples").mkdir(parents=True)
    (folder / "segments.json").write_text(json.dumps({"prompts": prompts}))
    for i in range(8):
        Image.new("RGB", (8, 8), (i, i, i)).save(folder / f"samples/{i:06d}.png")
    return folder


def test_a_run_is_scored_by_place(run: Path) -> None:
    result = score(run, blip="stub", resamples=20)
    assert [result["quarters"][q]["mean"] for q in QUARTERS] == pytest.approx([75, 55, 35, 15])
    assert result["first_minus_last"]["mean"] == pytest.approx(60)
    assert (result["images_demanded"], result["images_scored"]) == (8, 8)
    assert list(result["scores"].values()) == pytest.approx([75, 55, 35, 15, 60])
    assert result["judge"] == {"name": "stub"}
    json.dumps(result)


def test_images_of_a_prompt_are_averaged_first(run: Path) -> None:
    (run / "samples/000001.png").unlink()
    (run / "samples/000003.png").unlink()
    with pytest.raises(BenchmarkError, match="holds 6 of 8 images; the first missing one is samples/000001.png"):
        score(run)
    result = score(run, allow_missing=True)
    assert result["quarters"]["0-25"]["mean"] == pytest.approx((80 + 75) / 2)
    assert result["images_scored"] < result["images_demanded"]
    for sample in (0, 2):
        (run / f"samples/{sample:06d}.png").unlink()
    result = score(run, allow_missing=True)
    assert (len(result["details"]), result["images_scored"]) == (1, 4)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"segments.json is missing or damaged .* lidit sample"):
        score(tmp_path)


@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_the_figure_is_drawn(run: Path, suffix: str) -> None:
    (run / "scores.json").write_text(json.dumps(score(run, resamples=20)))
    out = run / f"figure.{suffix}"
    plot([run / "scores.json"] * 2, out)
    assert out.stat().st_size > 1000


def test_only_its_scores_are_drawn(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text("{}")
    for path in (tmp_path / "scores.json", tmp_path / "nowhere.json"):
        with pytest.raises(BenchmarkError, match="is missing or holds no such scores"):
            plot([path], tmp_path / "figure.png")
