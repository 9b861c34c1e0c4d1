"""Positional bias (LI-DiT, Figure 3 and appendix A.3): how well a model draws what a prompt names first, and last.

The paper's 1,000 prompts were not published. Ours have the same form, a list of four things such as "A green bench, a
red car, a blue bowl, and a pink apple.". Attributes and nouns are T2I-CompBench's, a prompt has one kind of attribute,
and there are four images of each prompt. The score of a segment, which is one thing, is BLIP-VQA's p(yes) to "a green
bench?"; it is averaged over a prompt's images first, and then over prompts.

A set of things comes in as many orders as it has things. Each thing is once at each place, so content cannot pass for
position; if their number is even, each thing also follows each other thing once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from lidit.eval.blip_vqa import BlipVQA, four_decimals
from lidit.eval.suite import BenchmarkError, Picture, Suite, present, read_image
from lidit.eval.t2i_compbench import ATTRIBUTES, prompts_of, template_pairs

PROMPTS, IMAGES_PER_PROMPT = 1000, 4
QUARTERS = ("0-25", "25-50", "50-75", "75-100")  # per cent of the prompt's length in segments
PAPER_TOP = 70  # top of the axis in the paper's figure
COLORS = {"black", "white", "gray", "grey", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown"}
COLORS |= {"gold", "silver", "beige"}
Things = list[tuple[str, str, str]]  # article, adjective, noun


def things(prompts_dir: Path) -> tuple[dict[str, Things], dict[str, str]]:
    """The things in T2I-CompBench's templated prompts, by kind of attribute, in order of appearance; and the sources.

    Nouns that hold a colour's name ("a red orange") are left out.

    Raises:
        BenchmarkError: a prompt file is missing, or is not the published one.
    """
    found, sources = {}, {}
    for kind in ATTRIBUTES:
        prompts, sources[str(prompts_dir / f"{kind}_val.txt")] = prompts_of(prompts_dir, f"{kind}_val.txt")
        found[kind] = list(dict.fromkeys(thing for prompt in prompts for thing in template_pairs(prompt) or []))
    return {
        kind: [thing for thing in listed if not COLORS & set(thing[2].split())] for kind, listed in found.items()
    }, sources


def orders(count: int) -> Int[np.ndarray, "n n"]:
    """A Williams square: each of n things is once at each place and, if n is even, once after each other thing."""
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(count)]  # 0, 1, -1, 2, -2 ...
    return (np.array(zigzag) + np.arange(count)[:, None]) % count


def draw_set(rng: np.random.Generator, listed: Things, count: int) -> Things:
    """Draw `count` things that differ in their adjectives and in the last words of their nouns.

    Raises:
        BenchmarkError: there are fewer such things.
    """
    for _ in range(100):
        chosen: dict[tuple[str, str], tuple[str, str, str]] = {}
        for i in rng.permutation(len(listed)):
            _, adjective, noun = listed[i]
            if not any(adjective == a or noun.split()[-1] == head for a, head in chosen):
                chosen[adjective, noun.split()[-1]] = listed[i]
            if len(chosen) == count:
                return list(chosen.values())
    raise BenchmarkError(f"there are no {count} things with different attributes and nouns; ask for fewer pairs")


def suite(prompts_dir: Path, prompt_seed: int = 0, pairs: Literal[4, 8] = 4) -> Suite:
    """The 4 x 1,000 pictures to draw: `samples/NNNNNN.png` with N = 4 x prompt + sample; segments.json has the prompts.

    Args:
        prompts_dir: folder with color_val.txt, shape_val.txt and texture_val.txt of T2I-CompBench's examples/dataset.
        prompt_seed: decides the sets of things; the kinds of attribute take turns.
        pairs: number of things in a prompt. UNSTATED: the paper says "up to 8 nouns or attributes"; its six samples all
            have four adjectives and four nouns, so we take 4 pairs.

    Raises:
        BenchmarkError: a prompt file is missing, or is not the published one.
    """
    listed, sources = things(prompts_dir)
    rng = np.random.default_rng(prompt_seed)
    prompts = []
    for s in range(PROMPTS // pairs):
        kind = ATTRIBUTES[s % len(ATTRIBUTES)]
        chosen = draw_set(rng, listed[kind], pairs)
        for order in orders(pairs):
            segments = [" ".join(chosen[i]) for i in order]
            prompts.append({"set": s, "kind": kind, "prompt": sentence(segments), "segments": segments})
    pictures = [
        Picture(_path(p, sample), prompt["prompt"], sample)
        for p, prompt in enumerate(prompts)
        for sample in range(IMAGES_PER_PROMPT)
    ]
    made = {"seed": prompt_seed, "pairs": pairs, "images_per_prompt": IMAGES_PER_PROMPT, "prompts": prompts}
    return Suite("positional-bias", pictures, sources, {"segments.json": json.dumps(made, indent=1) + "\n"})


def sentence(segments: Sequence[str]) -> str:
    """A list as the paper writes it: "A green bench, a red car, a blue bowl, and a pink apple."."""
    text = f"{', '.join(segments[:-1])}, and {segments[-1]}."
    return text[0].upper() + text[1:]


def score(
    run: Path,
    blip: str = "Salesforce/blip-vqa-capfilt-large",
    allow_missing: bool = False,
    seed: int = 0,
    resamples: int = 1000,
    device: str = "cpu",
) -> dict[str, Any]:
    """Scores in [0, 100] by quarter of the prompt, with 95 % bootstrap intervals.

    Prompts of one set share their things, so intervals are given twice: over prompts, and over whole sets.

    Args:
        run: folder that `lidit sample --benchmark positional-bias` wrote.
        blip: Hugging Face id or folder of BLIP-VQA, see `lidit/eval/blip_vqa.py`.
        allow_missing: score a run that lacks images; the result counts them.
        seed: seed of the bootstrap.
        resamples: number of resamples of the bootstrap.
        device: device to run the model on.

    Returns:
        `scores`, the means alone; `quarters` and `first_minus_last`, each with {mean, interval_prompts, interval_sets};
        the numbers of images; the `judge`; and `details` of each prompt.

    Raises:
        BenchmarkError: the folder is not such a run, images are missing or unreadable, or the model cannot be loaded.
    """
    path = run / "segments.json"
    try:
        prompts = json.loads(path.read_text())["prompts"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise BenchmarkError(
            f"{path} is missing or damaged ({type(error).__name__}); draw the run with "
            "lidit sample --benchmark positional-bias"
        ) from error
    demanded = [_path(p, sample) for p in range(len(prompts)) for sample in range(IMAGES_PER_PROMPT)]
    found = set(present(run, demanded, allow_missing))
    judge = BlipVQA(blip, device)
    details = []
    for p, prompt in enumerate(prompts):
        images = [path for path in (_path(p, sample) for sample in range(IMAGES_PER_PROMPT)) if path in found]
        asked = [f"{segment}?" for segment in prompt["segments"]]
        yes = [[four_decimals(answer) for answer in judge(read_image(run / image), asked)] for image in images]
        if images:
            details.append(prompt | {"images": images, "yes": yes, "scores": np.mean(yes, axis=0).tolist()})
    numbers = figures(details, seed, resamples)
    means = {f"{quarter} %": number["mean"] for quarter, number in numbers["quarters"].items()}
    return {
        "name": f"positional-bias-{judge.name}",
        "scores": means | {"first minus last": numbers["first_minus_last"]["mean"]},
        **numbers,
        "images_demanded": len(demanded),
        "images_scored": len(found),
        "judge": judge.describe(),
        "details": details,
    }


def _path(prompt: int, sample: int) -> str:
    return f"samples/{IMAGES_PER_PROMPT * prompt + sample:06d}.png"


def by_quarter(scores: Sequence[float]) -> list[float]:
    """The mean score of a prompt's segments in each quarter: segment i of n is in quarter floor(4 (i + 0.5) / n)."""
    quarter = (4 * (np.arange(len(scores)) + 0.5) / len(scores)).astype(int)
    return [float(np.mean(np.array(scores)[quarter == q])) for q in range(len(QUARTERS))]


def figures(details: Sequence[dict], seed: int, resamples: int) -> dict[str, Any]:
    """The figure's numbers, from each prompt's `set` and segment `scores`; first minus last is quarter 1 minus 4."""
    values = 100 * np.array([by_quarter(prompt["scores"]) for prompt in details])
    values = np.column_stack([values, values[:, 0] - values[:, -1]])
    _, sets = np.unique([prompt["set"] for prompt in details], return_inverse=True)
    intervals = {
        "interval_prompts": bootstrap(values, np.arange(len(values)), seed, resamples),
        "interval_sets": bootstrap(values, sets, seed, resamples),
    }
    said = [
        {"mean": float(values[:, i].mean())} | {name: ends[:, i].tolist() for name, ends in intervals.items()}
        for i in range(values.shape[1])
    ]
    return {"quarters": dict(zip(QUARTERS, said[:-1], strict=True)), "first_minus_last": said[-1]}


def bootstrap(
    values: Float[np.ndarray, "n k"], groups: Int[np.ndarray, " n"], seed: int, resamples: int
) -> Float[np.ndarray, "2 k"]:
    """Ends of the 95 % percentile intervals of the means of k columns, resampling whole groups of rows."""
    sums, sizes = np.zeros((groups.max() + 1, values.shape[1])), np.bincount(groups)
    np.add.at(sums, groups, values)
    drawn = np.random.default_rng(seed).integers(len(sizes), size=(resamples, len(sizes)))
    means = np.stack([sums[rows].sum(0) / sizes[rows].sum() for rows in drawn])
    return np.percentile(means, [2.5, 97.5], axis=0)


def plot(scores: Sequence[Path], out: Path) -> None:
    """Draw Figure 3 from scores.json files: a line for each run, named after its folder, with intervals over prompts.

    Args:
        scores: files that `lidit score --benchmark positional-bias` wrote.
        out: picture to write; the suffix decides its kind: .png, .pdf or .svg.

    Raises:
        BenchmarkError: a file is missing, or does not hold scores of this benchmark.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    top = PAPER_TOP
    for path in scores:
        quarters = _quarters(path)
        means = np.array([quarters[q]["mean"] for q in QUARTERS])
        low, high = np.array([quarters[q]["interval_prompts"] for q in QUARTERS]).T
        axes.errorbar(QUARTERS, means, yerr=[means - low, high - means], marker="o", capsize=3, label=path.parent.name)
        top = max(top, high.max())
    axes.set(xlabel="position in the prompt (%)", ylabel="BLIP-VQA score", ylim=(0, top))
    axes.legend()
    figure.savefig(out)


def _quarters(path: Path) -> dict[str, dict]:
    try:
        return json.loads(path.read_text())["quarters"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise BenchmarkError(
            f"{path} is missing or holds no such scores; write it with lidit score --benchmark positional-bias"
        ) from error
