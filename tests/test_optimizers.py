"""Muon and AdamW are one optimizer to schedulers and checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lidit.models.layers import Attention
from lidit.models.lidit import LIDiT
from lidit.training.optimizers import Muon, adamw, hidden_matrices, muon, orthogonal, owners


class Hidden(nn.Linear):
    """A layer whose matrix is for Muon."""

    def hidden_matrices(self) -> dict[nn.Parameter, int]:
        return {self.weight: 1}


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"hidden": Hidden(8, 8), "modulation": nn.Linear(8, 4), "final": nn.Linear(8, 8)})


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


def test_a_state_that_pytorchs_muon_has_left_goes_on() -> None:  # as runs of earlier versions have it
    made = model()
    optimizer = muon(made, 1e-2, (0.9, 0.99), 0.1)
    train(made, optimizer, 1)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0] |= {"nesterov": True, "ns_coefficients": (3.4445, -4.775, 2.0315), "eps": 1e-7}
    state["param_groups"][0] |= {"ns_steps": 5, "adjust_lr_fn": "match_rms_adamw"}
    again = copy.deepcopy(made)
    resumed = muon(again, 1e-2, (0.9, 0.99), 0.1)
    resumed.load_state_dict(state)
    train(made, optimizer, 2, start=1)
    train(again, resumed, 2, start=1)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in made.state_dict().items())


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
    settings = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9}
    optimizers = [Muon({ours[0]: 1}, **settings), torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw")]
    for step in range(4):
        for (parameter,), optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    torch.testing.assert_close(ours[0], theirs[0], atol=5e-3, rtol=0)  # theirs orthogonalises in bfloat16
    singular = torch.linalg.svdvals(orthogonal(torch.randn(8, 5, generator=torch.Generator().manual_seed(0))))
    assert ((singular > 0.6) & (singular < 1.3)).all()


def test_keys_and_values_are_two_matrices() -> None:
    torch.manual_seed(0)
    attention = Attention(8, 2)
    together, keys, values = (nn.Parameter(w.clone()) for w in (attention.key_value.weight, *torch.randn(2, 8, 8)))
    keys.data, values.data = (part.clone() for part in together.data.chunk(2))
    gradient = torch.randn(16, 8)
    gradient[8:] *= 100  # as one matrix, the keys' update would vanish beside the values'
    together.grad, (keys.grad, values.grad) = gradient, (part.clone() for part in gradient.chunk(2))
    Muon({together: attention.hidden_matrices()[attention.key_value.weight]}, 0.1, 0.1, 0.9).step()
    Muon({keys: 1, values: 1}, 0.1, 0.1, 0.9).step()
    assert torch.equal(together.data, torch.cat([keys.data, values.data]))


def test_modules_say_which_matrices_are_hidden() -> None:
    net = LIDiT(4, depth=1, width=32, heads=2)
    names = {p: name for name, p in net.named_parameters()}
    assert {names[p]: pieces for p, pieces in hidden_matrices(net).items()} == {
        "blocks.0.self_attention.query.weight": 1,
        "blocks.0.self_attention.key_value.weight": 2,
        "blocks.0.self_attention.out.weight": 1,
        "blocks.0.cross_attention.query.weight": 1,
        "blocks.0.cross_attention.key_value.weight": 2,
        "blocks.0.cross_attention.out.weight": 1,
        "blocks.0.mlp.0.weight": 1,
        "blocks.0.mlp.2.weight": 1,
    }


def test_a_model_that_names_no_matrices_is_refused() -> None:
    with pytest.raises(ValueError, match="muon finds no matrices to train.*use model.optimizer adamw"):
        muon(nn.Linear(3, 3), 0.1, (0.9, 0.99), 0.0)


def test_every_rank_owns_about_as_much_work_as_the_others() -> None:
    shapes = [torch.Size(shape) for shape in [(64, 16), (16, 16), (32, 16), (16, 64), (16, 16), (16, 16), (16, 16)]]
    owner = owners(shapes, 3)
    work = [sum(s.numel() * min(s) for s, o in zip(shapes, owner, strict=True) if o == rank) for rank in range(3)]
    assert max(work) <= 1.5 * min(work)
    assert owners(shapes[:1], 4) == [0]
