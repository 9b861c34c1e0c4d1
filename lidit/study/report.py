"""`lidit study report`: win shares with intervals, agreement between raters, and the paper's Figure 6.

The numbers depend only on the votes and the bootstrap's seed, so a second report is the same as the first.
"""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lidit.study.store import Store, Vote

QUESTIONS = {"quality": "Image quality", "alignment": "Image-text alignment"}
OUTCOMES = ("win", "tie", "loss")  # for the model named first
ENOUGH = 3  # raters that a pair should have
REPORT, FIGURE, VOTES = "report.md", "figure6.png", "votes.csv"
COLOURS = {"win": "#1f5fbf", "tie": "#c4c7cd", "loss": "#e08214"}


@dataclass(frozen=True)
class Result:
    """One model against another on one question.

    Args:
        model: whose wins are counted.
        other: the model that it is compared with.
        question: `quality` or `alignment`.
        counts: numbers of wins, ties and losses.
        share: share of answers won, from 0 to 1, with ties as half; nan: there are no answers.
        low: lower end of the 95 % interval; nan: fewer than two prompts.
        high: its upper end, likewise.
        kappa: Fleiss' kappa between raters; nan: no pair has two raters, or all answers are alike.
        thin: how many pairs of the two models have fewer than three raters.
        pairs: how many pairs the two models have.
    """

    model: str
    other: str
    question: str
    counts: tuple[int, int, int]
    share: float
    low: float
    high: float
    kappa: float
    thin: int
    pairs: int


def report(folder: str = "runs/study", seed: int = 0, resamples: int = 10_000) -> None:
    """Print a study's win shares, intervals and agreement, and write report.md, figure6.png and votes.csv into it.

    Args:
        folder: the study, which `lidit study serve` wrote and may still be serving.
        seed: seed of the bootstrap over prompts.
        resamples: how many times the bootstrap draws prompts.

    Raises:
        ValueError: there is no study, or nobody has voted yet.
    """
    if resamples < 1:
        raise ValueError(f"--resamples is {resamples}: use at least 1; 10000 gives steady intervals")
    store = Store(Path(folder))
    votes, pairs = store.votes(), store.matches()
    store.close()
    if not votes:
        raise ValueError(f"nobody has voted in {folder} yet; `lidit study serve --out {folder}` serves its pages")
    results = [result for match in pairs for result in compare(votes, *match, pairs[match], seed, resamples)]
    text = as_markdown(results, votes)
    print(text)
    (Path(folder) / REPORT).write_text(text + "\n", encoding="utf-8")
    draw(results).savefig(Path(folder) / FIGURE, dpi=150)
    write_votes(Path(folder) / VOTES, votes)


def compare(votes: list[Vote], a: str, b: str, pairs: int, seed: int, resamples: int) -> list[Result]:
    """Compare one model with another: a result for each question."""
    own = [vote for vote in votes if (vote.a, vote.b) == (a, b)]
    prompts = {prompt: i for i, prompt in enumerate(sorted({vote.prompt for vote in own}))}
    raters = Counter(vote.prompt for vote in own)
    thin = pairs - sum(count >= ENOUGH for count in raters.values())
    results = []
    for question in QUESTIONS:
        counts = np.zeros((len(prompts), 3), int)
        for vote in own:
            counts[prompts[vote.prompt], OUTCOMES.index(outcome(vote, question))] += 1
        share, low, high = bootstrap(counts, seed, resamples)
        wins, ties, losses = (int(count) for count in counts.sum(0))
        kappa = fleiss_kappa(counts)
        results.append(Result(a, b, question, (wins, ties, losses), share, low, high, kappa, thin, pairs))
    return results


def outcome(vote: Vote, question: str) -> str:
    """What an answer means for the first model: `win`, `tie` or `loss`."""
    answer = getattr(vote, question)
    if answer == "tie":
        return "tie"
    return "win" if (answer == "left") == vote.a_left else "loss"


def bootstrap(counts: np.ndarray, seed: int, resamples: int) -> tuple[float, float, float]:
    """Share of answers won with ties as half, and its 95 % interval from prompts drawn with replacement.

    A prompt is drawn with all its answers, since answers about the same two pictures are not independent. Two made-up
    prompts are among those drawn from, one that everybody answers for the first model and one for the second (after
    Agresti and Coull, 1998): without them the interval of few prompts is too narrow, and is a single point where all
    answers are alike.

    Args:
        counts: (prompts, 3), numbers of wins, ties and losses.
        seed: seed of the draws.
        resamples: how many times prompts are drawn.

    Returns:
        Share, lower and upper end, from 0 to 1; nan without answers, the ends also with fewer than two prompts.
    """
    nan = float("nan")
    won, answers = counts @ np.array([1, 0.5, 0]), counts.sum(1)
    if not answers.sum():
        return nan, nan, nan
    share = float(won.sum() / answers.sum())
    if len(counts) < 2:
        return share, nan, nan
    usual, n = answers.mean(), len(counts) + 2
    won, answers = np.append(won, [usual, 0]), np.append(answers, [usual, usual])
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples)
    low, high = np.percentile(times @ won / (times @ answers), [2.5, 97.5])
    return share, float(low), float(high)


def fleiss_kappa(counts: np.ndarray) -> float:
    """Agreement between raters beyond chance (Fleiss, 1971): 1 is perfect, 0 is chance.

    UNSTATED: the paper gives no agreement. Here raters may be more or fewer for each item: agreement within an item
    is averaged over the items with two or more, and chance comes from the shares of all their answers.

    Args:
        counts: (items, categories), how many raters chose each category.

    Returns:
        Kappa; nan where no item has two raters, or all answers are alike.
    """
    counts = counts[counts.sum(1) >= 2]
    raters = counts.sum(1)
    if not len(counts):
        return float("nan")
    agree = ((counts * (counts - 1)).sum(1) / (raters * (raters - 1))).mean()
    chance = ((counts.sum(0) / counts.sum()) ** 2).sum()
    return float((agree - chance) / (1 - chance)) if chance < 1 else float("nan")


def as_markdown(results: list[Result], votes: list[Vote]) -> str:
    """The report as Markdown."""
    raters = Counter(vote.rater for vote in votes)
    lines = [
        "# Human evaluation",
        "",
        f"{plural(len(votes), 'answered pair')}, {plural(len(raters), 'rater')}. A share counts ties as half; its "
        "95 % interval is from a bootstrap over prompts, with one prompt added that all answers win and one that all "
        "lose; kappa is Fleiss' kappa between raters, over the pairs with two raters or more.",
    ]
    for question, title in QUESTIONS.items():
        lines += ["", f"## {title}", "", "| model | against | wins | ties | losses | share | 95 % interval | kappa |"]
        lines += ["| --- | --- |" + " ---: |" * 6]
        for each in (result for result in results if result.question == question):
            wins, ties, losses = each.counts
            interval = f"{number(each.low, '.1%')} to {number(each.high, '.1%')}" if each.low == each.low else "–"
            cells = [cell(each.model), cell(each.other), wins, ties, losses, number(each.share, ".1%"), interval]
            lines.append(f"| {' | '.join(map(str, [*cells, number(each.kappa, '.2f')]))} |")
    lines += ["", "## The votes", ""]
    for each in (result for result in results if result.question == "quality" and result.thin):
        pairs = f"{each.thin} of {each.pairs} pairs of {each.model} and {each.other}"
        lines.append(f"- {pairs} have fewer than {ENOUGH} raters.")
    decided = [getattr(vote, question) for vote in votes for question in QUESTIONS if getattr(vote, question) != "tie"]
    if decided:
        share = decided.count("left") / len(decided)
        lines.append(
            f"- The left picture was chosen in {number(share, '.1%')} of {len(decided)} answers that are not ties."
        )
    each = sorted(raters.values())
    lines.append(f"- Pairs that one rater answered: {each[0]} to {each[-1]}, median {np.median(each):g}.")
    return "\n".join(lines)


def number(value: float, form: str) -> str:
    """A number as text; nan is a dash."""
    return format(value, form).replace("%", " %") if value == value else "–"


def plural(count: int, word: str) -> str:
    """A count with its noun, which has an s unless the count is 1."""
    return f"{count} {word}{'s' * (count != 1)}"


def cell(text: str) -> str:
    """Text for a cell of a table, with its vertical bars escaped."""
    return text.replace("|", "\\|")


def draw(results: list[Result]) -> Figure:
    """Draw Figure 6: for every two models and each question a bar of wins, ties and losses."""
    matches = list(dict.fromkeys((result.model, result.other) for result in results))
    figure = Figure(figsize=(10, 1.5 + 0.6 * len(matches)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (question, title) in zip(panels, QUESTIONS.items(), strict=True):
        _bars(panel, [result for result in results if result.question == question])
        panel.set_title(title)
    panels[0].set_yticks(range(len(matches)), [f"{model} against {other}" for model, other in matches])
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _bars(panel: Axes, results: list[Result]) -> None:
    """Draw the bars of one question, with their shares in percent."""
    shares = np.array([np.array(result.counts) / max(1, sum(result.counts)) for result in results])
    starts = np.zeros(len(results))
    for i, name in enumerate(OUTCOMES):
        bars = panel.barh(range(len(results)), shares[:, i], left=starts, color=COLOURS[name], label=name, height=0.6)
        words = [f"{share:.0%}" if share >= 0.06 else "" for share in shares[:, i]]
        panel.bar_label(bars, words, label_type="center", color="white" if name == "win" else "black")
        starts += shares[:, i]
    panel.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    panel.set_xlim(0, 1)
    panel.set_xticks([0, 0.25, 0.5, 0.75, 1])
    panel.set_ylim(-0.6, len(results) - 0.4)
    panel.xaxis.set_major_formatter("{x:.0%}")
    panel.spines[["top", "right"]].set_visible(False)


def write_votes(path: Path, votes: list[Vote]) -> None:
    """Write the answers that count, one a row, for other statistics."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["rater", "prompt", "left", "right", "quality", "alignment"])
        for vote in votes:
            sides = (vote.a, vote.b) if vote.a_left else (vote.b, vote.a)
            rows.writerow([vote.rater, vote.prompt, *sides, vote.quality, vote.alignment])
