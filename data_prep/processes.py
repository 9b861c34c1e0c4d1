"""Several processes that fill one folder: who does which part, and how it is begun without waiting for another.

No process group is opened: an hour of computing in one process lets no collective of another time out, and processes
may start, stop and continue at different times, in any number.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from lidit.data.index import differences
from lidit.whole import is_partial, write_first


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


def _launched() -> tuple[int, int]:
    """As a launcher says; the script of a Slurm job knows its number of tasks, but is alone until it calls srun."""
    in_script = "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ
    for names in (("RANK", "WORLD_SIZE"), () if in_script else ("SLURM_PROCID", "SLURM_NTASKS")):
        values = [os.environ.get(name, "") for name in names]
        if values and all(values):
            return int(values[0]), int(values[1])
    return 0, 1


def own_device(device: str) -> str:
    """`cuda` as the GPU of this process, where a node runs several; any other device as it is."""
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
    if device != "cuda" or not local:
        return device
    from torch.cuda import device_count

    return f"cuda:{int(local) % max(1, device_count())}"  # Slurm may show each task one GPU alone


def begin(folder: Path, name: str, made: dict, more: dict, fix: str) -> None:
    """Start or continue a folder: its file `name` says how it was made, and whatever `more` follows from that.

    Of processes that begin at once one writes that file, whole from the first moment it is seen.

    Args:
        folder: made where it is missing.
        name: of the file.
        made: what must be the same to continue.
        more: what else the file holds.
        fix: what to do where it is not the same, for the message.

    Raises:
        ValueError: the folder was made otherwise or holds files that are not ours.
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
