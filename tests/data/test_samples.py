"""What cannot be read is left out, named and counted; every rank steps on, until it is too much."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lidit.data.datamodule import ShardData
from lidit.data.index import ShardIndex
from lidit.data.samples import Batch, Samples, Tally
from lidit.data.stream import Plans, StreamOrder

Break = Callable[..., Path]


@pytest.fixture
def broken(shards: Path, tmp_path: Path) -> Break:
    """A copy of the shards in which some samples' images (or texts) are zeros."""

    def make(samples: list[int], what: str = "image") -> Path:
        index, folder = ShardIndex(str(shards)), shutil.copytree(shards, tmp_path / "broken")
        for sample in samples:
            offset, size = (int(index.column(f"{what}_{n}")[sample]) for n in ("offset", "size"))
            with (folder / index.paths[index.place(sample)[0]].name).open("r+b") as file:
                file.seek(offset)
                file.write(bytes(size))
        return folder

    return make


def epoch(folder: Path, rank: int = 0, world: int = 1, batch_size: int = 8) -> list[Batch]:
    index = ShardIndex(str(folder), strict=False)
    order = StreamOrder(index, batch_size)
    plans = itertools.islice(Plans(order, rank, world), order.steps_per_epoch)
    return [Samples(index)[plan] for plan in plans]


@pytest.mark.parametrize(("what", "reason"), [("image", "image cannot be decoded"), ("text", "JSON cannot be read")])
def test_a_broken_sample_is_left_out_and_named_and_the_others_stay_where_they_were(
    shards: Path, broken: Break, what: str, reason: str
) -> None:
    whole, holed = epoch(shards), epoch(broken([5, 40], what))
    bad = {"00000005", "00000040"}
    assert [b.key for b in holed] == [[key for key in b.key if key not in bad] for b in whole]
    assert [b.prompt for b in holed] == [
        [p for key, p in zip(b.key, b.prompt, strict=True) if key not in bad] for b in whole
    ]
    assert [len(b.image) for b in holed] == [len(b.key) for b in holed]
    named = [line for b in holed for line in b.skipped]
    shown = bad & {key for b in whole for key in b.key}
    assert len(named) == len(shown) > 0
    assert all(any(f"sample {key}: the {reason}" in line for line in named) for key in shown)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_skip_what_one_rank_skips_and_all_of_them_step(broken: Break, world: int) -> None:
    folder = broken([3, 17, 18, 59])
    ranks = [epoch(folder, rank, world) for rank in range(world)]
    for whole, *parts in zip(epoch(folder), *ranks, strict=True):
        assert [key for part in parts for key in part.key] == whole.key
        assert [line for part in parts for line in part.skipped] == whole.skipped
        assert all(len(part.image) for part in parts)


def test_a_rank_of_which_nothing_can_be_read_shows_another_ranks_sample_and_says_so(
    shards: Path, broken: Break, caplog: pytest.LogCaptureFixture
) -> None:
    whole = epoch(shards)[0].key
    folder = broken([int(key) for key in (whole[0], whole[1], whole[2])])
    ranks = [epoch(folder, rank, 4)[0] for rank in range(4)]  # two samples each
    assert [rank.key for rank in ranks] == [[whole[3]], [whole[3]], whole[4:6], whole[6:]]
    assert [len(rank.skipped) for rank in ranks] == [2, 1, 0, 0]
    assert f"batch 0: no sample of this rank's share can be read; of another rank's it shows {whole[3]}" in caplog.text


def test_a_global_batch_of_which_nothing_can_be_read_stops_every_rank(shards: Path, broken: Break) -> None:
    folder = broken([int(key) for key in epoch(shards)[0].key])
    for rank in range(4):
        with pytest.raises(ValueError, match=r"no sample of global batch 0 can be read; the first reason: .*sample"):
            epoch(folder, rank, 4)


def test_latents_do_not_need_the_image(shards: Path, broken: Break) -> None:
    class Latents:
        has_latents = True

        def features(self, *_: object) -> None:
            return None

        def latents(self, samples: np.ndarray) -> torch.Tensor:
            return torch.zeros(len(samples), 4, 8, 8)

    index = ShardIndex(str(broken(list(range(60)))))
    samples = Samples(index)
    samples.cache = Latents()
    batch = samples[StreamOrder(index, 8).plan(0)]
    assert (len(batch.latent), batch.image, batch.skipped) == (8, None, [])


class Steps(LightningModule):
    """Trains on anything."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.keys: list[str] = []

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        self.keys += batch.key
        return (self.weight - batch.image.mean()) ** 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def train(folder: Path, steps: int, **settings: object) -> tuple[Steps, ShardData]:
    data, model = ShardData(str(folder), batch_size=4, **settings), Steps()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", max_steps=steps, enable_checkpointing=False, **quiet).fit(model, data)
    return model, data


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_and_says_at_the_end_what_it_skipped(
    broken: Break, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    model, data = train(broken([5, 40]), 30, num_workers=workers, max_skipped=0.1)  # two epochs
    assert len(model.keys) == 120 - 4
    assert data.skipped == 4
    assert caplog.text.count("skipped: ") == 2  # each is named once
    assert "4 of 120 samples skipped, for 2 reasons" in caplog.text


def test_a_shard_that_goes_under_way_is_named_once_and_its_samples_are_counted(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(shards, tmp_path / "copy")
    opened = ShardIndex.__init__

    def then_remove(index: ShardIndex, *arguments: object, **settings: object) -> None:
        opened(index, *arguments, **settings)
        (folder / "00002.tar").unlink()

    monkeypatch.setattr(ShardIndex, "__init__", then_remove)
    model, data = train(folder, 15, max_skipped=0.5)
    assert {int(key) for key in model.keys} == set(range(60)) - set(range(32, 48))
    assert data.skipped == 16
    assert caplog.text.count("skipped: shard ") == 1
    assert "00002.tar cannot be read" in caplog.text


def test_too_much_stops_the_run_with_the_count_and_a_reason(broken: Break) -> None:
    folder = broken(list(range(8)))
    with pytest.raises(ValueError, match=r"7 samples of this rank .* more than 10.00% .*max_skipped.*sample 0000000\d"):
        train(folder, 30, max_skipped=0.1)  # 6 of 60 are allowed


def test_by_default_a_hundredth_may_be_missing_and_nothing_where_zero_is_said(broken: Break) -> None:
    assert ShardData("x").max_skipped == 0.01
    with pytest.raises(ValueError, match="1 samples of this rank"):
        train(broken([5]), 30, max_skipped=0.0)


def batch(good: int, bad: int) -> Batch:
    return Batch(["k"] * good, ["p"] * good, skipped=[f"{i}" for i in range(bad)])


def test_the_share_is_of_an_epoch_until_more_has_been_read() -> None:
    tally = Tally(0.01)
    tally.expect(1000.0)
    tally.count(batch(0, 10))
    with pytest.raises(ValueError, match="11 samples"):
        tally.count(batch(7, 1))
    tally = Tally(0.01)
    tally.expect(1000.0)
    for _ in range(30):
        tally.count(batch(99, 1))
    assert (tally.read, tally.skipped, tally.reasons) == (3000, 30, {"0": 30})
    with pytest.raises(ValueError, match="32 samples"):
        tally.count(batch(0, 2))


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="max_skipped"):
        Tally(share)


def test_validation_skips_too(shards: Path, broken: Break) -> None:
    data = ShardData(str(shards), val=str(broken([5])), batch_size=8, max_skipped=0.1)
    data.setup("validate")
    shown = [data.on_after_batch_transfer(b, 0) for b in data.val_dataloader()]
    assert sorted(int(key) for b in shown for key in b.key) == [i for i in range(60) if i != 5]
    assert data.skipped == 1
