"""Golden cases agree, and a case that does not agree is named and fails the command."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path
from typing import Any

import pytest

from lidit.eval import golden

FOLDER = Path(os.environ.get("LIDIT_SHARED", Path(__file__).parents[2] / "../shared")) / "data/golden"
FILES = sorted(FOLDER.glob("*.json*"))
NO_FILES = pytest.param(
    None, marks=pytest.mark.skip(reason="no golden cases; LIDIT_SHARED names no folder that has them")
)
KITE = [1.0, 2.0, 30.0, 40.0]


def case(name: str, scores: list[float], **expected: Any) -> dict[str, Any]:
    """Kites found with these scores, where two are asked for."""
    return {
        "id": name,
        "metadata": {"tag": "two_object", "prompt": "", "include": [{"class": "kite", "count": 2}]},
        "options": {
            "threshold": 0.3,
            "counting_threshold": 0.9,
            "max_objects": 16,
            "max_overlap": 1.0,
            "position_threshold": 0.1,
        },
        "detections": {"kite": [[*KITE, score] for score in scores]},
        "colors": {"kite": ["red"] * len(scores)},
        "expected": expected,
    }


GOOD = [
    case("both", [0.5, 0.9], correct=True, reason_lines=[], kept={"kite": [1, 0]}),
    case("one", [0.5, 0.3], correct=False, reason_lines=["expected kite>=2, found 1"], kept={"kite": [0]}),
]


def write(folder: Path, cases: list[dict[str, Any]], name: str = "geneval_cases.jsonl") -> None:
    (folder / name).write_text("".join(json.dumps(case) + "\n" for case in cases))


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in FILES] or [NO_FILES])
def test_no_difference(path: Path) -> None:
    check = golden.checks().get(path.name)
    if check is None:
        pytest.skip(f"no check knows {path.name}")
    done = golden.compare(path, check)
    assert done
    assert [(name, difference) for name, difference in done if difference] == []


@pytest.mark.skipif(not FILES, reason="no golden cases; LIDIT_SHARED names no folder that has them")
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("geneval_cases.jsonl", "correct"),
        ("geneval_summary_cases.jsonl", "overall"),
        ("geneval_maskpost_cases.jsonl", 0),
    ],
)
def test_an_altered_expectation_is_found(tmp_path: Path, name: str, key: str | int) -> None:
    """In every file of GenEval: the checks read what they are given."""
    cases = golden.decode(FOLDER / name)
    altered = cases[0]["expected"]
    if isinstance(altered, list):
        altered[0]["score"] += 2e-5
    else:
        altered[key] = (not altered[key]) if isinstance(altered[key], bool) else altered[key] + 0.00001
    write(tmp_path, cases, name)
    wrong = [case for case, difference in golden.compare(tmp_path / name, golden.checks()[name]) if difference]
    assert wrong == [cases[0]["id"]]


def test_agreement_passes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, GOOD)
    assert golden.run(tmp_path) == 0
    assert capsys.readouterr().out.splitlines() == ["geneval_cases.jsonl: 2 cases, 0 differences", "2 passed, 0 failed"]


def test_a_difference_is_named_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    altered = GOOD[1] | {"expected": GOOD[1]["expected"] | {"correct": True}}
    write(tmp_path, [GOOD[0], altered])
    assert golden.run(tmp_path) == 1
    assert capsys.readouterr().out.splitlines() == [
        "geneval_cases.jsonl: 2 cases, 1 differences",
        "  one: correct: False, expected True",
        "1 passed, 1 failed",
    ]


def test_nothing_run_fails(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert golden.run(tmp_path) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "0 passed, 0 failed"
    write(tmp_path, [])
    assert golden.run(tmp_path) == 1
    assert golden.run(tmp_path / "nowhere") == 1


def test_unknown_files_are_named_and_do_not_fail(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, GOOD)
    write(tmp_path, [], "other_cases.jsonl")
    assert golden.run(tmp_path) == 0
    assert "other_cases.jsonl: not run, no check knows this file" in capsys.readouterr().out


@pytest.mark.parametrize("text", ['{"id": "x"}\n', "[1, 2\n", "3\n"])
def test_a_file_in_another_form_fails(tmp_path: Path, capsys: pytest.CaptureFixture, text: str) -> None:
    """Cases before it count, and the other files are still run."""
    write(tmp_path, GOOD)
    path = tmp_path / "geneval_cases.jsonl"
    path.write_text(path.read_text() + text)
    write(tmp_path, [], "geneval_summary_cases.jsonl")
    assert golden.run(tmp_path) == 1
    out = capsys.readouterr().out
    assert "stopped by" in out
    assert "geneval_summary_cases.jsonl: 0 cases" in out
    assert out.endswith(" 1 failed\n")


@pytest.mark.parametrize(("expected", "status"), [(True, 0), (False, 1)])
def test_the_command_ends_with_the_status(tmp_path: Path, monkeypatch, expected: bool, status: int) -> None:
    write(tmp_path, [GOOD[0] | {"expected": GOOD[0]["expected"] | {"correct": expected}}])
    monkeypatch.setattr("sys.argv", ["golden", str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, "lidit.eval.golden")  # runpy warns of a module that is imported
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("lidit.eval.golden", run_name="__main__")
    assert ended.value.code == status


def test_an_object_may_hold_many_cases(tmp_path: Path) -> None:
    """The contract for .json: the whole object, and as many cases as the check makes of it."""
    path = tmp_path / "some.json"
    path.write_text(json.dumps({"cases": [1, 2, 3], "limit": 2}))

    def check(content):
        for value in content["cases"]:
            yield f"case {value}", None if value <= content["limit"] else f"{value} is too large"

    assert golden.compare(path, check) == [("case 1", None), ("case 2", None), ("case 3", "3 is too large")]
