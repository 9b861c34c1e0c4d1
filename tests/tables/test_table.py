"""Tables are data: every row parses at both scales, runs resume, and a report depends on the results alone."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from experiments import picture_scores, scene_questions, setting, text_gain
from lidit.arguments import call
from lidit.cli import main
from lidit.fit import read_recipe
from lidit.models.t5 import FrozenT5
from lidit.module import TextToImage
from lidit.tables import table as verb
from lidit.tables.file import SCALES, Row, Table, at_scale, read_table, tables_in
from lidit.tables.report import compare, kendall, spread
from lidit.verbs import VERBS

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
FILES = tables_in(EXPERIMENTS)
COMPONENTS = EXPERIMENTS / "table2_components.py"
MODULES = (picture_scores, scene_questions, text_gain)  # of the tables' own commands
ADAPTER = EXPERIMENTS / "llmdiff_ablation.py"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Table files name recipes as the repository's root sees them."""
    monkeypatch.chdir(EXPERIMENTS.parent)
    monkeypatch.setattr(sys, "argv", ["lidit"])  # LightningCLI warns of pytest's arguments


def parsed(config: str, options: list[str]) -> TextToImage:
    """What `lidit fit` would train, with every constructor called and nothing else."""
    _, model, _ = read_recipe(["--config", config, *options])
    return model


def test_there_is_a_file_for_each_table_and_figure_that_is_run() -> None:
    kinds = [path.stem.split("_")[0] for path in FILES]
    assert kinds == [*(f"table{i}" for i in range(1, 7)), "figure2", "figure3", "prompt", "llmdiff"]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_every_row_parses_over_its_recipe_and_changes_what_it_says(file: Path, scale: str) -> None:
    table = read_table(file, scale)
    assert len({row.digest for row in table.rows}) == len(table.rows) > 1
    for row in table.rows:
        model = parsed(row.config, row.options)
        assert len(model.llms) == len(row.llms)
        for llm, said in zip(model.llms, row.llms, strict=True):
            arguments = said.get("init_args", said)
            assert llm.name == arguments["name"]
            assert isinstance(llm, FrozenT5) == ("t5" in llm.name)
            assert (
                llm.layer == (-1 if "t5" in llm.name else arguments.get("layer", -3)) or file.stem == "llmdiff_ablation"
            )
            assert llm.prompts.instruction == arguments.get("instruction", llm.prompts.instruction)
        assert row.steps > 0


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_every_file_says_claim_command_cost_and_deviation(file: Path) -> None:
    table = read_table(file, "mini")
    assert re.match(r"(Table|Figure) \d: |Ten ways|LLMDiff-Adapter: ", table.claim)
    assert f"lidit table experiments/{file.name} run" in table.text
    assert "Cost: mini" in table.text
    assert "; paper" in table.text
    assert "Ours deviates" in table.text
    assert table.claims


def test_rows_that_tables_share_are_one_run() -> None:
    digest = {(file.stem, row.label): row.digest for file in FILES for row in read_table(file, "mini").rows}
    one = [
        ("table2_components", "none"),
        ("table3_causal_mask", "LLaMA3, no refiner"),
        ("table4_instruction", "base LLM, none"),
        ("figure2_understanding", "LLaMA3-8B"),
        ("figure3_positional_bias", "LLaMA3-8B"),
    ]
    assert len({digest[place] for place in one}) == 1
    assert len(set(digest.values())) < len(digest)


def test_at_paper_scale_the_ablations_are_the_papers() -> None:
    for row in read_table(COMPONENTS, "paper").rows:
        recipe = row.recipe
        assert (row.steps, recipe["data"]["batch_size"], recipe["model"]["learning_rate"]) == (300_000, 256, 1e-4)
    llms = read_table(COMPONENTS, "paper").rows[-1].llms
    assert [llm["name"] for llm in llms] == ["llava-hf/llama3-llava-next-8b-hf", "llava-hf/llava-interleave-qwen-7b-hf"]


@pytest.mark.parametrize("scale", SCALES)
def test_a_plan_is_plain_commands_each_once_in_an_order_that_works(
    scale: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table", str(COMPONENTS), "plan", "--scale", scale, "--seeds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(set(lines)) == len(lines)
    verbs = []
    for words in map(shlex.split, lines):
        if words[:2] == ["python", "-m"]:  # a benchmark of the setting's own
            continue
        assert words[0] == "lidit"
        verbs.append(next(v for v in (" ".join(words[1:3]), words[1]) if v in VERBS))
    assert verbs.count("fit") == 10
    assert verbs.count("sample") == verbs.count("score") == 20
    first = [verbs.index(v) for v in ("fit", "sample", "score")]
    assert first == sorted(first)
    assert main(["table", str(COMPONENTS), "plan", "--scale", scale, "--stage", "fit"]) == 0
    assert all(line.startswith("lidit fit ") for line in capsys.readouterr().out.splitlines())


MISTAKES = {
    "unknown row": (["table2_components.py", "plan", "--rows", "[nothing]"], "no row 'nothing'.*it has none; instr", 1),
    "unknown scale": (["table2_components.py", "plan", "--scale", "huge"], "huge", 2),
    "unknown action": (["table2_components.py", "cook"], "cook", 2),
    "no table": (["setting.py", "plan"], "is no table: it has no ROWS", 1),
    "no file": (["table9.py", "plan"], "there is no table .*table2_components.py", 1),
    "no seed": (["table2_components.py", "plan", "--seeds", "0"], "--seeds is 0", 1),
    "no results": (["table2_components.py", "report", "--results", "/no/results"], "there are no results of table2", 1),
    "nothing to score": (["table2_components.py", "score", "--runs", "/no/runs"], "no run of table2.* is finished", 1),
}


@pytest.mark.parametrize(("argv", "message", "code"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(argv: list[str], message: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(EXPERIMENTS / argv[0]), *argv[1:]]) == code
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert re.search(message, said[0])


def test_a_claim_about_a_row_that_is_not_there_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "table2.py"
    file.write_text(COMPONENTS.read_text() + '\nCLAIMS += [("none", "nothing", "DPG-Bench")]\n')
    with pytest.raises(ValueError, match="speaks of 'DPG-Bench' of 'nothing'"):
        read_table(file, "mini")


def test_what_differs_between_scales_is_found_at_any_depth() -> None:
    value = {"a": {"mini": 1, "paper": [2, {"mini": 3, "paper": 4}]}, "b": [{"mini": 5}], "c": {}}
    assert at_scale(value, "mini") == {"a": 1, "b": [5], "c": {}}
    assert at_scale(value, "paper") == {"a": [2, 4], "b": [None], "c": {}}


class Pretend:
    """In place of processes: leaves what the commands would, and remembers them; some rows fail."""

    def __init__(self, fails: str = "nothing"):
        self.fails, self.commands = fails, []

    def __call__(self, words: list[str]) -> int:
        argvs = json.loads(words[-1]) if words[1] == "-c" else [words[3:]]
        self.commands += argvs
        code = 0
        for argv in argvs:
            if argv[0] == "fit" and self.fails in argv:
                code = 1
            elif argv[0] == "fit":
                folder = Path(argv[argv.index("--run") + 1])
                (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
                (folder / "checkpoints/step-00000500.ckpt").touch()
                (folder / "record.json").write_text(json.dumps(RECORD))
            elif argv[0] == "score":
                out = argv[argv.index("--out") + 1] if "--out" in argv else argv[1]
                Path(out).mkdir(exist_ok=True)
                found = {"name": "judge", "images_scored": 8, "scores": {"overall": 0.25, "loss": 0.3}}
                (Path(out) / "scores.json").write_text(json.dumps(found))
        return code

    def trained(self) -> int:
        return sum(argv[0] == "fit" for argv in self.commands)


RECORD = {"commit": "abc", "versions": {}, "machine": "a laptop", "steps": 2000, "seconds": 60.0}


def pretend(monkeypatch: pytest.MonkeyPatch, fails: str = "nothing") -> Pretend:
    pretended = Pretend(fails)
    monkeypatch.setattr(verb, "attended", pretended)
    return pretended


def test_run_does_what_is_missing_and_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["table", str(COMPONENTS), "run", "--runs", str(tmp_path)]
    first = pretend(monkeypatch)
    assert main([*arguments, "--rows", "[none]"]) == 0
    assert first.trained() == 1
    second = pretend(monkeypatch)
    assert main([*arguments, "--rows", '["none", "instruction"]', "--seeds", "2"]) == 0
    assert second.trained() == 3
    drawn = next(tmp_path.rglob("scenes-dense/scores.json"))
    drawn.unlink()
    third = pretend(monkeypatch)
    assert main([*arguments, "--rows", '["none", "instruction"]', "--seeds", "2"]) == 0
    assert [argv[0] for argv in third.commands if argv[0] != "prep"] == ["sample", "score"]
    fourth = pretend(monkeypatch)
    assert main([*arguments, "--rows", '["none", "instruction"]', "--seeds", "2"]) == 0
    assert fourth.commands == []


def test_options_go_to_the_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretended = pretend(monkeypatch)
    options = ["--rows", "[none]", "--options", "--trainer.devices 2"]
    assert main(["table", str(COMPONENTS), "run", "--runs", str(tmp_path), *options]) == 0
    assert [argv[0] for argv in pretended.commands if "--trainer.devices" in argv] == ["fit"]


def test_a_row_that_fails_is_named_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretended = pretend(monkeypatch, fails="collaborative")
    assert main(["table", str(COMPONENTS), "run", "--runs", str(tmp_path)]) == 1
    assert pretended.trained() == 5
    assert "1 of 5 runs failed: table2_components, instruction + token refiner + collab" in capsys.readouterr().err
    results = tmp_path / "results"
    assert main(["table", str(COMPONENTS), "score", "--runs", str(tmp_path), "--results", str(results)]) == 0
    runs = json.loads((results / "table2_components.json").read_text())["runs"]
    assert sorted(run["row"] for run in runs) == sorted(row.label for row in read_table(COMPONENTS, "mini").rows[:4])
    assert runs[0]["scores"] == {"T2I-CompBench": 25.0, "DPG-Bench": 25.0, "held-out fit": -30.0}
    assert {"config", "keys", "seed", "commit", "versions", "steps", "seconds", "machine", "digest"} <= set(runs[0])


def test_told_to_stop_it_stops_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, popen = [], subprocess.Popen
    monkeypatch.setattr(verb, "together", lambda pieces: [[sys.executable, "-c", STOPPED]])
    monkeypatch.setattr(verb.subprocess, "Popen", lambda words: begun.append(words) or popen(words))
    assert main(["table", str(COMPONENTS), "run", "--runs", str(tmp_path)]) == 75
    assert len(begun) == 1


STOPPED = "import sys; sys.exit(75)"
WAITING = (
    "import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(3)); "
    "open(sys.argv[1], 'w').close(); time.sleep(60)"
)


def test_a_wish_to_stop_is_passed_on(tmp_path: Path) -> None:
    def ask() -> None:
        while not (tmp_path / "waits").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    threading.Thread(target=ask).start()
    with pytest.raises(SystemExit) as stopped:
        verb.attended([sys.executable, "-c", WAITING, str(tmp_path / "waits")])
    assert stopped.value.code == 75
    assert signal.getsignal(signal.SIGUSR1) == before
    assert verb.attended([sys.executable, "-c", "import sys; sys.exit(3)"]) == 3


def test_a_row_may_be_drawn_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(EXPERIMENTS / "table1_main.py"), "plan", "--scale", "paper", "--stage", "sample"]) == 0
    lines = capsys.readouterr().out.splitlines()
    sizes = {line.split("step-")[1][:8]: re.findall(r"--size (\S+)", line)[-1] for line in lines}
    assert sorted(sizes.values()) == ["256x256", "512x512"]
    assert main(["table", str(EXPERIMENTS / "table1_main.py"), "plan", "--scale", "paper", "--stage", "fit"]) == 0
    assert "--sample" not in capsys.readouterr().out


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_every_row_learns_to_draw(file: Path) -> None:
    """What begins at zero is trained, or comes with weights of another run."""
    for row in read_table(file, "mini").rows:
        begins = row.keys.get("start_from", row.recipe.get("start_from"))
        if begins is None and row.keys.get("model.trained", row.recipe["model"].get("trained")) is not None:
            pytest.fail(f"{row.label} begins anew and trains a part alone")


def test_a_recipe_that_was_changed_is_another_run(tmp_path: Path) -> None:
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"max_steps": 5}}))
    before = Row("a", str(config), {}).digest
    config.write_text(yaml.safe_dump({"trainer": {"max_steps": 6}}))
    assert Row("a", str(config), {}).digest != before
    assert Row("a", str(config), {"trainer.max_steps": 7}).steps == 7


def numbers(**rows: list[float]) -> dict:
    return {row: {"score": values} for row, values in rows.items()}


def a_table(**paper: float) -> Table:
    return Table("t", "mini", "", {}, [], {}, {row: {"score": value} for row, value in paper.items()}, [], "bars")


def test_kendalls_tau_counts_the_pairs_in_the_papers_order() -> None:
    table = a_table(a=1, b=2, c=3)
    assert kendall(table, numbers(a=[1], b=[2], c=[3]), "score") == (1, 3, 3)
    assert kendall(table, numbers(a=[3], b=[2], c=[1]), "score") == (-1, 0, 3)
    assert kendall(table, numbers(a=[1, 3], b=[1], c=[3]), "score") == (pytest.approx(1 / 3), 2, 3)
    assert kendall(table, numbers(a=[1], b=[1]), "score") == (0, 0, 1)
    assert kendall(table, numbers(a=[1]), "score") is None
    assert kendall(table, numbers(a=[1], other=[2]), "score") is None


def test_a_difference_is_measured_against_the_spread_between_seeds() -> None:
    table = a_table(a=10, b=4)
    found = numbers(a=[52.0, 54.0], b=[50.0, 52.0], c=[1.0])
    assert spread(found, "score") == pytest.approx(2**0.5)
    order = compare(table, found, "a", "b", "score")
    assert (order.paper, order.ours, order.holds) == (6, 2, True)
    assert order.error == pytest.approx(2**0.5)
    assert order.verdict == "holds, within the spread (1.4 standard errors)"
    assert compare(table, found, "b", "a", "score").verdict.startswith("does not hold, within")
    clear = numbers(a=[62.0, 64.0], b=[50.0, 52.0])
    assert compare(table, clear, "a", "b", "score").verdict.startswith("holds, clearly (8.5 ")
    once = numbers(a=[3.0], b=[1.0])
    assert compare(table, once, "a", "b", "score").verdict == "holds (one seed: no spread)"
    assert compare(table, once, "a", "not run", "score") is None


@pytest.fixture
def reported(tmp_path: Path) -> Path:
    """A folder of tables with made-up results of two seeds of Table 2, and of some rows of the figures."""
    folder = tmp_path / "experiments"
    (folder / "results").mkdir(parents=True)
    for file in FILES:
        shutil.copy(file, folder)
    for stem, rows in {"table2_components": 5, "figure2_understanding": 6, "figure3_positional_bias": 2}.items():
        table = read_table(folder / f"{stem}.py", "mini")
        runs = [
            {
                "scale": "mini",
                "row": row.label,
                "seed": seed,
                "digest": "another" if row.label == "none" else row.digest,
            }
            | {"scores": dict.fromkeys(table.columns, 30 + 5 * i + seed)}
            | RECORD
            for i, row in enumerate(table.rows[:rows])
            for seed in range(2)
        ]
        (folder / "results" / f"{stem}.json").write_text(json.dumps({"table": stem, "runs": runs}))
    return folder


def test_a_report_says_what_was_measured_beside_the_paper(reported: Path) -> None:
    assert main(["table", str(reported / "table2_components.py"), "report"]) == 0
    text = (reported / "results/table2_components.md").read_text()
    assert "| none | 30.5 ± 0.7 | 38.72 | 30.5 ± 0.7 | 66.15 | 30.5 ± 0.7 |  | 2 |" in text
    assert "12 of 12 of these orders hold." in text
    assert "Kendall's tau 1.00" in text
    assert "abc" in text
    assert "Of a recipe that has been changed since: none." in text
    board = (reported / "README.md").read_text()
    assert "| mini | 12 of 12 |  |" in board
    assert re.search(r"table1_main.py\) \| .* \|  \| not run \|", board)
    assert "(results/table2_components-mini.png)" in board
    assert main(["table", str(reported / "figure3_positional_bias.py"), "report"]) == 0
    assert (reported / "results/figure3_positional_bias-mini.png").is_file()
    assert "2 were not measured" in (reported / "results/figure3_positional_bias.md").read_text()
    assert "| mini | 1 of 2 | 2 |" in (reported / "README.md").read_text()


def test_reporting_again_changes_no_byte(reported: Path) -> None:
    def written() -> dict[str, bytes]:
        for stem in ("table2_components", "figure2_understanding", "figure3_positional_bias"):
            assert main(["table", str(reported / f"{stem}.py"), "report"]) == 0
        return {path.name: path.read_bytes() for path in reported.rglob("*") if path.suffix in (".md", ".png")}

    first = written()
    assert len(first) == 7
    assert written() == first


def test_the_committed_reports_are_those_of_the_committed_results(tmp_path: Path) -> None:
    committed = [file for file in FILES if (EXPERIMENTS / "results" / f"{file.stem}.json").is_file()]
    if not committed:
        pytest.skip("no table has been run yet: experiments/results holds none of them")
    copy = shutil.copytree(EXPERIMENTS, tmp_path / "experiments")
    for file in committed:
        assert main(["table", str(copy / file.name), "report"]) == 0
        name = f"results/{file.stem}.md"
        assert (copy / name).read_text() == (EXPERIMENTS / name).read_text()
    assert (copy / "README.md").read_text() == (EXPERIMENTS / "README.md").read_text()


def in_this_process(words: list[str]) -> int:
    """A command of the table without the seconds that a new interpreter takes."""
    if words[1:3] == ["-m", "lidit"]:
        return main(words[3:])
    if words[1] == "-c":
        return next(filter(None, map(main, json.loads(words[-1]))), 0)
    modules = {module.__name__: module for module in MODULES}
    call(modules[words[2]].score, words[2], words[4:])
    return 0


@pytest.fixture
def tiny_world(
    tiny_recipe: Path,
    tiny_vae: Path,
    tiny_llama: Path,
    tiny_qwen: Path,
    tiny_t5: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The tables' setting with tiny models, three steps and a picture a task; the runs' folder."""
    recipe = yaml.safe_load(tiny_recipe.read_text())
    recipe["trainer"] |= {"max_steps": 3, "val_check_interval": 3}
    recipe["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path / "logs")
    recipe["data"].pop("val")
    for callback in recipe["trainer"]["callbacks"][1:]:
        callback |= {"class_path": "lidit.callbacks.checkpoints.Checkpoints", "init_args": {"every_n_steps": 3}}
    recipe["trainer"]["callbacks"].append({"class_path": "lidit.callbacks.provenance.Provenance"})
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe))
    cache = {"out": str(tmp_path / "cache"), "options": f"--shards {recipe['data']['train']}", "vae": str(tiny_vae)}
    changed = {"config": str(config), "prepare": [], "cache": cache, "sample": {"all": "--count_per_task 1 --steps 1"}}
    changed["commands"] = {
        "scene-questions": "python -m experiments.scene_questions score --count 2 --llms LLMS --out OUT",
        "text-gain": "python -m experiments.text_gain score --count 8 --checkpoint RUN/checkpoints/latest --out OUT",
    }
    monkeypatch.setitem(setting.SETTING, "mini", changed)
    folders = {"llama": tiny_llama, "llama_base": tiny_llama, "qwen": tiny_qwen, "qwen_base": tiny_qwen, "t5": tiny_t5}
    for name, folder in folders.items():
        monkeypatch.setitem(setting.LLMS, name, {**setting.LLMS[name], "mini": {"name": str(folder)}})
    return tmp_path / "runs"


def run_a_row(file: Path, folder: Path, runs: Path, place: int, changes: dict[str, str]) -> None:
    """Run, score and report a row of a copy of a table's file, with changes to its text, in three steps."""
    text = file.read_text()
    for there, put in changes.items():
        assert there in text
        text = text.replace(there, put)
    copy = folder / file.name
    copy.write_text(text)
    table = read_table(copy, "mini")
    row = table.rows[place]
    asked = ["--runs", str(runs), "--rows", json.dumps([row.label])]
    assert main(["table", str(copy), "run", *asked]) == 0
    assert main(["table", str(copy), "score", *asked]) == 0
    assert main(["table", str(copy), "report"]) == 0
    (run,) = json.loads((folder / "results" / f"{file.stem}.json").read_text())["runs"]
    assert run["steps"] == 3
    assert run["seconds"] > 0
    assert set(run["scores"]) == set(table.columns)
    assert row.label in (folder / "README.md").read_text()


@pytest.mark.slow
def test_a_row_of_each_table_runs_is_scored_and_reported(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "attended", in_this_process)
    folder = tmp_path / "experiments"
    folder.mkdir()
    places = {
        "table6_fusion": 3,
        "table3_causal_mask": 0,
        "table5_refiner": 3,
        "table1_main": 0,
        "figure2_understanding": 2,
    }
    shorter = {"table1_main": {'"trainer.max_steps": 7500': '"trainer.max_steps": 3'}}
    for file in FILES:
        if file != ADAPTER:
            run_a_row(file, folder, tiny_world, places.get(file.stem, 1), shorter.get(file.stem, {}))


@pytest.mark.slow
def test_a_row_of_the_adapters_table_adapts_the_bundled_unet(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "attended", in_this_process)
    recipe = yaml.safe_load((EXPERIMENTS / "configs/llmdiff_mini.yaml").read_text())
    shards = yaml.safe_load(tiny_recipe.read_text())["data"]["train"]
    recipe["data"] |= {"train": shards, "batch_size": 8}
    recipe["trainer"] |= {"max_steps": 3}
    config = tmp_path / "recipe.yaml"
    config.write_text(yaml.safe_dump(recipe))
    cache = {"out": str(tmp_path / "cache"), "options": f"--shards {shards}", "vae": "bundled:vae"}
    changed = {"prepare": [], "cache": cache, "sample": {"all": "--count_per_task 1 --steps 1"}}
    monkeypatch.setitem(setting.SETTING, "mini", {**setting.SETTING["mini"], **changed})
    folder = tmp_path / "experiments"
    folder.mkdir()
    run_a_row(ADAPTER, folder, tmp_path / "runs", 2, {"experiments/configs/llmdiff_mini.yaml": str(config)})


@pytest.mark.slow
def test_commands_run_in_processes_and_neighbours_share_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [f"lidit prep shard --out {tmp_path}/{name} --count 2 --workers 1" for name in ("a", "b")]
    monkeypatch.setitem(setting.SETTING, "mini", {**setting.SETTING["mini"], "prepare": made, "cache": None})
    processes = []
    attended = verb.attended
    monkeypatch.setattr(verb, "attended", lambda words: processes.append(words) or attended(words))
    asked = ["--runs", str(tmp_path / "runs"), "--rows", "[none]", "--stage", "prepare"]
    assert main(["table", str(COMPONENTS), "run", *asked]) == 0
    assert len(processes) == 1
    assert (tmp_path / "a/00000.tar").is_file()
    assert (tmp_path / "b/00000.tar").is_file()
    monkeypatch.setitem(setting.SETTING["mini"], "prepare", ["lidit prep shard --out no --count 0", *made])
    assert main(["table", str(COMPONENTS), "run", *asked]) == 1


def test_training_has_a_process_of_its_own() -> None:
    words = [["lidit", "prep"], ["lidit", "fit"], ["lidit", "sample"], ["python", "-m", "x"], ["lidit", "score"]]
    stages = ["prepare", "fit", "sample", "score", "score"]
    processes = verb.together([verb.Piece(stage, each) for stage, each in zip(stages, words, strict=True)])
    assert [process[1] for process in processes] == ["-c", "-m", "-c", "-m", "-c"]
    assert processes[1][2:] == ["lidit", "fit"]
    assert json.loads(processes[2][-1]) == [["sample"]]
    neighbours = [verb.Piece("sample", ["lidit", "sample"]), verb.Piece("score", ["lidit", "score"])]
    assert json.loads(verb.together(neighbours)[0][-1]) == [["sample"], ["score"]]


def test_drawing_leaves_matplotlibs_backend_to_whoever_chose_it() -> None:
    code = "import matplotlib, lidit.demo, lidit.tables.report; print(matplotlib.get_backend())"
    env = os.environ | {"MPLBACKEND": "svg"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "svg\n"
