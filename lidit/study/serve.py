"""`lidit study serve`: begin a study, or continue one, and serve its pages."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Literal

from lidit.pages.listen import address, listening
from lidit.study.begin import begin
from lidit.study.collect import describe, name_folders, read_competitors
from lidit.study.store import Store, is_begun


def serve(
    images: list[str] | None = None,
    out: str = "runs/study",
    host: str = "127.0.0.1",
    port: int = 8000,
    against: Literal["all", "first"] | None = None,
    contact: str = "",
) -> None:
    """Serve a blind pairwise comparison of folders of pictures; without folders, continue the study in --out.

    Args:
        images: two or more folders of pictures on the same prompts, as NAME=FOLDER; raters never see the names.
        out: the study's folder, with copies of the pictures and the votes.
        host: address to listen on; 0.0.0.0 lets other machines in.
        port: port to listen on; 0 takes a free one.
        against: `all` (the default) compares every two models, `first` the first with each other one, as in the paper.
        contact: who runs the study, named on the first page.

    Raises:
        ValueError: the folders cannot be compared, the study was begun with other folders, or the port is taken.
    """
    folder = Path(out)
    server = listening(host, port)  # first: a taken port should not cost copies of pictures
    if not is_begun(folder):
        competitors = read_competitors(images or [])
        print(describe(competitors))
        begin(folder, competitors, against or "all")
    store = Store(folder)
    _check_same(store, images, against)
    pairs = sum(store.matches().values())
    print(f"{folder}: {pairs} pairs of {', '.join(store.models())}; raters open {address(server)}", flush=True)
    print("Ctrl-C stops it, the same command continues it; `lidit study report` counts votes at any time", flush=True)
    _run(store, server, contact)


def _check_same(store: Store, images: list[str] | None, against: str | None) -> None:
    """Refuse folders or settings other than those that the study was begun with."""
    own = store.models()
    if images and {name: str(path.resolve()) for name, path in name_folders(images).items()} != own:
        begun = " ".join(f"{name}={folder}" for name, folder in own.items())
        raise ValueError(f"{store.folder} was begun with {begun}; name no folders to continue it, or use another --out")
    if against not in (None, store.settings["against"]):
        raise ValueError(f"{store.folder} was begun with --against {store.settings['against']}; use another --out")


def _run(store: Store, server: socket.socket, contact: str) -> None:
    """Serve until ctrl-C.

    Raises:
        ValueError: the packages for it are not installed.
    """
    try:
        import uvicorn

        from lidit.study.page import application
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; pip install 'lidit[study]'") from None
    # no log of requests: it would show raters' addresses beside the times of their votes
    config = uvicorn.Config(application(store, contact), access_log=False, log_level="warning", server_header=False)
    uvicorn.Server(config).run(sockets=[server])
