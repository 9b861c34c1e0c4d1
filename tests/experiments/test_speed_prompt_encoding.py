from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from experiments.speed_prompt_encoding import Apart, all_states, cached, made, run, size
from lidit.models.llm import FrozenLLM


def test_all_ways_read_the_same(tmp_path: Path) -> None:
    made(tmp_path, 32, 4)
    prompts = ["a red circle", "a blue square above a small green triangle"]
    llm, apart = (kind(str(tmp_path), dtype="float32") for kind in (FrozenLLM, Apart))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    features, mask, _ = llm(prompts)
    torch.testing.assert_close(apart(prompts)[0], features)
    torch.testing.assert_close(all_states(whole, llm, prompts)[mask], features[mask])
    assert size(whole) > llm.nbytes
    ((kept, _, _),) = cached(tmp_path / "cached", llm, prompts[::-1])(prompts)
    torch.testing.assert_close(kept[mask].float(), features[mask], rtol=0.01, atol=0.01)  # bfloat16


def test_ways_are_timed_and_shares_counted(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    run(str(out), width=32, depth=4, prompts=4, batch_size=2, rounds=1, backbone=(2, 64))
    found = json.loads(out.read_text())
    whole, stopped, *_ = found["reading"]
    assert whole["over_whole"] == 1
    assert stopped["weights_mb"] < whole["weights_mb"]
    share = found["share"]
    assert 0 < share["counted_over_25_steps_computed_once"] < share["counted_of_a_sampling_step"] < 1
    assert share["counted_of_a_training_step_with_cache"] < share["counted_of_a_training_step_without"] < 1
