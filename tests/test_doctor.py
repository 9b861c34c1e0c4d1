"""`lidit doctor` says what is here, what is broken and what is missing, and nothing about whose machine it is."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from lidit import assets, doctor
from lidit.cli import main

SETUP = Path(__file__).parents[1] / "setup.cfg"
HOME = "/home/zaphod"


def torch_with(gpus: int) -> SimpleNamespace:
    """What the doctor asks of torch, on a machine with so many GPUs."""
    gpu = SimpleNamespace(name="NVIDIA H100", total_memory=80e9, major=9, minor=0)
    cuda = SimpleNamespace(
        is_available=lambda: gpus > 0, device_count=lambda: gpus, get_device_properties=lambda index: gpu
    )
    return SimpleNamespace(__version__="2.14.1", version=SimpleNamespace(cuda="13.0"), cuda=cuda)


@pytest.fixture(autouse=True)
def well(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with all that is required, and without a GPU, whatever this one is."""
    monkeypatch.setitem(sys.modules, "torch", torch_with(0))
    monkeypatch.setattr(doctor, "requirements", lambda: ({"numpy": ">=2.2,<3", "pyarrow": ">=18,<26"}, ["numpy"]))
    versions(monkeypatch, numpy="2.4.6", pyarrow="25.0.1")


def versions(monkeypatch: pytest.MonkeyPatch, **found: str) -> None:
    """Let these packages be installed, torch and lidit besides, and no others."""
    known = {"torch": "2.14.1", "lidit": "0.1.0"} | found
    monkeypatch.setattr(doctor, "installed", lambda name: known.get(name, ""))


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what is bundled, in place of it."""
    shutil.copytree(assets.ROOT, tmp_path / "assets")
    monkeypatch.setattr(assets, "ROOT", tmp_path / "assets")
    return tmp_path / "assets"


def lines(capsys: pytest.CaptureFixture) -> list[str]:
    """What was printed, without the padding of tables."""
    return [re.sub(r" +", " ", line) for line in capsys.readouterr().out.splitlines()]


def test_where_all_is_well_it_says_so_in_tables_of_markdown(capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor"]) == 0
    said = lines(capsys)
    assert "| numpy | 2.4.6 | >=2.2,<3 | ok |" in said
    assert "| vae | 3 | ok |" in said
    assert "| collections in parquet | pyarrow 25.0.1 | ok |" in said
    assert said[-1] == "All that lidit requires is here."
    rules = [i for i, line in enumerate(said) if line.startswith("| -")]
    assert len(rules) == 4
    assert all(said[i - 1].count("|") == said[i].count("|") == said[i + 1].count("|") for i in rules)


def test_what_a_feature_lacks_is_named_with_the_fix_and_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: None)
    versions(monkeypatch, numpy="2.4.6")
    assert main(["doctor"]) == 0
    said = lines(capsys)
    assert "| collections in parquet | pyarrow | pyarrow is missing: `pip install 'lidit[parquet]'` |" in said
    assert "| lidit launch slurm | sbatch | sbatch is not on PATH: a login node of a cluster with Slurm |" in said
    assert any(line.startswith("| training on GPUs | a GPU | no GPU: ") for line in said)


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("", "numpy is missing: `pip install 'numpy>=2.2,<3'`"),
        ("1.26", "numpy is not >=2.2,<3: `pip install 'numpy>=2"),
    ],
)
def test_a_required_package_that_is_missing_or_old_is_an_error(
    version: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    versions(monkeypatch, numpy=version, pyarrow="25.0.1")
    assert main(["doctor"]) == 1
    assert said in capsys.readouterr().err


def test_damaged_and_missing_bundled_files_are_named(bundled: Path, capsys: pytest.CaptureFixture) -> None:
    weights = bundled / "vae/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (bundled / "llm_qwen/tokenizer.json").unlink()
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert "vae/diffusion_pytorch_model.safetensors differs" in out
    assert err == (
        "lidit: error: bundled llm_qwen llm_qwen/tokenizer.json is missing: install lidit again; "
        "bundled vae vae/diffusion_pytorch_model.safetensors differs: install lidit again\n"
    )


def test_without_the_list_of_checksums_nothing_is_taken_for_whole(bundled: Path, capsys: pytest.CaptureFixture) -> None:
    (bundled / assets.CHECKSUMS).unlink()
    assert main(["doctor"]) == 1
    assert "bundled checksums.json is missing" in capsys.readouterr().err


def test_the_list_of_checksums_is_of_what_is_bundled() -> None:
    listed = json.loads((assets.ROOT / assets.CHECKSUMS).read_text())
    assert listed == assets.checksums(), "run `python -m experiments.cards checksums` and commit what it writes"


def test_gpus_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch_with(2))
    assert main(["doctor"]) == 0
    said = lines(capsys)
    assert "| GPU 1 | NVIDIA H100, 80 GB, compute capability 9.0 |" in said
    assert "| training on GPUs | a GPU | ok |" in said


def test_what_torch_warns_of_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    torch = torch_with(0)
    torch.cuda.is_available = lambda: warnings.warn(f"The driver of {HOME}/x is too old", stacklevel=2)
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert main(["doctor"]) == 0
    assert "| torch says | The driver of x is too old |" in lines(capsys)


def test_nothing_tells_whose_machine_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def broken() -> bool:
        raise OSError(f"{HOME}/venv/lib/libcudart.so.13: cannot open shared object file; see {HOME}")

    torch = torch_with(0)
    torch.cuda.is_available = broken
    monkeypatch.setitem(sys.modules, "torch", torch)
    for name, value in {"HOME": HOME, "USER": "zaphod", "HF_TOKEN": "heart-of-gold"}.items():
        monkeypatch.setenv(name, value)
    assert main(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert err == ("lidit: error: torch cannot be used: libcudart.so.13: cannot open shared object file; see ~\n")
    for secret in ("zaphod", "heart-of-gold", str(Path.cwd()), str(assets.ROOT.parent)):
        assert secret not in out + err


def test_a_gpu_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    torch = torch_with(1)
    torch.cuda.get_device_properties = lambda index: (_ for _ in ()).throw(RuntimeError("CUDA-capable device is busy"))
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert main(["doctor"]) == 1
    assert "torch cannot be used: CUDA-capable device is busy" in capsys.readouterr().err


def test_a_package_whose_installation_broke_off_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("lidit.doctor.metadata.version", lambda name: None)
    assert doctor.installed("numpy") == ""
    assert doctor.state("numpy", {}) == "missing"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (f"{HOME}/venv/lib/x.so: no such file", "x.so: no such file"),
        (r"C:\Users\zaphod\x.dll is missing", "x.dll is missing"),
        ("see https://pytorch.org/get/started", "see https://pytorch.org/get/started"),
        ("CUDA/cuDNN and\nmore", "CUDA/cuDNN and more"),
    ],
)
def test_messages_are_told_without_their_folders(said: str, told: str) -> None:
    assert doctor.anonymous(said) == told


def test_it_runs_where_packages_are_broken() -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(['torch', 'jsonargparse', 'numpy'])\n"  # none can be imported
        "from lidit.cli import main; sys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "torch cannot be used: import of torch halted" in done.stderr
    assert re.search(r"\| jsonargparse +\| [\d.]+ +\| \S+ +\| ok \|", done.stdout)


def test_what_it_requires_is_read_from_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    said = ["numpy<3,>=2.2", "fsspec[http]<2028,>=2025.3", 'pyarrow<26,>=18; extra == "parquet"']
    monkeypatch.setattr("lidit.doctor.metadata.requires", lambda name: said)
    ranges = {"numpy": "<3,>=2.2", "fsspec": "<2028,>=2025.3", "pyarrow": "<26,>=18"}
    assert doctor.requirements() == (ranges, ["fsspec", "numpy"])


def test_every_extra_that_a_fix_names_has_the_packages() -> None:
    setup = configparser.ConfigParser()
    setup.read(SETUP)
    for feature in doctor.FEATURES:
        for extra in re.findall(r"lidit\[(\w+)]", feature.fix):
            assert all(package in setup["options.extras_require"][extra] for package in feature.packages)


def test_it_takes_no_argument(capsys: pytest.CaptureFixture) -> None:
    assert [main(["doctor", "--help"]), main(["doctor", "now"])] == [0, 2]
    out, err = capsys.readouterr()
    assert out.startswith("usage: lidit doctor\n")
    assert err == "lidit: error: `lidit doctor` takes no argument, got 'now'\n"
