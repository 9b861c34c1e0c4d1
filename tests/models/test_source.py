"""A part's files are found by folder, by hub id and by bundled name, and told apart by what is in them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from lidit.models.llm import FrozenLLM
from lidit.models.source import CHUNK, SHIPPED, describe, find_file, fingerprint, sizes_alone
from lidit.models.vae import FrozenVAE

COMMIT = "0123456789abcdef0123456789abcdef01234567"
IMAGE = torch.zeros(1, 3, 64, 64)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tiny_vae: Path) -> Path:
    """A cache of the Hugging Face hub with an LLM and a pipeline in it, as a download leaves it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name, folder, inside in (("llm", tiny_llama, ""), ("pipeline", tiny_vae, "vae")):
        repository = tmp_path / f"models--someone--{name}"
        shutil.copytree(folder, repository / "snapshots" / COMMIT / inside)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path


def test_a_downloaded_llm_serves_by_its_id_without_a_network(hub: Path, tiny_llama: Path) -> None:
    by_id = FrozenLLM("someone/llm", dtype="float32")
    by_folder = FrozenLLM(str(tiny_llama), dtype="float32")
    assert torch.equal(by_id(["a red circle"])[0], by_folder(["a red circle"])[0])
    assert by_id.identity | by_folder.identity == by_folder.identity
    assert (by_id.identity["name"], by_id.identity["revision"]) == ("someone/llm", COMMIT)


def test_a_downloaded_vae_serves_by_id_and_subfolder(hub: Path, tiny_vae: Path) -> None:
    vae = FrozenVAE("someone/pipeline", subfolder="vae")
    assert torch.equal(vae.encode(IMAGE), FrozenVAE(str(tiny_vae)).encode(IMAGE))
    assert vae.identity["revision"] == COMMIT


def test_a_revision_that_is_not_there_is_named(hub: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"someone/llm: .* did not give config\.json at revision v2 "):
        FrozenLLM("someone/llm", revision="v2").load()


def test_a_bundled_part_is_described_by_its_bundled_name() -> None:
    config = find_file("bundled:vae", "config.json")
    assert describe("bundled:vae", config) == {"name": "bundled:vae", "revision": fingerprint(config.parent)}


@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_a_change_in_a_large_file_changes_the_fingerprint(tmp_path: Path, place: str) -> None:
    size = 16 * CHUNK
    file = tmp_path / "model-00001-of-00001.safetensors"
    with file.open("wb") as out:
        out.truncate(size)  # takes no room on disk
    before = fingerprint(tmp_path)
    with file.open("r+b") as out:
        out.seek({"start": 0, "middle": size // 2, "end": size - 1}[place])
        out.write(b"x")
    assert fingerprint(tmp_path) != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "pytorch_model.bin"])
def test_every_file_the_features_depend_on_is_in_the_fingerprint(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = fingerprint(tmp_path)
    (tmp_path / "card.json").write_text("how it was made")
    assert fingerprint(tmp_path) == before
    (tmp_path / name).write_bytes(b"another")
    assert fingerprint(tmp_path) != before


def test_sizes_of_shipped_recipes_models_need_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lidit.models.source.hf_hub_download", _no_hub)
    name = "llava-hf/llama3-llava-next-8b-hf"
    with sizes_alone() as taken:
        llm = FrozenLLM(name)
        assert (llm.width, llm.depth) == (4096, 30)
        assert taken == [name]
        assert FrozenVAE("stabilityai/stable-diffusion-3-medium-diffusers", subfolder="vae").channels == 16
    with pytest.raises(FileNotFoundError, match="did not give config.json"):  # weights are another matter
        find_file(name, "config.json")


def test_every_hub_model_of_a_recipe_has_a_shipped_config() -> None:
    recipes = sorted(Path("experiments/configs").glob("*.yaml"))
    named = {n for recipe in recipes for n in re.findall(r"\{name: ([\w.-]+/[\w.-]+)", recipe.read_text())}
    named = {name for name in named if not Path(name).exists()}
    assert len(named) == 5
    assert all(list((SHIPPED / name.replace("/", "--")).rglob("config.json")) for name in named)


def _no_hub(*args: object, **kwargs: object) -> str:
    raise OSError("no network")
