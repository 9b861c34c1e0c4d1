"""How a built model is made to run on many ranks: activation checkpointing, compilation and FSDP2, in that order.

Models know no process group. The functions here change a model from outside after it is built, and leave the names of
its weights as they are, so that a checkpoint fits any number of ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._dynamo import lookup_backend
from torch.distributed import all_reduce
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from lidit.models.layers import PreciseLinear
from lidit.models.llm import FrozenLLM

log = logging.getLogger(__name__)

BYTES_PER_PARAMETER = {"weights": 4, "gradients": 4, "AdamW": 8, "EMA": 4}  # all float32
# Graphs that torch.compile may make of blocks before it is told. Training, validation and drawing need one each, for
# all sizes; further ones come where a size is 1, or two are equal when it is made (at worst 12 were seen).
ENOUGH = 16
SHARE = 0.6  # share of a device's memory that these may fill; the rest is for activations and gathered weights


@dataclass(frozen=True)
class Parallel:
    """The settings of a recipe's `parallel` section, which work with any strategy.

    Args:
        checkpoint_every: recompute the activations of every n-th backbone block in the backward pass instead of storing
            them; 1 means every block, 0 none.
        compile: compile each backbone block with torch.compile, once for pictures of all sizes and captions of all
            lengths.
        compile_backend: backend of torch.compile.
    """

    checkpoint_every: int = 0
    compile: bool = False
    compile_backend: str = "inductor"

    def __post_init__(self) -> None:
        if self.checkpoint_every < 0:
            raise ValueError(f"parallel.checkpoint_every is {self.checkpoint_every}; it must be 0 (none) or more")

    def apply(self, backbone: nn.Module) -> None:
        """Checkpoint and compile the blocks of a built backbone; sharding comes after this.

        Raises:
            ValueError: the backbone has no blocks.
        """
        if (self.checkpoint_every or self.compile) and not len(backbone.blocks):
            raise ValueError("this backbone has no blocks to checkpoint or compile; leave out the recipe's `parallel`")
        if self.compile:
            compiler = Compiler(self.compile_backend)
            for block in backbone.blocks:
                block.forward = compiler.compile(block.forward)
        if self.checkpoint_every:  # outside of what is compiled: torch.compile passes over a block that is a checkpoint
            for block in backbone.blocks[:: self.checkpoint_every]:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


class Compiler:
    """Compiles the blocks of a backbone for any sizes; blocks of one class share what is compiled.

    Args:
        backend: of torch.compile.
    """

    def __init__(self, backend: str):
        self.backend, self.graphs = lookup_backend(backend), 0
        # far above, so that the warning comes first; by itself torch.compile gives up at the ninth
        dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * ENOUGH)

    def compile(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward, to be compiled when it is called.

        Sizes are variables from the start: aspect ratios and lengths of captions change from batch to batch.
        """
        return torch.compile(forward, backend=self, dynamic=True)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Compile a graph that torch.compile has found, and say once if there are too many."""
        self.graphs += 1
        if self.graphs == ENOUGH + 1:
            log.warning(
                "torch.compile has made %d graphs of the blocks, and makes more: the sizes of pictures and captions "
                "need three. TORCH_LOGS=recompiles in the environment says what else changes; "
                "parallel.compile false trains without",
                ENOUGH,
            )
        return self.backend(graph, inputs)


def units(backbone: nn.Module, prompt_encoder: nn.Module) -> list[nn.Module]:
    """The modules whose weights are gathered together: each backbone block, the encoder's units, the two roots last."""
    return [*backbone.blocks, *prompt_encoder.units, backbone, prompt_encoder]


def shard(modules: list[nn.Module], mesh: DeviceMesh, compute: torch.dtype = torch.float32) -> None:
    """FSDP2: each rank keeps its share of every weight and gathers a unit's weights only while it runs.

    Args:
        modules: the units; a module that contains a unit comes after it.
        mesh: with one dimension, shard over it; with two, replicate over the first and shard over the second.
        compute: dtype of gathered weights; shares, sums of gradients and the optimizer stay in float32. A part that
            computes in float32 is gathered in float32, by itself.
    """

    # Inputs keep their dtype: the time in bfloat16 would have three digits. The roots, too, free their gathered weights
    # after the forward pass, so that outside of a pass every parameter is this rank's share.
    def share(module: nn.Module, dtype: torch.dtype) -> None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)

    for module in modules:
        for part in precise(module) if compute != torch.float32 else []:
            share(part, torch.float32)
        share(module, compute)
        if hasattr(module, "keys_values"):  # it reads weights outside of the forward pass
            register_fsdp_forward_method(module, "keys_values")


def precise(module: nn.Module) -> list[nn.Module]:
    """The parts of a module that compute in float32 in mixed precision, too: what makes time and gates, and norms."""
    kinds = (PreciseLinear, nn.LayerNorm, nn.GroupNorm)
    found = [part for part in module.modules() if isinstance(part, kinds) and not isinstance(part, FSDPModule)]
    types = [{p.dtype for p in part.parameters()} for part in found]
    return [part for part, dtypes in zip(found, types, strict=True) if dtypes == {torch.float32}]  # not a frozen LLM's


def spread(module: nn.Module, whole: dict[str, Tensor], device: torch.device) -> None:
    """Give every rank its share of rank 0's weights.

    Args:
        module: the sharded module; on the other ranks it may be on the meta device.
        whole: rank 0's weights and buffers; empty on the other ranks.
        device: device of the shares.
    """
    if any(p.is_meta for p in (*module.parameters(), *module.buffers())):
        module.to_empty(device=device)
    else:
        module.to(device)
    set_model_state_dict(module, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    saved = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name not in saved:  # computed when the model is built
            torch.distributed.broadcast(buffer, 0)


def hold_back_all_reduce(module: nn.Module, held: bool) -> None:
    """While gradients are accumulated, let each copy of the model keep its own sums, as shares.

    Every pass scatters its gradients over the ranks of a copy, so that no rank holds a whole gradient. Only the
    exchange between copies waits for the last pass.
    """
    for part in _sharded(module):
        part.set_requires_all_reduce(not held, recurse=False)


def reshard(module: nn.Module) -> None:
    """Give back what was gathered for a forward pass that did not end, so that every weight is this rank's share."""
    for part in _sharded(module):
        part.reshard()


def _sharded(module: nn.Module) -> Iterator[FSDPModule]:
    return (part for part in module.modules() if isinstance(part, FSDPModule))


def agree_on_statistics(module: nn.Module) -> None:
    """Let modules that measure the data (they have a `sum_over_ranks`) see that of all ranks, if there are several."""
    if _several_ranks():
        for part in module.modules():
            if hasattr(part, "sum_over_ranks"):
                part.sum_over_ranks = _sum_over_ranks


def _several_ranks() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _sum_over_ranks(x: Tensor) -> Tensor:
    all_reduce(x)
    return x


def load_in_turn(models: Sequence[FrozenLLM], device: torch.device, local_rank: int, ranks: int) -> None:
    """Load frozen models on a node's ranks one after another, so that its memory holds only one that is being read.

    Args:
        models: the models to load.
        device: device of this rank.
        local_rank: rank of this process on its node.
        ranks: number of processes on a node.
    """
    for turn in range(ranks):
        for model in models:
            if turn == local_rank or model.distribute:  # rank 0 reads a sharded model, and all ranks take part
                model.load(device)
        if _several_ranks():
            torch.distributed.barrier()


def share_llms(llms: Sequence[FrozenLLM]) -> None:
    """Make the LLMs with `sharded` spread over the ranks when they are loaded, if there are several ranks."""
    for llm in llms:
        if llm.sharded and _several_ranks():
            llm.distribute = read_share


def read_share(llm: FrozenLLM, device: torch.device) -> nn.Module:
    """Read a frozen LLM on rank 0 and give every rank its share; all ranks call this."""
    first = torch.distributed.get_rank() == 0
    model = llm.read() if first else llm.skeleton()
    whole = model.state_dict() if first else {}
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == llm.depth)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),), mesh_dim_names=("shard",))
    shard([*blocks, model], mesh, next(model.parameters()).dtype)
    spread(model, whole, device)
    return model


def choose(parameters: int, ema: bool, memory: int, others: int = 0) -> tuple[str, str]:
    """The strategy for several ranks, and why: ddp where the model fits on each, since it communicates least.

    Args:
        parameters: number of trained parameters.
        ema: whether there is an EMA copy of the weights.
        memory: memory of a rank's device in bytes.
        others: memory that frozen models take on each rank in bytes.

    Returns:
        `ddp` or `sharded`, and the reason in a sentence.
    """
    each = sum(v for name, v in BYTES_PER_PARAMETER.items() if ema or name != "EMA")
    needed = parameters * each + others
    what = ", ".join(name for name in BYTES_PER_PARAMETER if ema or name != "EMA")
    fits = needed <= SHARE * memory
    return ("ddp" if fits else "sharded"), (
        f"{what} of {parameters / 1e6:,.1f}M parameters and frozen models take {needed / 1e9:,.1f} GB, "
        f"{'within' if fits else 'above'} {SHARE:.0%} of a device's {memory / 1e9:,.1f} GB"
    )
