"""Muon and AdamW are one optimizer to schedulers and checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lidit.optimizers import WideMuon, adamw, muon, orthogonal


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"hidden": nn.Linear(8, 8), "modulation": nn.Linear(8, 4), "final": nn.Linear(8, 8)})


def train(model: nn.ModuleDict, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        loss = (model["final"](model["hidden"](x)).pow(2) + model["modulation"](x).sum(1, keepdim=True).pow(2)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_muon_has_the_hidden_matrices_and_adamw_all_the_rest() -> None:
    made = model()
    optimizer = muon(made, 1e-2, (0.9, 0.99), 0.1)
    groups = [("momentum" in g, g["weight_decay"], list(g["params"])) for g in optimizer.param_groups]
    counts = [(is_muon, decay, len(p)) for is_muon, decay, p in groups]
    assert counts == [(True, 0.1, 1), (False, 0.1, 2), (False, 0, 3)]
    assert groups[0][2][0] is made["hidden"].weight
    train(made, optimizer, 1)
    assert "momentum_buffer" in optimizer.state[made["hidden"].weight]
    assert "exp_avg" in optimizer.state[made["modulation"].weight]


def test_vectors_do_not_decay() -> None:
    assert [g["weight_decay"] for g in adamw(model(), 1e-2, (0.9, 0.99), 0.1).param_groups] == [0.1, 0.0]


def test_a_schedule_reaches_both_parts() -> None:
    made = model()
    optimizer = muon(made, 1e-2, (0.9, 0.99), 0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(made.state_dict())
    train(made, optimizer, 1)
    schedule.step()
    assert all(torch.equal(before[name], value) for name, value in made.state_dict().items())


@pytest.mark.parametrize("make", [adamw, muon])
def test_a_resumed_optimizer_goes_on_as_an_uninterrupted_one(make) -> None:
    straight = model()
    optimizer = make(straight, 1e-2, (0.9, 0.99), 0.1)
    train(straight, optimizer, 3)
    resumed = copy.deepcopy(straight)
    again = make(resumed, 5.0, (0.9, 0.99), 0.1)  # the checkpoint's rate counts
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(straight, optimizer, 3, start=3)
    train(resumed, again, 3, start=3)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_size_of_a_muon_update_is_that_of_adamw() -> None:
    moved = {}
    for make in (adamw, muon):
        made = model()
        before = made["hidden"].weight.detach().clone()
        train(made, make(made, 1e-2, (0.9, 0.99), 0.0), 1)
        moved[make] = (made["hidden"].weight - before).pow(2).mean().sqrt()
    assert 0.1 < moved[muon] / moved[adamw] < 1


def test_muon_on_the_cpu_steps_as_pytorchs_does() -> None:
    ours, theirs = ([torch.nn.Parameter(torch.linspace(-1, 1, 12).sin().view(shape))] for shape in ((3, 4), (3, 4)))
    settings = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = [WideMuon(ours, **settings), torch.optim.Muon(theirs, **settings)]
    for step in range(4):
        for (parameter,), optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    torch.testing.assert_close(ours[0], theirs[0], atol=5e-3, rtol=0)  # theirs orthogonalises in bfloat16
    singular = torch.linalg.svdvals(orthogonal(torch.randn(8, 5, generator=torch.Generator().manual_seed(0))))
    assert ((singular > 0.6) & (singular < 1.3)).all()
