"""`lidit study serve`: begin a study, or go on with one, and serve its pages."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Literal

from lidit.listen import address, listening
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
    """Serve a blind pairwise comparison of folders of pictures; with no folders, go on with the study in --out.

    Args:
        images: two or more folders of pictures on the same prompts, as NAME=FOLDER; raters never see the names.
        out: folder of the study: copies of the pictures, and the votes.
        host: address to listen on; 0.0.0.0 lets other machines in.
        port: to listen on; 0 takes a free one.
        against: all, the default: every two models are compared; first: the first with each other, as in the paper.
        contact: who runs the study, for the first page.

    Raises:
        ValueError: the folders cannot be compared, the study was begun with others, or the port is taken.
    """
    folder = Path(out)
    server = listening(host, port)  # before pictures are copied in vain
    if not is_begun(folder):
        competitors = read_competitors(images or [])
        print(describe(competitors))
        begin(folder, competitors, against or "all")
    store = Store(folder)
    _see_same(store, images, against)
    pairs = sum(store.matches().values())
    print(f"{folder}: {pairs} pairs of {', '.join(store.models())}; raters open {address(server)}", flush=True)
    print("ctrl-C ends it; the same command goes on; `lidit study report` counts the votes, also meanwhile", flush=True)
    _run(store, server, contact)


def _see_same(store: Store, images: list[str] | None, against: str | None) -> None:
    """Refuse what is not as the study was begun."""
    then = store.models()
    if images and {name: str(path.resolve()) for name, path in name_folders(images).items()} != then:
        begun = " ".join(f"{name}={folder}" for name, folder in then.items())
        raise ValueError(f"{store.folder} was begun with {begun}; name no folders to go on, or another --out")
    if against not in (None, store.settings["against"]):
        raise ValueError(f"{store.folder} was begun with --against {store.settings['against']}; take another --out")


def _run(store: Store, server: socket.socket, contact: str) -> None:
    """Serve until ctrl-C.

    Raises:
        ValueError: the packages that do it are not installed.
    """
    try:
        import uvicorn

        from lidit.study.page import application
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; pip install 'lidit[study]'") from None
    # no log of requests: it would hold raters' addresses beside the times of their votes
    config = uvicorn.Config(application(store, contact), access_log=False, log_level="warning", server_header=False)
    uvicorn.Server(config).run(sockets=[server])
