"""A real Slurm, and runs of the tiny recipe on it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

spec = importlib.util.spec_from_file_location("slurm_cluster", Path(__file__).with_name("cluster.py"))
cluster_module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cluster_module)

ROOT = Path(__file__).parents[2]
PATIENCE = 120  # seconds until something is said not to happen


@pytest.fixture(scope="session")
def slurm() -> Iterator[cluster_module.Cluster]:
    """Two nodes of four CPUs."""
    if missing := cluster_module.missing():
        pytest.skip(f"no Slurm on this machine: {', '.join(missing)} not found")
    # munge wants a folder that everybody can reach, which the one that TMPDIR names may not be
    with tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = cluster_module.Cluster(Path(folder))
        cluster.start()
        yield cluster
        cluster.stop()


@pytest.fixture
def lidit(slurm: cluster_module.Cluster, tmp_path: Path) -> Callable[..., str]:
    """Runs a command line of lidit in an empty folder, and gives what it printed."""
    environment = os.environ | slurm.environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*argv: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "lidit", *argv]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture
def launch(lidit: Callable[..., str]) -> Callable[..., str]:
    """Submits, and gives the job's number."""

    def run(*argv: str) -> str:
        options = ("--gpus-per-node", "0", "--time", "10:00")
        line = next(line for line in lidit("launch", "slurm", *options, *argv).splitlines() if line.startswith("job "))
        return line.split()[1].rstrip(":")

    return run


@pytest.fixture
def until(slurm: cluster_module.Cluster) -> Callable[..., None]:
    """Waits for something, and tells what Slurm thinks if it does not happen."""

    def wait(condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"{what}\n{slurm.ask('squeue', '-a', '-t', 'all')}\n{slurm.logs()}"
            time.sleep(0.3)

    return wait


@pytest.fixture
def recipe(tiny_recipe: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny recipe without checkpoints and logs, with changes of its trainer and further callbacks."""

    def write(name: str, *callbacks: dict, **trainer: object) -> Path:
        content = yaml.safe_load(tiny_recipe.read_text())
        content["trainer"]["callbacks"] = [content["trainer"]["callbacks"][0], *callbacks]
        content["trainer"] |= {"logger": False, "val_check_interval": 1000, **trainer}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write
