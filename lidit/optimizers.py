"""The optimizers training can choose: AdamW, and Muon for the matrices with AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

# Layers that make conditions, or touch inputs and outputs: Muon is for the matrices between hidden states.
NOT_HIDDEN = ("modulation", "gates", "time", "pool", "project", "final")


class WideMuon(Muon):
    """PyTorch's Muon, orthogonalising in float32 on the CPU: without units for it bfloat16 is fifty times slower there.

    Of its options it knows those that `MuonAdamW` sets.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step."""
        if any(p.device.type != "cpu" for group in self.param_groups for p in group["params"]):
            super().step()
            return
        for group in self.param_groups:
            parameters, gradients, momenta = [], [], []
            self._init_group(group, parameters, gradients, momenta)
            for parameter, gradient, momentum in zip(parameters, gradients, momenta, strict=True):
                momentum.lerp_(gradient, 1 - group["momentum"])
                update = orthogonal(gradient.lerp(momentum, group["momentum"]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-0.2 * group["lr"] * math.sqrt(max(parameter.shape)))


def orthogonal(x: Float[Tensor, "a b"], steps: int = 5) -> Float[Tensor, "a b"]:
    """The matrix with all singular values near 1, by Newton-Schulz steps with the coefficients of Jordan et al."""
    wide = x if x.shape[0] <= x.shape[1] else x.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), wide, beta=3.4445)
    return wide if x.shape[0] <= x.shape[1] else wide.T


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for hidden matrices and AdamW for everything else, as one optimizer.

    Both take one learning rate: Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, "Muon is scalable").
    Each rank orthogonalises every matrix itself, so this is for models that fit on one device.

    Args:
        matrices: parameters of two dimensions, for Muon.
        others: all other parameters, as groups for AdamW.
        lr: learning rate of both.
        betas: of AdamW.
        weight_decay: of both; a group of `others` may name its own.
        momentum: of Muon.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: Iterable[dict],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        momentum: float = 0.95,
    ):
        self.parts: tuple[Optimizer, ...] = (
            WideMuon(matrices, lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw"),
            AdamW(others, lr, betas, weight_decay=weight_decay),
        )
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """The parts work on this optimizer's groups and state: schedulers and checkpoints see one optimizer."""
        muon, adamw = self.parts
        muon.param_groups = [group for group in self.param_groups if "momentum" in group]
        adamw.param_groups = [group for group in self.param_groups if "momentum" not in group]
        muon.state = adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state_dict)
        self._share()


def adamw(model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> AdamW:
    """AdamW; vectors (biases, norms) do not decay."""
    return AdamW(_groups(_trained(model).values(), weight_decay), lr, betas)


def muon(model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> MuonAdamW:
    """Muon for the hidden matrices, AdamW for everything else; vectors do not decay."""
    trained = _trained(model)
    hidden = {name: p for name, p in trained.items() if is_muons(name, p)}
    others = [p for name, p in trained.items() if name not in hidden]
    return MuonAdamW(list(hidden.values()), _groups(others, weight_decay), lr, betas, weight_decay)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def is_muons(name: str, parameter: nn.Parameter) -> bool:
    """Whether `muon` trains a parameter of a name with Muon."""
    return parameter.ndim == 2 and not any(part in piece for piece in name.split(".") for part in NOT_HIDDEN)


def _groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
