"""What pages say is so: messages are those of the code, numbers those of the recipes, generated parts are there."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from lidit.cli import VERBS
from lidit.eval.suites import BENCHMARKS
from tests.docs.conftest import MANUAL, PAGES, ROOT

DOCS = ROOT / "docs"
TABLE_ROW = re.compile(r"^\| (?P<first>.*?) \|", re.MULTILINE)
STANDS_FOR = re.compile(r"[A-Z]{2,}|\b[A-Z]\b|\.\.\.")  # words in capitals
FOREIGN = {"Connection closed by peer"}  # of gloo
CLUSTER = ROOT / "experiments/configs/cluster"
PROSE = {  # lines that name the tags and are none
    "# What the paper leaves open is marked UNSTATED.",
    "What the paper (arXiv 2502.04412) leaves open is marked UNSTATED.",
}

hooks_spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
hooks = importlib.util.module_from_spec(hooks_spec)
hooks_spec.loader.exec_module(hooks)


@cache
def messages() -> list[str]:
    """Every text of the code; what an f-string fills in is a NUL."""
    found = []
    for path in sorted(path for folder in ("lidit", "data_prep") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted(text: str) -> list[str]:
    """The messages in the first columns of tables."""
    rows = TABLE_ROW.findall(text)
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row)]


def printed(message: str) -> bool:
    """Whether the code holds a text with this in it, its words in capitals standing for anything."""
    pattern = re.compile(".*?".join(map(re.escape, STANDS_FOR.split(message))))
    return any(pattern.search(text) for text in messages())


@pytest.mark.parametrize("message", quoted((DOCS / "troubleshooting.md").read_text()))
def test_messages_under_troubleshooting_are_those_that_are_printed(message: str) -> None:
    assert sum(map(len, STANDS_FOR.split(message))) >= 10, "too little to find"
    assert printed(message)


def test_messages_of_jobs_are_those_that_are_printed() -> None:
    section = (DOCS / "cluster.md").read_text().split("## 6.")[1]
    assert [message for message in quoted(section) if not printed(message) and message not in FOREIGN] == []


def test_a_message_that_nothing_prints_is_found_out() -> None:
    assert not printed("the flux capacitor of NAME is empty")


@pytest.mark.parametrize("overlay", sorted(CLUSTER.glob("*.yaml")), ids=lambda path: path.stem)
def test_memory_is_what_the_recipes_say(overlay: Path) -> None:
    page, trainer = (DOCS / "gpus.md").read_text(), yaml.safe_load(overlay.read_text())["trainer"]
    said = overlay.read_text().replace("\n# ", " ")
    row = rf"^\| (\d+) of 80 GB \| `{overlay.stem}`.*?\| (\d+) \| (\d+) GB \|"
    (found,) = re.findall(row, page, re.MULTILINE)
    gpus, images, memory = map(int, found)
    assert gpus == trainer["devices"] * trainer["num_nodes"]
    assert re.search(rf"\b{images} a rank", said)
    assert f"Expected per GPU: {memory} GB" in said
    row = rf"^\| `{overlay.stem}` \| ([\d.]+) GB.*?\| ([\d.]+) GB.*?\| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) GB \|$"
    (parts,) = re.findall(row, page, re.MULTILINE)
    assert all(f"{part} GB" in said for part in parts)
    assert sum(map(float, parts)) == pytest.approx(memory, abs=0.6)


def occurrences() -> list[tuple[str, int, str]]:
    """File, line number and line of every UNSTATED and DEVIATION of the code, tag or prose."""
    return [
        (str(path.relative_to(ROOT)), number, line)
        for path in hooks.files()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for _ in re.findall("UNSTATED|DEVIATION", line)
    ]


def test_every_choice_of_the_code_is_on_the_page_with_its_line() -> None:
    page = hooks.on_page_markdown((DOCS / "choices.md").read_text())
    rows = re.findall(r"^\| `([\w./]+):(\d+)` \| (.*\w.*) \|$", page, re.MULTILINE)
    places = [(file, number) for file, number, line in occurrences() if line.strip() not in PROSE]
    assert sorted((file, int(number)) for file, number, _ in rows) == sorted(places)
    assert len(rows) > 70


def test_every_line_of_the_prose_about_tags_is_still_there() -> None:
    assert {line.strip() for _, _, line in occurrences()} >= PROSE


def test_the_page_shows_the_value_that_a_choice_is_about() -> None:
    page = hooks.on_page_markdown((DOCS / "choices.md").read_text())
    assert re.search(r"lidit_1b\.yaml:\d+` \| `weight_decay: 0\.01`: the paper names no weight decay", page)


def test_make_choices_prints_every_choice(capsys: pytest.CaptureFixture) -> None:
    hooks.main()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in printed] == [choice.place for choice in hooks.tagged()]
    assert "python docs/hooks.py" in (ROOT / "Makefile").read_text().split("\nchoices:")[1]


@pytest.mark.parametrize(
    ("before", "said", "after", "expected"),
    [
        ("x: 1  # ", "we took 1", ["# of another", "y: 2"], ("x: 1", "we took 1")),
        ("x:  # ", "we took 1", [], ("x", "we took 1")),
        ("    # ", "and so", ["    # on.", "    x = 1  # not this"], ("", "and so on.")),
        ("# ", "this", ["# UNSTATED: another"], ("", "this")),
        (
            "        size: pixels. ",
            "how many,",
            ["            and why.", "        seed: no."],
            ("size", "how many, and why."),
        ),
        ("    ", "the end", ["    of it.", "", "    Args:"], ("", "the end of it.")),
        ("    ", "the end", ['    of it."""', "    x = 1"], ("", "the end of it.")),
        ('    """Text. ', 'all of it."""', ["    x = 1"], ("", "all of it.")),
    ],
)
def test_a_choice_is_told_whole_with_what_it_is_about(
    before: str, said: str, after: list[str], expected: tuple[str, str]
) -> None:
    assert hooks.told(before, said, after) == expected


def test_the_paper_map_is_the_readmes_and_every_symbol_is_there() -> None:
    page = hooks.on_page_markdown((DOCS / "paper_map.md").read_text())
    assert "<!--" not in page
    symbols = re.findall(r"`([\w/]+\.py):(\w+)`", page)
    assert len(symbols) > 10
    for file, symbol in symbols:
        assert re.search(rf"^(class|def) {symbol}\b", (ROOT / file).read_text(), re.MULTILINE), f"{file}:{symbol}"


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in MANUAL if f": {page.name}\n" not in text] == []


def test_the_first_page_is_short_and_fits_a_screen_of_120_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_every_verb_and_every_benchmark_has_a_place_in_the_manual() -> None:
    commands, benchmarks = ((DOCS / f"{name}.md").read_text() for name in ("commands", "benchmarks"))
    assert [verb for verb in VERBS if not re.search(rf"`lidit {verb}[` ]", commands)] == []
    assert [name for name in BENCHMARKS if f"`{name}`" not in benchmarks] == []


def test_the_backbone_that_the_manual_shows_is_one() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "how_it_is_built.md").read_text(), re.DOTALL)
    shown: dict = {}
    exec(code, shown)
    backbone, latent = shown["Backbone"](16), torch.randn(2, 16, 8, 6)
    text = SimpleNamespace(pooled=torch.zeros(2, backbone.width))
    assert backbone(latent, torch.rand(2), text).shape == latent.shape
    assert len(backbone.blocks) == 2
    assert backbone.patch == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_no_registry_and_no_path_of_a_machine(page: Path) -> None:
    assert not re.search(r"pypi\.org|pythonhosted|/home/|/root/|/tmp/|/Users/", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


DEFAULTS = {  # what a recipe's keys belong to where it names no class
    "lidit.data.datamodule.ShardData",
    "lidit.models.llm.FrozenLLM",
    "lidit.models.vae.FrozenVAE",
    "lidit.module.TextToImage",
    "lidit.parallel.Parallel",
    "lidit.strategy.Sharded",
}


def test_every_class_whose_arguments_are_keys_of_a_recipe_is_in_the_reference() -> None:
    shown = set(re.findall(r"^::: ([\w.]+)$", (DOCS / "reference.md").read_text(), re.MULTILINE))
    recipes = "".join(path.read_text() for path in (ROOT / "experiments/configs").rglob("*.yaml"))
    named = DEFAULTS | set(re.findall(r"class_path: (lidit\.[\w.]+)", recipes))
    assert len(named) > 15
    assert sorted(name for name in named if not {name, name.rpartition(".")[0]} & shown) == []


def measured(name: str) -> dict:
    return json.loads((ROOT / f"experiments/results/speed_{name}.json").read_text())


def card(name: str) -> dict:
    return json.loads((ROOT / f"lidit/assets/{name}/card.json").read_text())["measured"]


def test_what_the_bundled_model_draws_is_what_its_card_says() -> None:
    first, page, drawn = (ROOT / "README.md").read_text(), (DOCS / "miniature.md").read_text(), card("lidit")
    held_out = drawn["heldout"]
    assert f"| **{held_out['overall']:.0%}** | of 2,000".replace("%", " %") in first
    kinds = {"one object": "single", "two objects": "two", "positions": "position", "counts": "counting"}
    assert all(f"{kind} ({held_out[name]:.0%})".replace("%", " %") in first for kind, name in kinds.items())
    assert ", ".join(f"{name} {held_out[name]:.2f}" for name in kinds.values()) in page
    assert ", ".join(f"{drawn['heldout, heun'][name]:.2f}" for name in kinds.values()) in page
    assert f"overall **{drawn['geneval']['overall']:.2f}**" in page
    tasks = drawn["geneval"] | drawn["attributes"]
    assert all(f"{name.split('_')[0]}" in page and f" {share:.2f}" in page for name, share in tasks.items())
    assert ", ".join(f"{drawn['positional_bias'][f'q{i}']:.2f}" for i in range(1, 5)) in page
    assert f"| {drawn['dense']['overall']:.2f} |" in page
    assert f"{card('vae')['psnr_db']:.1f} dB" in page


def test_how_much_faster_captions_are_read_is_what_was_measured() -> None:
    best = next(row for row in measured("prompt_encoding")["reading"] if row["way"] == "and sorted by length")
    said = f"{best['over_whole']:.1f} ± {best['spread']:.1f} over three rounds"
    assert said in (ROOT / "README.md").read_text()


def test_speeds_are_those_that_were_measured() -> None:
    found = {(r["model"], r["width"], r["dtype"], r["compiled"]): r for r in measured("denoiser")["rows"]}
    rows = [
        f"| {model} | {r['depth']} x {width} | {r['parameters'] / 1e6:.1f} | {r['forward_gflop']:.1f} | "
        f"{r['peak_mb']:.0f} | {found[model, width, 'bfloat16', compiled]['peak_mb']:.0f} |"
        for (model, width, dtype, compiled), r in found.items()
        if dtype == "float32" and not compiled
    ]
    for (model, width, dtype, compiled), r in found.items():
        if model == "LIDiT":
            both = r, found["SD3", width, dtype, compiled]
            ratios = [f"{x[f'{what}_over_pixart']:.2f}" for what in ("training", "inference") for x in both]
            setting = f"{r['depth']} x {width}, {dtype}{', compiled' * compiled}"
            rows.append(f"| {' | '.join([setting, *ratios])} |")
    rows += [
        f"| {r['way']} | {r['captions_per_second']:.1f} | {r['over_whole']:.2f} | {r['weights_mb']:.0f} |"
        for r in measured("prompt_encoding")["reading"]
    ]
    rows += [f"{r['attributes']:.1%}".replace("%", " %") for r in measured("sampling")["quality"]]
    rows += [f"{measured('loop')['overhead']:.1%}".replace("%", " %")]
    page = (DOCS / "speed.md").read_text()
    assert [row for row in rows if row not in page] == []
