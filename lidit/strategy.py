"""The strategy `sharded`: FSDP2 through Lightning, for models that no single device holds.

It adds what Lightning's `ModelParallelStrategy` lacks: the mesh (also replicated over nodes and sharded within), the
initial weights that one process would have, gradients that are accumulated as shares, and averaged weights
in checkpoints. `chosen_strategy` chooses it where a recipe names no strategy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lidit.callbacks.ema import EMA
from lidit.callbacks.samples import FixedPrompts
from lidit.checkpoint import META, record
from lidit.data.cache import has_features
from lidit.module import TextToImage
from lidit.parallel import choose, hold_back_all_reduce, shard, spread, units

NAME = "sharded"
COMPUTE = {"bf16-mixed": torch.bfloat16}  # dtype of gathered weights for a precision; float32 otherwise


class Sharded(ModelParallelStrategy):
    """FSDP2 over all ranks, or over groups of them.

    Args:
        replicate: number of copies of the model; neighbouring ranks share the weights of a copy (HSDP). 1 spreads one
            copy over all ranks; the number of nodes keeps the exchange of weights within each node.
        timeout: seconds that a rank waits for the others before it gives up.

    Raises:
        ValueError: the number of copies does not divide the number of ranks.
    """

    def __init__(self, replicate: int = 1, timeout: float = default_pg_timeout.total_seconds()):
        super().__init__(tensor_parallel_size=1, timeout=timedelta(seconds=timeout))
        self.replicate = replicate

    def setup_environment(self) -> None:
        """Start the process group and make the device mesh."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        shares, rest = divmod(self.world_size, self.replicate)
        if self.replicate < 1 or rest:
            raise ValueError(
                f"replicate is {self.replicate}, which does not divide the {self.world_size} ranks; choose a divisor"
            )
        sizes = {"replicate": self.replicate, "shard": shares} if self.replicate > 1 else {"shard": shares}
        self.mesh = init_device_mesh(self.root_device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Let rank 0 build the model; the other ranks get their shares of it later."""
        with nullcontext() if self.global_rank == 0 else torch.device("meta"):
            yield

    def setup(self, trainer: Trainer) -> None:
        """Shard the built model, then do all that Lightning does."""
        model = self.lightning_module
        whole = model.state_dict() if self.global_rank == 0 else {}
        shard(units(model.backbone, model.prompt_encoder), self.mesh, COMPUTE.get(trainer.precision, torch.float32))
        spread(model, whole, self.root_device)
        super().setup(trainer)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Accumulate gradients without exchange between copies; Lightning holds back what DDP exchanges alone."""
        hold_back_all_reduce(self.model, True)
        try:
            yield
        finally:
            hold_back_all_reduce(self.model, False)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint as a folder, into which each rank writes its shares.

        Args:
            checkpoint: the checkpoint as Lightning makes it; its sharded tensors are taken out of it.
            filepath: path of the folder.
            storage_options: not supported.
        """
        path = Path(self.broadcast(filepath))
        path.mkdir(parents=True, exist_ok=True)
        optimizers = checkpoint.pop("optimizer_states", [])
        tensors = {"state_dict": checkpoint.pop("state_dict"), "callbacks": shares(checkpoint.get("callbacks", {}))}
        tensors |= {f"optimizer_{i}": state for i, state in enumerate(optimizers)}
        dcp.save(tensors, checkpoint_id=path)  # if one rank fails, all fail
        if self.is_global_zero:
            torch.save(without_shares(checkpoint), path / META)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint that any strategy and number of ranks wrote; each rank reads its shares.

        Raises:
            ValueError: the checkpoint is incomplete, or of another architecture.
        """
        path = Path(self.broadcast(checkpoint_path))
        self.lightning_module.check_checkpoint(path)
        for callback in self.lightning_module.trainer.callbacks:
            if isinstance(callback, EMA) and not callback.average:  # shares for the checkpoint to be read into
                callback.begin(self.lightning_module)
        if path.is_file():
            return self._load_file(record(path))
        checkpoint = super().load_checkpoint(path, weights_only)
        saved = checkpoint.get("callbacks", {})
        present = {c.state_key: c for c in self.lightning_module.trainer.callbacks if c.state_key in saved}
        if callbacks := shares({key: callback.state_dict() for key, callback in present.items()}):
            dcp.load({"callbacks": callbacks}, checkpoint_id=path)
            for key, found in callbacks.items():
                saved[key] |= found
        return checkpoint

    def _load_file(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Spread a file of one process or DDP over the ranks; Lightning would mix up the order of AdamW's moments."""
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=options)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        states = checkpoint["optimizer_states"] if self.optimizers else []  # validation has no optimizer
        for optimizer, state in zip(self.optimizers, states, strict=True):
            now = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
            named = {
                "state": {now[i]: moments for i, moments in state["state"].items()},
                "param_groups": [g | {"params": [now[i] for i in g["params"]]} for g in state["param_groups"]],
            }
            set_optimizer_state_dict(self.model, optimizer, named, options=options)
        return checkpoint


def shares(callbacks: dict[str, dict]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """The dictionaries of sharded tensors in the callbacks' states."""
    found = {
        key: {name: value for name, value in state.items() if _is_sharded(value)} for key, state in callbacks.items()
    }
    return {key: state for key, state in found.items() if state}


def without_shares(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint without the dictionaries of sharded tensors in its callbacks' states."""
    callbacks = {
        key: {name: value for name, value in state.items() if not _is_sharded(value)}
        for key, state in checkpoint.get("callbacks", {}).items()
    }
    return checkpoint | {"callbacks": callbacks}


def _is_sharded(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(tensor, DTensor) for tensor in value.values())


def chosen_strategy(model: TextToImage, given: Namespace) -> dict[str, str | Sharded]:
    """The strategy for several ranks or a sharded checkpoint, if the recipe names none; the reason is printed.

    Args:
        model: the model, which is not built yet.
        given: the recipe, with all classes but the trainer's instantiated.

    Returns:
        The Trainer's argument `strategy`, or nothing if the recipe or one rank decides it.

    Raises:
        ValueError: the recipe's strategy cannot read the checkpoint.
    """
    trainer, start = given.trainer, given.ckpt_path
    if trainer.strategy != "auto":
        sharded = trainer.strategy == NAME or isinstance(trainer.strategy, Sharded)
        if start and Path(start).is_dir() and not sharded:
            raise ValueError(f"{start} is of sharded weights; say --trainer.strategy {NAME}, on any number of ranks")
        return {}
    if start and Path(start).is_dir():
        rank_zero_info(f"Strategy {NAME}: {start} is of sharded weights.")
        return {"strategy": Sharded()}
    ranks = Trainer(
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    if ranks.world_size == 1:
        return {}
    parameters = sum(p.numel() for p in model.skeleton().parameters())
    ema = any(isinstance(callback, EMA) for callback in trainer.callbacks or [])
    loaded = [llm for llm in model.llms if not llm.sharded] if to_do_without(given, has_features) else []
    frozen = sum(llm.nbytes for llm in loaded)
    name, why = choose(parameters, ema, memory(ranks.strategy.root_device, ranks.num_devices), frozen)
    rank_zero_info(f"Strategy {name}: {why}. Say --trainer.strategy to choose yourself.")
    return {"strategy": Sharded() if name == NAME else name}


def to_do_without(given: Namespace, has: Callable[[Any], bool]) -> list[str]:
    """What a recipe must change so that it needs no frozen models of a kind; empty if it needs none already.

    Args:
        given: the recipe.
        has: whether a cache holds what such models compute.
    """
    found = [] if has(given.data.cache) else ["data.cache"]
    validates = given.data.val and given.trainer.limit_val_batches != 0
    found += ["data.val_cache"] if validates and not has(given.data.val_cache) else []
    drawing = [type(each).__name__ for each in given.trainer.callbacks or [] if isinstance(each, FixedPrompts)]
    return found + [f"no callback {name}" for name in dict.fromkeys(drawing)]


def memory(device: torch.device, ranks: int) -> int:
    """The memory of a rank's device in bytes; without a GPU the processes of a machine share its memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks


StrategyRegistry.register(NAME, Sharded, description=Sharded.__doc__.partition("\n")[0])
