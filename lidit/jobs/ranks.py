"""Which of how many processes this one is, as torchrun or Slurm's srun say in its environment."""

from __future__ import annotations

import os


def share(rank: int | None = None, world: int | None = None) -> tuple[int, int]:
    """This process's number, and how many share the work: as given, else torchrun's, else those of `srun`, else alone.

    Args:
        rank: this process's number, from 0.
        world: how many there are.

    Raises:
        ValueError: only one of them is given, or they do not fit together.
    """
    if (rank is None) != (world is None):
        raise ValueError(f"rank is {rank} and world is {world}; give both, or neither under torchrun or srun")
    if rank is None or world is None:
        rank, world = _launched()
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank} and world is {world}; rank counts from 0 to world - 1")
    return rank, world


def is_task() -> bool:
    """Whether srun has started this process. The script of a job is told of its tasks too, but it is alone."""
    return "SLURM_STEP_ID" in os.environ


def on_node() -> int | None:
    """This process's number among those of its machine; None: no launcher has given it one."""
    local = os.environ.get("LOCAL_RANK") or (os.environ.get("SLURM_LOCALID") if is_task() else None)
    return int(local) if local else None


def _launched() -> tuple[int, int]:
    for names in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS") if is_task() else ()):
        values = [os.environ.get(name) for name in names]
        if values and all(values):
            return int(values[0] or 0), int(values[1] or 1)
    return 0, 1
