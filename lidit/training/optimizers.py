"""The optimizers that a recipe can choose: AdamW, and Muon for hidden matrices with AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup, all_to_all_single
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import AdamW, Optimizer


class Muon(Optimizer):
    """Muon: momentum, whose matrices are orthogonalised before they are added (Jordan et al. 2024), with Nesterov.

    Where weights are sharded by rows, momentum is, too. A matrix is orthogonalised whole, by one rank, to which the
    others send their shares, and which sends the result back: in each copy of the model each rank does its part.

    Args:
        matrices: parameters of two dimensions, each with the number of matrices that lie in it over one another: 2 for
            keys and values.
        lr: learning rate, of updates with the size of AdamW's.
        weight_decay: weight decay.
        momentum: share of the earlier momentum that is kept at a step.
    """

    def __init__(self, matrices: dict[nn.Parameter, int], lr: float, weight_decay: float, momentum: float):
        super().__init__(list(matrices), {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.matrices = matrices

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the parameters once; where weights are sharded, all ranks call this."""
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            mixed = [self._with_momentum(p, group["momentum"]) for p in trained]
            pieces = [self.matrices[p] for p in trained]
            for p, update in zip(trained, orthogonal_shares(trained, mixed, pieces), strict=True):
                rows = p.shape[0] // self.matrices[p]
                share = local(p)
                share.mul_(1 - group["lr"] * group["weight_decay"])
                share.add_(update, alpha=-0.2 * group["lr"] * math.sqrt(max(rows, p.shape[1])))  # AdamW's size

    def _with_momentum(self, parameter: nn.Parameter, kept: float) -> Tensor:
        """This rank's share of a gradient with its momentum, which is updated."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad, memory_format=torch.preserve_format)
        gradient, momentum = local(parameter.grad), local(state["momentum_buffer"])
        momentum.lerp_(gradient, 1 - kept)
        return gradient.lerp(momentum, kept)


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor, or the tensor where it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def orthogonal_shares(matrices: Sequence[Tensor], shares: Sequence[Tensor], pieces: Sequence[int]) -> list[Tensor]:
    """This rank's shares of matrices, each orthogonalised whole.

    Args:
        matrices: what is sharded; it says how.
        shares: this rank's rows of what is to be orthogonalised.
        pieces: number of matrices that lie in each over one another.

    Raises:
        ValueError: a matrix is sharded otherwise than by rows.
    """
    groups = [rows_group(matrix) for matrix in matrices]
    found = {i: orthogonal_pieces(shares[i], pieces[i]) for i, group in enumerate(groups) if group is None}
    for group in dict.fromkeys(group for group in groups if group is not None):
        chosen = [i for i, each in enumerate(groups) if each is group]
        whole = Exchange([torch.Size(matrices[i].shape) for i in chosen], group)
        mine = whole.gather([shares[i] for i in chosen])
        mine = {at: orthogonal_pieces(matrix, pieces[chosen[at]]) for at, matrix in mine.items()}
        found |= dict(zip(chosen, whole.scatter(mine, shares[chosen[0]]), strict=True))
    return [found[i] for i in range(len(matrices))]


def rows_group(matrix: Tensor) -> ProcessGroup | None:
    """The ranks that hold a matrix's rows between them; None: this rank holds all of it.

    Raises:
        ValueError: it is sharded otherwise.
    """
    if not isinstance(matrix, DTensor):
        return None
    sharded = [i for i, placement in enumerate(matrix.placements) if not isinstance(placement, Replicate)]
    if len(sharded) > 1 or any(matrix.placements[i] != Shard(0) for i in sharded):
        raise ValueError(
            f"muon takes matrices that are whole or sharded by rows, not {matrix.placements}; use model.optimizer adamw"
        )
    group = matrix.device_mesh.get_group(sharded[0]) if sharded else None
    return group if group is not None and group.size() > 1 else None


class Exchange:
    """Matrices that ranks hold by rows meet on owners, and go back: an exchange among all ranks for each way.

    Args:
        shapes: of the matrices, in the same order on all ranks.
        group: the ranks.
    """

    def __init__(self, shapes: Sequence[torch.Size], group: ProcessGroup):
        self.shapes, self.group, self.rank, self.ranks = shapes, group, group.rank(), group.size()
        self.owners = owners(shapes, self.ranks)
        self.mine = [i for i, owner in enumerate(self.owners) if owner == self.rank]

    def rows(self, i: int, rank: int) -> int:
        """Rows of a matrix that a rank holds: as many as the others, but the last ones have what remains."""
        each = -(-self.shapes[i][0] // self.ranks)
        return max(0, min(each, self.shapes[i][0] - rank * each))

    def gather(self, shares: Sequence[Tensor]) -> dict[int, Tensor]:
        """The matrices of which this rank is the owner, by their number, from all ranks' shares."""
        sent = [[shares[i].flatten() for i, owner in enumerate(self.owners) if owner == to] for to in range(self.ranks)]
        sizes = [[self._size(i, rank) for i in self.mine] for rank in range(self.ranks)]
        parts = [part.split(size) for part, size in zip(self._exchange(sent, sizes, shares[0]), sizes, strict=True)]
        return {
            i: torch.cat([parts[rank][at] for rank in range(self.ranks)]).view(self.shapes[i])
            for at, i in enumerate(self.mine)
        }

    def scatter(self, matrices: dict[int, Tensor], like: Tensor) -> list[Tensor]:
        """This rank's shares of all matrices, from their owners; of the type of a tensor."""
        split = {
            i: matrix.to(like.dtype).split([self.rows(i, rank) for rank in range(self.ranks)])
            for i, matrix in matrices.items()
        }
        sent = [[split[i][to].flatten() for i in self.mine] for to in range(self.ranks)]
        owned = [[i for i, owner in enumerate(self.owners) if owner == rank] for rank in range(self.ranks)]
        sizes = [[self._size(i, self.rank) for i in each] for each in owned]
        found = {}
        for each, size, part in zip(owned, sizes, self._exchange(sent, sizes, like), strict=True):
            found |= {i: flat.view(-1, self.shapes[i][1]) for i, flat in zip(each, part.split(size), strict=True)}
        return [found[i] for i in range(len(self.shapes))]

    def _size(self, i: int, rank: int) -> int:
        return self.rows(i, rank) * self.shapes[i][1]

    def _exchange(self, sent: list[list[Tensor]], sizes: list[list[int]], like: Tensor) -> tuple[Tensor, ...]:
        """What each rank has sent to this one, flat; `sent` is by receiver, `sizes` by sender."""
        flat = torch.cat([like.new_empty(0), *(part for parts in sent for part in parts)])
        given, taken = [sum(part.numel() for part in parts) for parts in sent], [sum(size) for size in sizes]
        received = like.new_empty(sum(taken))
        all_to_all_single(received, flat, taken, given, group=self.group)
        return received.split(taken)


def owners(shapes: Sequence[torch.Size], ranks: int) -> list[int]:
    """The rank that orthogonalises each matrix: the costliest first, each to whoever has least to do."""
    costs = [shape.numel() * min(shape) for shape in shapes]
    busy, owner = [0] * ranks, [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: -costs[i]):
        owner[i] = busy.index(min(busy))
        busy[owner[i]] += costs[i]
    return owner


def orthogonal_pieces(x: Float[Tensor, "a b"], pieces: int) -> Float[Tensor, "a b"]:
    """The matrices that lie over one another in x, each orthogonalised by itself."""
    return torch.cat([orthogonal(piece) for piece in x.chunk(pieces)])


def orthogonal(x: Float[Tensor, "a b"], steps: int = 5) -> Float[Tensor, "a b"]:
    """The matrix with all its singular values moved near 1, by Newton-Schulz steps (coefficients of Jordan et al.).

    In bfloat16, but on the CPU in the matrix's own type: there bfloat16 can be fifty times slower.
    """
    x = x if x.device.type == "cpu" else x.bfloat16()
    wide = x if x.shape[0] <= x.shape[1] else x.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), wide, beta=3.4445)
    return wide if x.shape[0] <= x.shape[1] else wide.T


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for hidden matrices and AdamW for everything else, as one optimizer.

    Both take one learning rate: Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, "Muon is scalable").
    Weights may be sharded by rows (FSDP2); see `Muon`.

    Args:
        matrices: parameters of two dimensions, for Muon, each with the number of matrices that lie in it over one
            another.
        others: all other parameters, as groups for AdamW.
        lr: learning rate of both.
        betas: AdamW's betas.
        weight_decay: weight decay of both; a group of `others` may name its own.
        momentum: Muon's momentum.
    """

    def __init__(
        self,
        matrices: dict[nn.Parameter, int],
        others: Iterable[dict],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        momentum: float = 0.95,
    ):
        self.parts: tuple[Optimizer, ...] = (
            Muon(matrices, lr, weight_decay, momentum),
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
    return AdamW(_groups(_trained(model), weight_decay), lr, betas)


def muon(model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> MuonAdamW:
    """Muon for the hidden matrices, AdamW for everything else; vectors do not decay.

    Raises:
        ValueError: no part of the model names hidden matrices that are trained.
    """
    trained, hidden = _trained(model), hidden_matrices(model)
    matrices = {p: hidden[p] for p in trained if p in hidden}
    if not matrices:
        raise ValueError(
            "muon finds no matrices to train: they are what modules name by a method hidden_matrices, as Attention of "
            "lidit.models.layers does; use model.optimizer adamw"
        )
    return MuonAdamW(matrices, _groups((p for p in trained if p not in hidden), weight_decay), lr, betas, weight_decay)


def hidden_matrices(model: nn.Module) -> dict[nn.Parameter, int]:
    """The parameters that `muon` trains with Muon, each with the number of matrices that lie in it over one another.

    Modules say so themselves, by a method `hidden_matrices` that gives such a dictionary. Layers that make conditions,
    or touch inputs or outputs, are not among them.
    """
    return {
        parameter: pieces
        for module in model.modules()
        if hasattr(module, "hidden_matrices")
        for parameter, pieces in module.hidden_matrices().items()
    }


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
