"""Lets several processes fill one folder: which part each does, and how it writes without waiting for another.

There is no process group, so no collective can time out while one process computes for an hour, and any number of
processes may start, stop and continue at different times.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from lidit.data.index import differences
from lidit.whole import is_partial, write_first


def share(rank: int | None = None, world: int | None = None) -> tuple[int, int]:
    """This process's number and the number of processes: as given, or torchrun's, or srun's, or else 0 and 1.

    Args:
        rank: this process's number, from 0.
        world: number of processes that share the work.

    Raises:
        ValueError: only one of the two is given, or rank is not below world.
    """
    if (rank is None) != (world is None):
        raise ValueError(f"rank is {rank} and world is {world}; give both, or neither under torchrun or srun")
    if rank is None or world is None:
        rank, world = _launched()
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank} and world is {world}; rank counts from 0 to world - 1")
    return rank, world


def _launched() -> tuple[int, int]:
    """The launcher's numbers. A Slurm job's script sees its number of tasks, but runs alone until it calls srun."""
    in_script = "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ
    for names in (("RANK", "WORLD_SIZE"), () if in_script else ("SLURM_PROCID", "SLURM_NTASKS")):
        values = [os.environ.get(name, "") for name in names]
        if values and all(values):
            return int(values[0]), int(values[1])
    return 0, 1


def own_device(device: str) -> str:
    """This process's own GPU for `cuda` if a node runs several processes; any other device as it is."""
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
    if device != "cuda" or not local:
        return device
    from torch.cuda import device_count

    return f"cuda:{int(local) % max(1, device_count())}"  # Slurm may show each task only one GPU


def begin(folder: Path, name: str, made: dict, more: dict, fix: str) -> None:
    """Start or continue a folder, whose file `name` says how it was made.

    If several processes begin at the same time, one of them writes that file, and no other sees a part of it.

    Args:
        folder: the folder, made if it is missing.
        name: name of the file.
        made: the settings that must be the same to continue.
        more: what else the file holds.
        fix: what to do if the settings differ, for the message.

    Raises:
        ValueError: the folder was made with other settings, or holds files that are not ours.
    """
    manifest, made = folder / name, json.loads(json.dumps(made))
    folder.mkdir(parents=True, exist_ok=True)
    if not manifest.is_file():
        strange = any(not is_partial(file) for file in folder.iterdir())
        if strange and not manifest.is_file():  # another process may have begun just now
            raise ValueError(f"{folder} is not empty and was not begun by this command; {fix}")
        write_first(manifest, json.dumps(made | more, indent=1))
    if differ := differences(json.loads(manifest.read_text()), made):
        raise ValueError(f"{folder} holds other data: {'; '.join(differ)}; {fix}")
