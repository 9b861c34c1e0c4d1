"""ShardData under Lightning: batches, resume, ranks and workers, seen by the keys a model is shown."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from lidit.data.datamodule import Batch, ShardData
from lidit.data.index import ShardIndex
from tests.data.conftest import QUIET, Witness, batches, fit


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_shows_what_an_uninterrupted_one_shows(shards: Path, tmp_path: Path, workers: int) -> None:
    settings = {"train": str(shards), "batch_size": 8, "num_workers": workers}
    whole = fit(ShardData(**settings), tmp_path / "whole", 15).seen
    first = fit(ShardData(**settings), tmp_path / "parts", 6).seen
    rest = fit(ShardData(**settings), tmp_path / "parts", 15).seen
    assert len(whole) == 15  # more than two epochs of seven batches
    assert first + rest == whole


def test_a_run_that_broke_down_shows_the_broken_batch_again(shards: Path, tmp_path: Path) -> None:
    settings = {"train": str(shards), "batch_size": 8}
    whole = fit(ShardData(**settings), tmp_path / "whole", 9).seen
    with pytest.raises(InterruptedError):
        fit(ShardData(**settings), tmp_path / "parts", 9, fail_at=4)
    assert fit(ShardData(**settings), tmp_path / "parts", 9).seen == whole[4:]


def test_lightnings_epochs_do_not_start_the_data_again(shards: Path, tmp_path: Path) -> None:
    settings = {"train": str(shards), "batch_size": 8}
    whole = fit(ShardData(**settings), tmp_path / "whole", 12).seen
    model = Witness()
    Trainer(max_epochs=4, limit_train_batches=3, enable_checkpointing=False, **QUIET).fit(model, ShardData(**settings))
    assert model.seen == whole


def test_workers_do_not_change_the_batches(shards: Path) -> None:
    settings = {"train": str(shards), "batch_size": 8, "caption_dropout": 0.3}
    alone = batches(ShardData(**settings), 10)
    for a, b in zip(alone, batches(ShardData(**settings, num_workers=2), 10), strict=True):
        assert (a.key, a.prompt) == (b.key, b.prompt)
        assert torch.equal(a.image, b.image)


def train_rank(rank: int, port: int, shards: str, folder: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": port}.items():
            patch.setenv(name, str(value))
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        torch.set_num_threads(1)
        data = ShardData(shards, batch_size=8)
        model = fit(data, Path(folder), 10, strategy="ddp", devices=2, use_distributed_sampler=False)
        torch.save(model.seen, f"{folder}/{rank}.pt")


def test_two_processes_show_the_global_batches_of_one_and_resume_its_checkpoint(shards: Path, tmp_path: Path) -> None:
    whole = fit(ShardData(str(shards), batch_size=8), tmp_path / "whole", 10).seen
    fit(ShardData(str(shards), batch_size=8), tmp_path / "parts", 3)
    arguments = (29_500 + time.monotonic_ns() % 2000, str(shards), str(tmp_path / "parts"))
    processes = torch.multiprocessing.start_processes(train_rank, arguments, 2, join=False, start_method="fork")
    deadline = time.monotonic() + 60
    while not processes.join(timeout=1):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail("two processes hang")
    ranks = [torch.load(tmp_path / "parts" / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole[3:]


def test_pixels_are_in_range_and_shaped_alike(shards: Path) -> None:
    data = ShardData(str(shards), batch_size=4)
    seen = batches(data, 10)
    assert {tuple(batch.image.shape) for batch in seen} == {(4, 3, 64, 64), (4, 3, 64, 96)}
    assert all(batch.image.dtype == torch.float32 and batch.latent is None and batch.features is None for batch in seen)
    index = ShardIndex(str(shards))
    pixels = index.image(int(seen[0].key[0]))  # keys are numbers here
    assert torch.equal(seen[0].image[0], torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1)


def test_pixels_travel_as_bytes_and_reach_the_step_as_numbers_around_zero(shards: Path) -> None:
    data = ShardData(str(shards), batch_size=4)
    data.setup("fit")
    raw = next(iter(data.train_dataloader())).image
    assert (raw.dtype, raw.shape[1]) == (torch.uint8, 3)

    class Look(Witness):
        def training_step(self, batch: Batch, i: int) -> torch.Tensor:
            assert torch.equal(batch.image, raw.float() / 127.5 - 1)
            return super().training_step(batch, i)

    Trainer(max_steps=1, enable_checkpointing=False, **QUIET).fit(Look(), data)


def test_a_batch_shows_one_kind_of_caption_and_drops_some(shards: Path) -> None:
    index, kinds, dropped = ShardIndex(str(shards)), set(), 0
    for batch in batches(ShardData(str(shards), batch_size=8, caption_dropout=0.25), 21):
        kept = [(index.text(int(key)), prompt) for key, prompt in zip(batch.key, batch.prompt, strict=True) if prompt]
        shown = {"dense" if prompt == text["dense"] else "caption" for text, prompt in kept}
        assert len(shown) == 1
        assert all(prompt in (text["dense"], text["caption"]) for text, prompt in kept)
        kinds |= shown
        dropped += len(batch.key) - len(kept)
    assert kinds == {"dense", "caption"}
    assert 20 <= dropped <= 65  # of 168, expected 42


def test_validation_shows_every_sample_once_in_a_fixed_order_without_dropping(shards: Path, tmp_path: Path) -> None:
    data = ShardData(str(shards), val=str(shards), batch_size=8, caption_dropout=1.0)
    model = fit(data, tmp_path, 4, val_check_interval=2, num_sanity_val_steps=0)
    first, second = model.validated[:60], model.validated[60:]
    assert first == second
    assert len({entry.split()[0] for entry in first}) == 60
    assert all(len(entry.split()) > 1 for entry in first)
    assert all(prompt.split(" ", 1)[1] == "" for batch in model.seen for prompt in batch)


def test_a_checkpoint_of_another_order_is_refused_with_the_difference(shards: Path, tmp_path: Path) -> None:
    fit(ShardData(str(shards), batch_size=8), tmp_path, 3)
    with pytest.raises(ValueError, match="batch_size was 8 and is 4; seed was 0 and is 1"):
        fit(ShardData(str(shards), batch_size=4, seed=1), tmp_path, 6)


def test_a_checkpoint_over_other_shards_is_refused(shards: Path, tmp_path: Path) -> None:
    fit(ShardData(str(shards), batch_size=8), tmp_path, 3)
    with pytest.raises(ValueError, match="shards was"):
        fit(ShardData(f"{shards}/{{00000..00002}}.tar", batch_size=8), tmp_path, 6)


def test_validating_a_checkpoint_does_not_mind_another_batch_size(shards: Path, tmp_path: Path) -> None:
    fit(ShardData(str(shards), batch_size=8), tmp_path, 3)
    data, model = ShardData("not/there", val=str(shards), batch_size=4), Witness()
    Trainer(**QUIET).validate(model, data, ckpt_path=str(tmp_path / "last.ckpt"), verbose=False, weights_only=True)
    assert len(set(model.validated)) == len(model.validated) == 60


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_epochs": 3}, "set trainer.max_steps .once through it is 7 batches"),
        ({"max_steps": 3}, "set trainer.val_check_interval"),
        ({"max_steps": 3, "overfit_batches": 1}, "overfit_batches does not work"),
    ],
)
def test_trainer_settings_that_cannot_be_honoured_are_refused(shards: Path, settings: dict, reason: str) -> None:
    data = ShardData(str(shards), val=str(shards), batch_size=8)
    trainer = Trainer(num_sanity_val_steps=0, enable_checkpointing=False, **QUIET | settings)
    with pytest.raises(ValueError, match=reason):
        trainer.fit(Witness(), data)


def test_the_report_says_what_an_epoch_is(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match="20 images of 96x64 are never shown"):
        batches(ShardData(str(shards), batch_size=32), 1)
    assert "40 of 64x64, 20 of 96x64" in caplog.text
    assert "an epoch is 1 batches of 32 and leaves out 28 samples" in caplog.text


def test_a_pipe_reaches_training_only_when_it_is_allowed(shards: Path) -> None:
    command = f"pipe:cat {shards}/00000.tar"
    with pytest.raises(ValueError, match="allow_commands"):
        batches(ShardData(command, batch_size=4), 1)
    assert len(batches(ShardData(command, batch_size=4, allow_commands=True), 2)) == 2


def test_a_truncated_shard_stops_before_training(shards: Path, tmp_path: Path) -> None:
    tar = tmp_path / "00000.tar"
    tar.write_bytes((shards / "00000.tar").read_bytes()[:9000])
    with pytest.raises(ValueError, match="00000.tar is truncated"):
        fit(ShardData(str(tar), batch_size=4), tmp_path / "run", 2)


def test_without_validation_shards_there_is_no_validation(shards: Path) -> None:
    data = ShardData(str(shards), batch_size=8)
    data.setup("fit")
    assert data.val_dataloader() == []
    assert isinstance(data.train_dataloader(), DataLoader)


def test_test_shards_are_shown_like_validation_ones_and_must_be_named(shards: Path) -> None:
    data = ShardData(str(shards), val=str(shards), test=str(shards), batch_size=16)
    data.setup("test")
    shown = [key for batch in data.test_dataloader() for key in batch.key]
    data.setup("validate")
    assert shown == [key for batch in data.val_dataloader() for key in batch.key]
    assert len(shown) == len(set(shown)) > 0
    with pytest.raises(ValueError, match=r"no test shards; name them as data\.test"):
        ShardData(str(shards)).setup("test")


def test_a_batch_moves_to_a_device_whole(shards: Path) -> None:
    data = ShardData(str(shards), batch_size=4)
    (batch,) = batches(data, 1)
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert isinstance(moved, Batch)
    assert (moved.key, moved.image.device.type) == (batch.key, "meta")


class Position(Callback):
    """Reads the data module's state at the end of each step."""

    def __init__(self) -> None:
        self.states: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self.states.append(trainer.datamodule.state_dict()["batches"])


def test_the_position_counts_batches_also_while_gradients_accumulate(shards: Path) -> None:
    position = Position()
    trainer = Trainer(max_steps=3, accumulate_grad_batches=2, callbacks=[position], enable_checkpointing=False, **QUIET)
    trainer.fit(Witness(), ShardData(str(shards), batch_size=8))
    assert position.states == [1, 2, 3, 4, 5, 6]
