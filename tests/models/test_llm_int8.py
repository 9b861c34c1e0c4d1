"""Frozen LLMs in 8 bits: nearly the same features from a fraction of the memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lidit.models import llm as module
from lidit.models.llm import FrozenLLM

PROMPTS = ["a red circle", "two blue squares to the left of a green star"]


def test_features_in_8_bits_are_close_and_linear_weights_take_a_byte(tiny_qwen: Path) -> None:
    whole, small = (FrozenLLM(str(tiny_qwen), dtype=dtype).load() for dtype in ("float32", "int8"))
    a, b = whole(PROMPTS), small(PROMPTS)
    assert b[0].dtype == torch.bfloat16
    assert torch.equal(a[1], b[1])
    assert torch.equal(a[2], b[2])
    apart = (a[0] - b[0].float()).norm() / a[0].norm()
    assert 0 < apart < 0.05
    linear = small._model.layers[0].mlp.up_proj.weight
    assert linear.dtype == torch.int8
    assert small.identity["dtype"] == "int8"  # a cache of the one is stale for the other


def test_bytes_are_known_before_anything_is_read(tiny_llama: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        llm = FrozenLLM(str(tiny_llama), dtype=dtype)
        counted = llm.nbytes
        assert not llm.loaded
        assert counted == sum(p.nbytes for p in llm.load()._model.parameters())


def test_without_bitsandbytes_the_command_that_installs_it_is_said(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes; install it with `pip install 'lidit\[llm8bit\]'`"):
        FrozenLLM(str(tiny_llama), dtype="int8").load()


def test_8_bits_are_not_sharded(tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="weights in int8 are not sharded"):
        FrozenLLM(str(tiny_llama), dtype="int8", sharded=True)
