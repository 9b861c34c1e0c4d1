"""Lets several processes fill one folder: how it is begun without waiting for another, and who takes which GPU.

There is no process group, so no collective can time out while one process computes for an hour, and any number of
processes may start, stop and continue at different times.
"""

from __future__ import annotations

import json
from pathlib import Path

from lidit.data.index import differences
from lidit.disk.whole import is_partial, write_first
from lidit.jobs.ranks import on_node


def own_device(device: str) -> str:
    """This process's own GPU for `cuda` if a node runs several processes; any other device as it is."""
    if device != "cuda" or (number := on_node()) is None:
        return device
    from torch.cuda import device_count

    return f"cuda:{number % max(1, device_count())}"  # Slurm may show each task one GPU alone


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
