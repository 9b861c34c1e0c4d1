"""A small set of shards with two image shapes, a server that can be made to fail, and a model that remembers."""

from __future__ import annotations

import functools
import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from data_prep.shard import shard
from lidit.data.datamodule import Batch, ShardData
from lidit.data.index import ShardIndex

COUNT = 60  # 40 of 64x64 and 20 of 96x64, in four shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    shard(str(folder), count=COUNT, sizes=("64x64", "64x64", "96x64"), shard_size=16, workers=1)
    return folder


class Table(ShardIndex):
    """The columns of many samples in shards of a thousand that are not there."""

    def __init__(self, count: int, dense: float = 1.0, widths: tuple[int, ...] = (256, 320)) -> None:  # reads nothing
        rng = np.random.default_rng(0)
        self.columns = {
            "height": np.full(count, 256),
            "width": rng.choice(widths, count),
            "caption_chars": rng.integers(10, 200, count),
            "dense_chars": (rng.random(count) < dense) * 90,
        }
        self.starts = np.arange(0, count + 1000, 1000).clip(max=count)
        self.paths = [Path("none.tar")] * (len(self.starts) - 1)

    def column(self, name: str) -> np.ndarray:
        return self.columns[name]


class Server(ThreadingHTTPServer):
    """Serves a folder, with ranges, and counts what it is asked for.

    `fail` maps a file's name to how many requests for it are answered badly, and `how`: an HTTP status, or "short" for
    a body that breaks off.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.fail: dict[str, int] = {}
        self.how: int | str = 503
        self.asked: Counter[str] = Counter()  # for whole files
        self.parts: Counter[str] = Counter()  # for ranges


class Handler(SimpleHTTPRequestHandler):
    """One request."""

    server: Server

    def do_GET(self) -> None:
        name, span = self.path.rpartition("/")[2], self.headers.get("Range")
        (self.server.parts if span else self.server.asked)[name] += 1
        if self.server.fail.get(name, 0) > 0:
            self.server.fail[name] -= 1
            self.fail_as(self.server.how)
        elif span:
            first, last = map(int, span.removeprefix("bytes=").split("-"))
            self.answer(206, Path(self.translate_path(self.path)).read_bytes()[first : last + 1])
        else:
            super().do_GET()

    def fail_as(self, how: int | str) -> None:
        if isinstance(how, int):
            self.send_error(how)
        else:
            data = Path(self.translate_path(self.path)).read_bytes()
            self.answer(200, data[: len(data) // 2], len(data))

    def answer(self, status: int, data: bytes, promised: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(promised or len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Quietly."""


@pytest.fixture
def server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Of the shards; who is turned away comes back soon."""
    monkeypatch.setattr("lidit.data.patience.PAUSES", (0.01, 0.02))
    with Server(shards) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.shutdown()


class Witness(LightningModule):
    """Remembers which samples it was shown."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []
        self.validated: list[str] = []
        self.fail_at = fail_at

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        if len(self.seen) == self.fail_at:
            raise InterruptedError
        self.seen.append([f"{k} {p}" for k, p in zip(batch.key, batch.prompt, strict=True)])
        return (self.weight - batch.image.mean()) ** 2

    def validation_step(self, batch: Batch, _: int) -> None:
        self.validated += [f"{k} {p}" for k, p in zip(batch.key, batch.prompt, strict=True)]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def fit(data: ShardData, folder: Path, steps: int, fail_at: int | None = None, **settings: object) -> Witness:
    """Train to `steps` in a folder, from its checkpoint where there is one; saves every third step."""
    model = Witness(fail_at)
    save = ModelCheckpoint(folder, every_n_train_steps=3, save_last="link", save_on_exception=True)
    trainer = Trainer(max_steps=steps, default_root_dir=folder, callbacks=[save], **QUIET | settings)
    trainer.fit(model, data, ckpt_path="last" if list(folder.glob("*.ckpt")) else None, weights_only=True)
    return model


def batches(data: ShardData, count: int) -> list[Batch]:
    data.setup("fit")
    return [data.on_after_batch_transfer(b, 0) for b in itertools.islice(data.train_dataloader(), count)]
