"""Compiled blocks: how many graphs torch.compile makes of them while sizes change from batch to batch.

The counting is done by this file as a script, in a process of its own: the tests' check of every call's shapes, which
no run has, breaks graphs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from lidit.models.contracts import Text
from lidit.models.lidit import LIDiT
from lidit.parallel import ENOUGH, Compiler, Parallel

HEADS, WIDTH = 4, 32
SHAPES = [(8, 8), (8, 16), (16, 8), (12, 10), (10, 12), (4, 20), (20, 4), (8, 14), (14, 8), (8, 8)]
LENGTHS = [7, 12, 5, 33, 21, 9, 41, 13, 6, 24]
# batches, and places in the two lists above, where a size is 1, or equals the heads or another size
ALIKE = [((8, 8), 16, 3), ((4, 8), 8, 8), ((8, 8), 7, 1), ((2, 2), 1, 3), ((8, 16), 32, HEADS), ((4, 4), 4, 4)]


def backbone(every: int = 0, compiled: bool = True) -> LIDiT:
    torch.manual_seed(0)
    net = LIDiT(4, depth=3, width=WIDTH, heads=HEADS)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    Parallel(checkpoint_every=every, compile=compiled, compile_backend="eager").apply(net)
    return net


def batch(shape: tuple[int, int], length: int, size: int) -> tuple[torch.Tensor, torch.Tensor, Text]:
    drawn = torch.Generator().manual_seed(length)
    mask = torch.ones(size, length, dtype=torch.bool)
    mask[0, length // 2 + 1 :] = False
    tokens, pooled = torch.randn(size, length, WIDTH, generator=drawn), torch.randn(size, WIDTH, generator=drawn)
    x, t = torch.randn(size, 4, *shape, generator=drawn), torch.rand(size, generator=drawn)
    return x, t, Text(tokens, mask, pooled)


def steps(net: LIDiT, shape: tuple[int, int], length: int, size: int) -> dict[str, float]:
    """A training step, a validation, and a drawing step with keys and values computed once: what came out."""
    x, t, text = batch(shape, length, size)
    net.zero_grad()
    loss = net(x, t, text).square().mean()
    loss.backward()
    found = {"loss": loss.item(), "gradient": sum(p.grad.norm().item() for p in net.parameters())}
    with torch.no_grad():
        found["validated"] = net(x, t, text).norm().item()
        x, t, text = batch(shape, length, 2 * size)
        found["drawn"] = net(x, t, text, keys_values=net.keys_values(text)).norm().item()
    return found


def count(every: int, sizes: list) -> dict:
    """Graphs after each batch, graph breaks, and how far results are from those of a backbone that is not compiled."""
    torch._dynamo.reset()
    counters.clear()
    net, plain, graphs, furthest = backbone(every), backbone(compiled=False), [], 0.0
    for shape, length, size in sizes:
        found, expected = steps(net, shape, length, size), steps(plain, shape, length, size)
        furthest = max(furthest, *(abs(found[k] - expected[k]) / expected[k] for k in expected))
        graphs.append(counters["stats"]["unique_graphs"])
    return {"graphs": graphs, "breaks": sum(counters["graph_break"].values()), "furthest": furthest}


@pytest.fixture(scope="module")
def counted() -> dict[str, dict]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "recompile_limit" not in done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("every", ["0", "1", "2"])
def test_ten_batches_of_changing_sizes_need_three_graphs_and_break_none(counted: dict, every: str) -> None:
    found = counted[every]
    assert found["graphs"] == [3] * len(SHAPES)  # training, validation, drawing; the first batch has made all
    assert found["breaks"] == 0
    assert found["furthest"] < 1e-5


@pytest.mark.slow
def test_sizes_that_happen_to_be_one_or_equal_stay_below_the_number_that_is_told(counted: dict) -> None:
    found = counted["alike"]
    assert found["graphs"][-1] <= ENOUGH
    assert found["breaks"] == 0
    assert found["furthest"] < 1e-5


def test_too_many_graphs_are_told_once_and_no_limit_is_reached_before(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    counters.clear()
    compiler = Compiler("eager")
    double = compiler.compile(lambda x, name: x * len(name))
    for i in range(1, ENOUGH + 4):
        assert caplog.text.count("torch.compile has made") == (i > ENOUGH + 1)
        assert torch.equal(double(torch.ones(3), "x" * i), torch.full((3,), float(i)))
    assert compiler.graphs == ENOUGH + 3
    assert caplog.text.count(f"torch.compile has made {ENOUGH} graphs of the blocks") == 1
    assert "recompile_limit" not in caplog.text


if __name__ == "__main__":
    torch.set_num_threads(1)
    usual = [(*pair, 5) for pair in zip(SHAPES, LENGTHS, strict=True)]
    results = {str(every): count(every, usual) for every in (0, 1, 2)}
    print(json.dumps(results | {"alike": count(0, ALIKE)}))
