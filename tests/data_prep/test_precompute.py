"""What is cached is what would have been computed, and what other models made is refused."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from jsonargparse import auto_cli

from data_prep.precompute import precompute
from lidit.cli import main
from lidit.data.cache import Cache, Features
from lidit.data.datamodule import Batch, ShardData
from lidit.data.index import ShardIndex
from lidit.models.contracts import longest_caption
from lidit.models.llm import FrozenLLM
from lidit.models.vae import FrozenVAE
from lidit.pixels import to_tensor


def exact(name: str, **settings: object) -> FrozenLLM:
    """In float32, so that what is cached can be compared closely."""
    return FrozenLLM(name, **{"dtype": "float32", "max_tokens": 600} | settings)


@pytest.fixture(scope="module")
def cache(shards: Path, vae: str, llm: str, other_llm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents and the features of two LLMs, the second one padded on the left."""
    out = tmp_path_factory.mktemp("caches") / "all"
    llms = [exact(llm), exact(other_llm, padding_side="left", layer=-2)]
    precompute(str(shards), str(out), vae, llms, dtype="float32", batch_size=4)
    return out


@pytest.fixture(scope="module")
def latents(shards: Path, vae: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("caches") / "latents"
    precompute(str(shards), str(out), vae)
    return out


def batches(count: int = 12, **settings: object) -> list[Batch]:
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    data = ShardData(**{"batch_size": 4, "caption_dropout": 0.3} | plain)
    data.setup("fit")
    return list(itertools.islice(data.train_dataloader(), count))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same(cached: Features, online: Features) -> bool:
    """Equal where valid; the padding, which carries nothing, may be at the other side."""
    (tokens, mask, start), (tokens_now, mask_now, start_now) = cached, online
    lengths_match = torch.equal(mask.sum(1), mask_now.sum(1))
    starts_match = torch.equal(start, start_now - mask_now.long().argmax(1))
    return lengths_match and starts_match and torch.allclose(tokens[mask], tokens_now[mask_now], atol=1e-4)


def test_cached_features_are_those_computed_online(shards: Path, cache: Path, llm: str, other_llm: str) -> None:
    models = [exact(llm).load(), exact(other_llm, padding_side="left", layer=-2).load()]
    seen = batches(train=shards, cache=cache)
    assert any(prompt == "" for batch in seen for prompt in batch.prompt)
    for batch in seen:
        assert all(same(cached, model(batch.prompt)) for cached, model in zip(batch.features, models, strict=True))
        assert batch.longest == [longest_caption(model(batch.prompt)) for model in models]


def test_cached_latents_are_those_computed_online(shards: Path, cache: Path, vae: str) -> None:
    model, index = FrozenVAE(vae).load(), ShardIndex(str(shards))
    seen = batches(train=shards, cache=cache)
    assert {tuple(batch.latent.shape) for batch in seen} == {(4, 4, 16, 16), (4, 4, 16, 24)}
    for batch in seen:
        images = to_tensor([index.image(int(key)) for key in batch.key])  # keys are numbers here
        assert batch.image is None
        assert torch.allclose(batch.latent, model.encode(images), atol=1e-5)


def test_latents_in_bfloat16_are_rounded_and_handed_over_as_float32(shards: Path, cache: Path, latents: Path) -> None:
    for exactly, rounded in zip(batches(train=shards, cache=cache), batches(train=shards, cache=latents), strict=True):
        assert rounded.latent.dtype == torch.float32
        assert torch.equal(rounded.latent, exactly.latent.bfloat16().float())
        assert rounded.features is None


def test_features_alone_are_cached_and_images_are_read(shards: Path, llm: str, tmp_path: Path) -> None:
    precompute(str(shards), str(tmp_path / "c"), None, [llm])
    (batch,) = batches(1, train=shards, cache=tmp_path / "c")
    assert batch.latent is None
    assert batch.image.shape[:2] == (4, 3)
    assert batch.features[0][0].dtype == torch.bfloat16


def test_a_cache_does_not_change_which_samples_are_shown(shards: Path, cache: Path) -> None:
    plain, cached = batches(train=shards), batches(train=shards, cache=cache)
    assert [(b.key, b.prompt) for b in plain] == [(b.key, b.prompt) for b in cached]


def test_workers_read_the_same_from_a_cache(shards: Path, cache: Path) -> None:
    both = zip(batches(train=shards, cache=cache), batches(train=shards, cache=cache, num_workers=2), strict=True)
    for alone, helped in both:
        assert torch.equal(alone.latent, helped.latent)
        assert torch.equal(alone.features[1][0], helped.features[1][0])


def test_images_are_not_decoded_where_latents_are_cached(shards: Path, latents: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "shards")
    index = ShardIndex(str(shards))
    for path, first, last in zip(index.paths, index.starts, index.starts[1:], strict=False):
        data = bytearray(path.read_bytes())
        for sample in range(first, last):
            offset, size = (int(index.column(f"image_{what}")[sample]) for what in ("offset", "size"))
            data[offset : offset + size] = bytes(size)
        (copy / path.name).write_bytes(data)
    with pytest.raises(ValueError, match="cannot be decoded"):
        batches(1, train=copy)
    assert len(batches(train=copy, cache=latents)) == 12


def test_running_again_computes_nothing(shards: Path, latents: Path, vae: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in latents.iterdir()}
    precompute(str(shards), str(latents), vae)
    assert {path: path.stat().st_mtime_ns for path in latents.iterdir()} == before


def test_an_interrupted_run_leaves_whole_shards_and_continues(
    shards: Path, latents: Path, vae: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, samples = ShardIndex.image, iter(range(15))

    def failing(index: ShardIndex, sample: int) -> np.ndarray:
        if next(samples, None) is None:
            raise OSError("the disk was taken away")
        return read(index, sample)

    with monkeypatch.context() as patch:
        patch.setattr(ShardIndex, "image", failing)
        with pytest.raises(OSError, match="taken away"):
            precompute(str(shards), str(tmp_path / "c"), vae)
    assert sorted(contents(tmp_path / "c")) == ["00000.safetensors", "empty.safetensors", "identity.json"]
    with pytest.raises(FileNotFoundError, match=r"00001.safetensors is missing; run: lidit prep precompute"):
        batches(1, train=shards, cache=tmp_path / "c")
    precompute(str(shards), str(tmp_path / "c"), vae)
    assert contents(tmp_path / "c") == contents(latents)


def test_continuing_with_other_models_is_refused_with_the_difference(shards: Path, llm: str, tmp_path: Path) -> None:
    precompute(str(shards), str(tmp_path / "c"), None, [FrozenLLM(llm)])
    before = contents(tmp_path / "c")
    with pytest.raises(ValueError, match=r"llms.0.layer was -3 and is -2 now.*delete it"):
        precompute(str(shards), str(tmp_path / "c"), None, [FrozenLLM(llm, layer=-2)])
    with pytest.raises(ValueError, match="dtype was 'bfloat16' and is 'float16' now"):
        precompute(str(shards), str(tmp_path / "c"), None, [FrozenLLM(llm)], dtype="float16")
    assert contents(tmp_path / "c") == before


def identities(*models: FrozenLLM) -> list[dict]:
    return [model.identity for model in models]


def test_training_with_another_vae_is_refused_with_the_reason(shards: Path, latents: Path, vae: str) -> None:
    data = ShardData(str(shards), batch_size=4, cache=str(latents))
    data.setup("fit")
    data.expect(FrozenVAE(vae).identity, [])
    command = f"Delete it, then run: lidit prep precompute --shards {shards} --out {latents}"
    with pytest.raises(ValueError, match=f"vae.dtype was 'float32' and is 'bfloat16' now. {command}"):
        data.expect(FrozenVAE(vae, dtype="bfloat16").identity, [])


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"layer": -2}, "layer was -3 and is -2 now"),
        ({"instruction": ""}, "instruction was"),
        ({"max_tokens": 77}, "max_tokens was 600 and is 77 now"),
        ({"dtype": "bfloat16"}, "dtype was 'float32' and is 'bfloat16' now"),
        ({"system": "Be brief."}, "system was None and is 'Be brief.' now"),
    ],
)
def test_training_with_another_llm_setting_is_refused_with_the_reason(
    shards: Path, cache: Path, llm: str, setting: dict, reason: str
) -> None:
    held = Cache(str(cache), ShardIndex(str(shards)))
    held.expect(None, identities(exact(llm)))
    with pytest.raises(ValueError, match=f"llms.0.*{reason}.*lidit prep precompute"):
        held.expect(None, identities(exact(llm, **setting)))


def test_a_cache_with_more_llms_serves_those_in_use_in_their_order(
    shards: Path, cache: Path, llm: str, other_llm: str
) -> None:
    data = ShardData(str(shards), batch_size=4, cache=str(cache))
    data.setup("fit")
    for models in (
        [exact(other_llm, padding_side="left", layer=-2), exact(llm)],
        [exact(other_llm, layer=-2, padding_side="left")],
    ):
        data.expect(None, identities(*models))
        batch = next(iter(data.train_dataloader()))
        assert all(same(c, m(batch.prompt)) for c, m in zip(batch.features, models, strict=True))


def test_a_cache_of_other_shards_is_refused(shards: Path, latents: Path) -> None:
    with pytest.raises(ValueError, match=r"stale \(shards\)"):
        batches(1, train=f"{shards}/{{00000..00001}}.tar", cache=latents)


def test_a_folder_that_is_no_cache_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a cache.*lidit prep precompute"):
        batches(1, train=shards, cache=tmp_path)


def test_a_cached_shard_that_breaks_off_is_named(shards: Path, latents: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(latents, tmp_path / "c")
    for path in copy.glob("0*.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"0000\d.safetensors cannot be read .*; delete it, then run"):
        batches(1, train=shards, cache=copy)


def test_captions_that_were_left_out_are_missed_by_name(shards: Path, llm: str, tmp_path: Path) -> None:
    precompute(str(shards), str(tmp_path / "c"), None, [llm], captions=("caption",))
    with pytest.raises(ValueError, match="holds no features of dense captions"):
        batches(12, train=shards, cache=tmp_path / "c")


def test_the_size_is_said_before_starting_and_is_about_right(
    shards: Path, vae: str, llm: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    precompute(str(shards), str(tmp_path / "c"), vae, [llm])
    lines = capsys.readouterr().out.splitlines()
    told = float(lines[1].split()[1]) * 1e6
    assert lines[1].endswith("MB for all 24 samples")
    assert told == pytest.approx(sum(map(len, contents(tmp_path / "c").values())), rel=0.1)
    assert sum("s left" in line for line in lines[2:]) == 3


def test_the_size_is_said_before_any_weights_are_read(
    shards: Path, vae: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(self: FrozenVAE, device: str) -> FrozenVAE:
        raise OSError("no weights here")

    monkeypatch.setattr(FrozenVAE, "load", missing)
    with pytest.raises(OSError, match="no weights"):
        precompute(str(shards), str(tmp_path / "c"), vae)
    values = (16 * 16 * 16 + 8 * 16 * 24) * 4  # 16 images of 32x32 and 8 of 48x32, 2x down, 4 channels
    assert f": {values * 2 / 1e6:.1f} MB for all 24 samples" in capsys.readouterr().out


def test_captions_that_were_cut_are_counted(
    shards: Path, llm: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.warns(UserWarning, match="longer than max_tokens=9"):
        precompute(str(shards), str(tmp_path / "c"), None, [FrozenLLM(llm, max_tokens=9)])
    index = ShardIndex(str(shards))
    long = sum(
        int((index.column(f"{kind}_chars") > 9).sum()) for kind in ("caption", "dense")
    )  # a token is a byte here
    assert 24 < long < 48
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"cut {long} captions at max_tokens=9")


LAUNCHERS = {
    "torchrun": {"RANK": "{rank}", "WORLD_SIZE": "2"},
    "srun": {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "{rank}", "SLURM_NTASKS": "2"},
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_processes_of_a_launcher_each_compute_their_share_and_wait_for_none(
    shards: Path, latents: Path, vae: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    for rank, files in ((1, ["00001.safetensors"]), (0, ["00000.safetensors", "00002.safetensors"])):
        before = set(contents(tmp_path / "c")) if rank == 0 else set()
        for name, value in LAUNCHERS[launcher].items():
            monkeypatch.setenv(name, value.format(rank=rank))
        precompute(str(shards), str(tmp_path / "c"), vae)
        new = set(contents(tmp_path / "c")) - before
        assert sorted(new - {"identity.json", "empty.safetensors"}) == files
    assert contents(tmp_path / "c") == contents(latents)


def test_processes_that_run_at_once_make_the_cache_of_one(
    shards: Path, latents: Path, vae: str, tmp_path: Path
) -> None:
    """Two of the five have the same number, as by mistake."""

    def compute(i: int) -> None:
        precompute(str(shards), str(tmp_path / "c"), vae, threads=1, rank=i % 4, world=4)

    torch.multiprocessing.start_processes(compute, nprocs=5, start_method="fork")
    assert contents(tmp_path / "c") == contents(latents)


def test_a_run_of_two_processes_is_continued_by_one(shards: Path, latents: Path, vae: str, tmp_path: Path) -> None:
    precompute(str(shards), str(tmp_path / "c"), vae, rank=1, world=2)
    kept = (tmp_path / "c" / "00001.safetensors").stat().st_mtime_ns
    precompute(str(shards), str(tmp_path / "c"), vae)
    assert contents(tmp_path / "c") == contents(latents)
    assert (tmp_path / "c" / "00001.safetensors").stat().st_mtime_ns == kept


def test_remote_shards_give_the_cache_of_local_ones(shards: Path, latents: Path, vae: str, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(shards))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(ValueError, match="set shard_cache"):
            precompute(url, str(tmp_path / "c"), vae)
        precompute(url, str(tmp_path / "c"), vae, shard_cache=str(tmp_path / "copies"))
        server.shutdown()
    assert contents(tmp_path / "c") == contents(latents)


def test_which_vae_is_asked_for_and_not_guessed(
    shards: Path, llm: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for more in ([], ["--llms", f"[{llm}]"]):
        assert main(["prep", "precompute", "--shards", str(shards), "--out", str(tmp_path / "c"), *more]) == 1
        (said,) = capsys.readouterr().err.splitlines()
        assert (
            "say --vae, the VAE whose latents are kept: that of the recipe, which for drawn scenes is bundled:" in said
        )
    assert not (tmp_path / "c").exists()


def test_nothing_to_compute_is_an_error(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to compute"):
        precompute(str(shards), str(tmp_path / "c"), None)
    assert not (tmp_path / "c").exists()


def test_a_yaml_gives_models_by_name_or_with_their_settings(shards: Path, llm: str, tmp_path: Path) -> None:
    settings = {"class_path": "lidit.models.llm.FrozenLLM", "init_args": {"name": llm, "layer": -2, "max_tokens": 9}}
    config = {"shards": str(shards), "out": str(tmp_path / "c"), "vae": None, "llms": [llm, settings]}
    (tmp_path / "c.yaml").write_text(json.dumps(config))  # JSON is YAML
    auto_cli(precompute, as_positional=False, args=["--config", str(tmp_path / "c.yaml")])
    made = json.loads((tmp_path / "c" / "identity.json").read_text())
    assert made["vae"] is None
    assert made["llms"] == identities(FrozenLLM(llm), FrozenLLM(llm, layer=-2, max_tokens=9))


@pytest.mark.slow
def test_the_script_says_what_is_wrong_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_prep.precompute", "--shards", str(tmp_path), "--out", str(tmp_path / "c")]
    command += ["--vae", "null"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(f"error: {tmp_path} holds no .tar shards")
    assert "Traceback" not in run.stderr
