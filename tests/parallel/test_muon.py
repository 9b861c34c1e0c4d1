"""Matrices in uneven shares, on more ranks than some have rows, are orthogonalised as whole ones are."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lidit.training.optimizers import Exchange, Muon, local, orthogonal_shares

pytestmark = pytest.mark.slow

RANKS = 3
SHAPES = [(8, 5), (2, 7), (5, 16), (1, 4), (9, 9), (10, 3)]
PIECES = [2, 1, 1, 1, 3, 2]


def drawn() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def rank_process(rank: int, port: int, folder: str) -> None:
    init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (RANKS,))
    matrices = [distribute_tensor(x, mesh, [Shard(0)]) for x in drawn()]
    exchange = Exchange([x.shape for x in matrices], mesh.get_group())
    shares = [local(x) for x in matrices]
    gathered = exchange.gather(shares)
    assert len(exchange.mine) < len(SHAPES)  # nobody owns all
    assert all(torch.equal(whole, drawn()[i]) for i, whole in gathered.items())
    assert all(torch.equal(a, b) for a, b in zip(exchange.scatter(gathered, shares[0]), shares, strict=True))
    found = orthogonal_shares(matrices, shares, PIECES)
    columns = [distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)])]
    with pytest.raises(ValueError, match="whole or sharded by rows"):
        orthogonal_shares(columns, [local(columns[0])], [1])
    parameters = [torch.nn.Parameter(x) for x in matrices]
    optimizer = Muon(dict(zip(parameters, PIECES, strict=True)), 0.1, 0.1, 0.9)
    for _ in range(3):
        for p in parameters:
            p.grad = p.detach().clone()
        optimizer.step()
    kept = [local(optimizer.state[p]["momentum_buffer"]).shape for p in parameters]
    assert kept == [share.shape for share in shares]
    torch.save([found, [p.full_tensor().detach() for p in parameters]], Path(folder) / f"{rank}.pt")
    destroy_process_group()


def test_uneven_shares_give_what_whole_matrices_give(tmp_path: Path) -> None:
    port = 20_000 + time.monotonic_ns() % 10_000
    torch.multiprocessing.start_processes(rank_process, (port, str(tmp_path)), RANKS, start_method="fork")
    by_rank, trained = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)), strict=True)
    expected = orthogonal_shares(drawn(), drawn(), PIECES)
    for i, whole in enumerate(expected):
        assert torch.equal(torch.cat([found[i] for found in by_rank]), whole)
    parameters = [torch.nn.Parameter(x) for x in drawn()]
    optimizer = Muon(dict(zip(parameters, PIECES, strict=True)), 0.1, 0.1, 0.9)
    for _ in range(3):
        for p in parameters:
            p.grad = p.detach().clone()
        optimizer.step()
    for found in trained:
        assert all(torch.equal(a, b) for a, b in zip(found, parameters, strict=True))
