"""The optimizers that a recipe can choose: AdamW, and Muon for hidden matrices with AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

# Parts of names of layers that AdamW trains: they make conditions, or touch inputs or outputs.
NOT_HIDDEN = ("modulation", "gates", "time", "pool", "project", "final")


class WideMuon(Muon):
    """PyTorch's Muon, but orthogonalising in float32 on the CPU, where bfloat16 can be fifty times slower.

    It supports only those of Muon's options that `MuonAdamW` sets.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the parameters once."""
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
    """The matrix with all its singular values moved near 1, by Newton-Schulz steps (coefficients of Jordan et al.)."""
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
        betas: AdamW's betas.
        weight_decay: weight decay of both; a group of `others` may name its own.
        momentum: Muon's momentum.
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
        """Let both parts use this optimizer's groups and state, so that schedulers and checkpoints see only one."""
        muon, adamw = self.parts
        muon.param_groups = [group for group in self.param_groups if "momentum" in group]
        adamw.param_groups = [group for group in self.param_groups if "momentum" not in group]
        muon.state = adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update all parameters once; the result is that of the closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over the state that a checkpoint holds."""
        super().load_state_dict(state_dict)
        self._share()


def adamw(model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> AdamW:
    """AdamW for a model; vectors (biases, norms) do not decay."""
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
    """Whether `muon` trains the parameter of this name with Muon rather than AdamW."""
    return parameter.ndim == 2 and not any(part in piece for piece in name.split(".") for part in NOT_HIDDEN)


def _groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
