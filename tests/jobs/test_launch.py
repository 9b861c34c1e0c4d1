"""Scripts, lines for torchrun, and what is wrong with a command line; nothing is submitted."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lidit.cli import main
from lidit.jobs.script import expand, quote


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one with a recipe, on a machine without Slurm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "no-commands"))
    (tmp_path / "mini.yaml").write_text("{}")
    return tmp_path


@pytest.fixture
def script(folder: Path, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """The script that a command line makes."""

    def make(*argv: str) -> str:
        assert main(["launch", "slurm", "--dry-run", *argv]) == 0
        assert {path.name for path in folder.iterdir()} <= {"mini.yaml", "rows.txt"}  # nothing is written
        return capsys.readouterr().out

    return make


FIT = ("--", "fit", "--config", "mini.yaml")
ASKED = ("--nodes", "2", "--gpus-per-node", "4", "--time", "8:00:00", "--partition", "gpu", "--account", "me")


def directives(script: str) -> set[str]:
    return set(re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE))


def executed(script: str, folder: Path, **variables: str) -> list[str]:
    """Run a script with commands of Slurm that only print, and give the arguments of srun."""
    commands = folder / "commands"
    commands.mkdir(exist_ok=True)
    printing = '#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n'
    for name, text in {"srun": printing, "scontrol": "#!/bin/sh\necho first-node\necho second-node\n"}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    environment = {"PATH": f"{commands}:/usr/bin:/bin", "SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "x"} | variables
    done = subprocess.run(["bash"], input=script, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_script_asks_for_what_was_asked_for(script: Callable[..., str]) -> None:
    text = script(*ASKED, "--sbatch=--qos=high", *FIT)
    assert directives(text) == {
        "--job-name=mini",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--time=8:00:00",
        "--partition=gpu",
        "--account=me",
        "--output=runs/mini/logs/%j.log",
        "--qos=high",
        "--signal=USR1@120",
        "--open-mode=append",
        "--requeue",
    }
    assert "{{" not in text


def test_the_script_runs_the_command_with_its_ranks_and_a_folder_to_go_on_in(
    script: Callable[..., str], folder: Path
) -> None:
    words = executed(script(*ASKED, "--python", "py", *FIT, "--model.width", "a b"), folder)
    at = words.index("py")
    assert words[:at] == ["--kill-on-bad-exit=1", "--open-mode=append", "--output=runs/mini/logs/123-rank%t.log"]
    command = "-m lidit fit --config mini.yaml --model.width|a b|--trainer.num_nodes 2 --trainer.devices 4"
    command += " --trainer.accelerator gpu --run runs/mini --resume auto"
    assert words[at + 1 :] == [
        w for i, part in enumerate(command.split("|")) for w in ([part] if i == 1 else part.split())
    ]


def test_what_the_user_says_is_not_said_again(script: Callable[..., str], folder: Path) -> None:
    own = ("--run", "runs/mine", "--resume=auto", "--trainer.devices", "1", "--trainer.accelerator=auto")
    words = executed(script("--gpus-per-node", "0", *FIT, *own), folder)
    assert words[words.index("fit") :] == ["fit", "--config", "mini.yaml", *own, "--trainer.num_nodes", "1"]
    assert "--output=runs/mine/logs/123-rank%t.log" in words


def test_what_was_added_is_said(folder: Path, capsys: pytest.CaptureFixture) -> None:
    main(["launch", "slurm", "--dry-run", *FIT])
    assert "added --run runs/mini --resume auto" in capsys.readouterr().err


def test_environment_and_setup_come_before_the_tasks(script: Callable[..., str], folder: Path) -> None:
    asked = ("--module", "cuda/12", "--module", "gcc", "--setup", "umask 007", "--env", "A=b 'c'=d", "--env=B=$HOME")
    text = script(*asked, *FIT)
    setup = text[text.index("# 1.") : text.index("# 2.")].splitlines()[1:5]
    assert setup == ["module load cuda/12", "module load gcc", "umask 007", """export A='b '"'"'c'"'"'=d'"""]
    assert "export B='$HOME'" in text


def test_a_container_is_around_the_command(script: Callable[..., str]) -> None:
    apptainer = script("--container", "lidit.sif", *FIT)
    assert 'apptainer exec --nv --bind "$PWD" lidit.sif python -m lidit "${COMMAND[@]}"' in apptainer
    pyxis = script("--container", "registry/lidit:1", *FIT)
    assert "--container-image=registry/lidit:1 --container-mounts=" in pyxis


def test_rows_are_tasks_of_an_array_with_folders_of_their_own(script: Callable[..., str], folder: Path) -> None:
    (folder / "rows.txt").write_text("# a table\nlidit fit --config mini.yaml --seed_everything 1\n\nscore 'a run'\n")
    text = script("--rows", "rows.txt", "--array-limit", "1", "--gpus-per-node", "0")
    assert {"--array=0-1%1", "--job-name=rows", "--output=runs/rows/logs/%A_%a.log"} <= directives(text)
    task = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
    first = executed(text, folder, **task)
    assert first[-4:] == ["--run", "runs/rows/0", "--resume", "auto"]
    assert "--output=runs/rows/0/logs/7_0-rank%t.log" in first
    second = executed(text, folder, **task | {"SLURM_ARRAY_TASK_ID": "1"})
    assert second[-2:] == ["score", "a run"]


def test_an_array_puts_its_numbers_into_the_command(script: Callable[..., str], folder: Path) -> None:
    text = script("--array", "3-5", *FIT, "--seed_everything", "{task}")
    words = executed(text, folder, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="4")
    assert words[words.index("--seed_everything") + 1] == "4"
    assert words[words.index("--run") + 1] == "runs/mini/4"


@pytest.mark.parametrize(("state", "requeued"), [("unqueued", True), ("stopped", False), ("failed", False)])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_run_that_could_not_requeue_its_job_has_it_done_by_the_script(
    state: str, requeued: bool, fresh: bool, script: Callable[..., str], folder: Path
) -> None:
    text = script(*FIT)
    said = folder / "runs/mini/state/rank-0.json"
    said.parent.mkdir(parents=True)
    said.write_text(f'{{"rank": 0, "state": "{state}"}}')
    os.utime(said, (1, 1))  # what an earlier start has said
    commands = folder / "commands"
    commands.mkdir()
    update = f"touch -d 'now + 1 hour' {said}" if fresh else ":"
    asked = folder / "asked"
    for name, body in {"srun": f"{update}; exit 75", "scontrol": f'echo "$@" >>{asked}'}.items():
        (commands / name).write_text(f"#!/bin/sh\n{body}\n")
        (commands / name).chmod(0o755)
    environment = {"PATH": f"{commands}:/usr/bin:/bin", "SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "x"}
    done = subprocess.run(["bash"], input=text, env=environment, text=True, capture_output=True)
    assert done.returncode == 75
    assert ("requeue 123" in asked.read_text().splitlines()) == (requeued and fresh)


def test_only_training_is_told_before_its_time_is_over(script: Callable[..., str]) -> None:
    assert not any("--signal" in line for line in directives(script("--", "score", "run")))


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [("0-3", [0, 1, 2, 3]), ("1,5", [1, 5]), ("0-10:5%2", [0, 5, 10]), ("7", [7]), ("0-1,4-5", [0, 1, 4, 5])],
)
def test_numbers_are_those_that_slurm_makes(numbers: str, expected: list[int]) -> None:
    assert expand(numbers) == expected


@pytest.mark.parametrize("word", ["a", "", "a b", "it's", "$(rm x)", "{task}", "seed-{task}.yaml", "a '{task}' b"])
def test_words_come_through_the_shell(word: str) -> None:
    command = f'printf "%s" {quote(word)}'
    done = subprocess.run([shutil.which("bash"), "-c", command], env={"SLURM_ARRAY_TASK_ID": "9"}, capture_output=True)
    assert done.stdout.decode() == word.replace("{task}", "9")


def test_several_nodes_get_a_line_each(folder: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["launch", "local", "--nodes", "2", "--gpus-per-node", "8", "--host", "n1", "--env", "A=b c", *FIT]
    assert main(argv) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert line == (
        "A='b c' torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id mini --rdzv-endpoint n1:29500 -m "
        "-- lidit fit --config mini.yaml --trainer.num_nodes 2 --trainer.devices 8 --trainer.accelerator gpu --run "
        "runs/mini --resume auto"
    )


def complaint(argv: list[str], capsys: pytest.CaptureFixture) -> tuple[int, str]:
    code = main(argv)
    *_, line = capsys.readouterr().err.splitlines()
    return code, line


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["slurm", *FIT], 1, "sbatch not found: Slurm's commands are not on PATH here"),
        (["slurm", "--", "fut"], 2, "there is no verb 'fut'; did you mean `lidit fit`?"),
        (["slurm", "--nodes", "2"], 2, "nothing to launch: put a command after --"),
        (["slurm", "--env", "2=x", *FIT], 2, "--env '2=x' is not NAME=VALUE"),
        (["slurm", "--env", "A", *FIT], 2, "--env 'A' is not NAME=VALUE"),
        (["slurm", "--rows", "none.txt"], 1, "--rows: there is no file none.txt"),
        (["slurm", "--rows", "empty.txt"], 1, "--rows: empty.txt has no command"),
        (["slurm", "--rows", "quote.txt"], 1, "--rows: quote.txt has a line that a shell could not read"),
        (["slurm", "--rows", "same.txt"], 1, "several tasks have --run runs/a"),
        (["slurm", "--rows", "same.txt", *FIT], 2, "--rows takes its commands from a file"),
        (["slurm", "--array", "a", *FIT], 2, "--array is 'a'; it takes numbers such as 0-9"),
        (["slurm", "--array", "0-1", *FIT, "--run", "runs/a"], 1, "several tasks have --run runs/a"),
        (["slurm", "--array-limit", "2", *FIT], 2, "--array-limit needs --rows or --array"),
        (["slurm", "--nodes", "0", *FIT], 1, "the number of nodes is 0; it must be at least 1"),
        (["slurm", "--gpus-per-node", "2", "--tasks-per-node", "3", *FIT], 1, "each GPU has one task"),
        (["slurm", "--", "fit", "--config", "none.yaml"], 1, "there is no recipe none.yaml"),
        (["slurm", *FIT, "--ckpt_path", "x"], 1, "--ckpt_path would begin from the same checkpoint"),
        (["slurm", "--nods", "2", *FIT], 2, "there is no option --nods; did you mean --nodes?"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_fix(
    argv: list[str], code: int, said: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    same = "fit --config mini.yaml --run runs/a\n"
    for name, text in {"empty": "# nothing\n", "quote": "score 'a\n", "same": same * 2}.items():
        (folder / f"{name}.txt").write_text(text)
    found, line = complaint(["launch", *argv], capsys)
    assert (found, line[: len("lidit: error: ")]) == (code, "lidit: error: ")
    assert said in line
    assert not (folder / "runs").exists()


def test_a_port_in_use_is_named_before_anything_starts(folder: Path, capsys: pytest.CaptureFixture) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        code, line = complaint(["launch", "local", "--port", str(port), *FIT], capsys)
    assert code == 1
    assert f"port {port} is taken on this machine" in line
    assert "--port" in line


def test_a_job_is_noted_in_its_folder_and_two_jobs_do_not_share_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    commands = folder / "commands"
    commands.mkdir()
    for name, text in {"sbatch": "echo '41;cluster'", "squeue": "echo '41 RUNNING'"}.items():
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}/usr/bin:/bin")
    assert main(["launch", "slurm", *FIT]) == 0
    assert "job 41: script runs/mini/job.sh" in capsys.readouterr().out
    assert (folder / "runs/mini/jobs").read_text() == "41\n"
    code, line = complaint(["launch", "slurm", *FIT], capsys)
    assert code == 1
    assert "runs/mini has job 41, which is running: `scancel 41` ends it" in line
