"""What a recipe is said to write is what it writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from torch.utils._pytree import tree_leaves

from data_prep.precompute import precompute
from lidit.cli import main
from lidit.models.llm import FrozenLLM
from lidit.plan.costs import count, planned
from lidit.plan.disk import cached, samples, saved
from lidit.plan.plan import read


def test_a_checkpoints_size_is_that_of_the_file(tiny_recipe: Path, tiny_checkpoint: Path) -> None:
    given, model = read(["--config", str(tiny_recipe), "--pixels", "32"])
    counts = count(given, model)
    found = saved(given, planned(given, model, counts), counts)
    checkpoint = torch.load(tiny_checkpoint, weights_only=True)
    assert found.weights == pytest.approx(size_of(checkpoint["state_dict"]), rel=0.01)
    assert found.optimizer == pytest.approx(size_of(checkpoint["optimizer_states"]), rel=0.01)
    assert found.average == size_of(checkpoint["callbacks"]["EMA"]["average"])
    # at this size names take a tenth of a file, settings and the recipe as well
    assert found.total < tiny_checkpoint.stat().st_size < 1.15 * found.total
    assert (found.ranks, found.nodes, found.keep) == (1, 1, 3)
    assert found.weights > found.average  # whitening's statistics are saved, and not averaged


def size_of(found: Any) -> int:
    """Bytes of the tensors in dictionaries and lists."""
    return sum(leaf.nbytes for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor))


def test_every_rank_of_a_sharded_run_writes_its_part(tiny_recipe: Path) -> None:
    words = ["--trainer.strategy", "sharded", "--trainer.devices", "4", "--trainer.num_nodes", "2"]
    keep = {"class_path": "lidit.callbacks.checkpoints.Checkpoints", "init_args": {"keep": 5}}
    given, model = read(["--config", str(tiny_recipe), "--pixels", "32", *words, f"--trainer.callbacks+={keep}"])
    counts = count(given, model)
    found = saved(given, planned(given, model, counts), counts)
    assert (found.ranks, found.nodes, found.keep) == (8, 2, 5)
    assert found.seconds(1e6) == found.total / 2 / 1e6
    assert replace(found, nodes=1).seconds(1e6) == found.total / 1e6


def test_a_caches_size_is_that_of_its_files(tiny_recipe: Path, tmp_path: Path) -> None:
    words = ["--config", str(tiny_recipe), "--pixels", "32"]
    given, model = read(words)
    assert samples(given) == 16
    llms = [FrozenLLM(llm.name, dtype="float32") for llm in model.llms]
    precompute(given.data.train, str(tmp_path / "cache"), model.vae, llms)
    files = sum(path.stat().st_size for path in (tmp_path / "cache").glob("0*.safetensors"))
    lengths = [llm.prompts for llm in llms]
    texts = [text for s in range(16) for text in captions_of(given.data.train, s)]
    counts = count(given, model)
    before = [tokens - own for tokens, own in zip(counts.tokens, (256, 256), strict=True)]
    mean = [sum(len(prompts.split(text).ids) for text in texts) / len(texts) for prompts in lengths]
    real = replace(counts, tokens=tuple(round(length) for length in mean))
    assert sum(cached(given, model, real).values()) * 16 == pytest.approx(files, rel=0.02)
    assert before == [40, 40]


def captions_of(shards: str, sample: int) -> list[str]:
    from lidit.data.index import ShardIndex

    text = ShardIndex(shards).text(sample)
    return [text["caption"], text.get("dense") or ""]


def test_one_kind_of_caption_is_stored_where_training_shows_one(tiny_recipe: Path) -> None:
    words = ["--config", str(tiny_recipe), "--pixels", "32"]
    both, model = read(words)
    one, _ = read([*words, "--data.dense_probability", "0"])
    counts = count(both, model)
    twice, once = (list(cached(given, model, counts).values()) for given in (both, one))
    assert twice[0] == once[0] == 4 * 4 * 4 * 2
    assert twice[1:] == [2 * size for size in once[1:]]


def test_samples_are_counted_where_the_data_is_and_asked_for_elsewhere(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["plan", "--config", str(tiny_recipe), "--pixels", "32"]
    assert main(words) == 0
    assert "A cache in bfloat16, of 16 samples:" in capsys.readouterr().out
    elsewhere = ["--data.train", str(tmp_path / "none")]
    assert main([*words, *elsewhere]) == 0
    assert "of a million samples (data.train is not on this machine; --samples says" in capsys.readouterr().out
    assert main([*words, *elsewhere, "--samples", "30000000"]) == 0
    said = capsys.readouterr().out
    assert "of 30,000,000 samples:" in said
    assert "0.128 KB a sample, 3.84 GB" in said
    assert samples(Namespace(samples=None, data=Namespace(train=["s3://bucket/{0..9}.tar"]))) is None
