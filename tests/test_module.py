"""One tiny `lidit fit` through the real command: it learns, it saves what is trained alone, it resumes bit for bit."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch import Tensor

from lidit.cli import main
from lidit.data.datamodule import Batch
from lidit.fit import run
from lidit.models.chat import Prompts, Split
from lidit.models.prompt_encoder import PromptEncoder
from lidit.module import TextToImage
from lidit.parallel import Parallel
from lidit.pipeline import Pipeline, build, read


def history(folder: Path, column: str) -> dict[int, str]:
    """What a run logged, as text: equal text is equal bits."""
    (metrics,) = folder.rglob("metrics.csv")
    with metrics.open() as file:
        return {int(row["step"]): row[column] for row in csv.DictReader(file) if row[column]}


def trained(names: dict) -> set[str]:
    """The parts that the names of some tensors belong to."""
    return {name.split(".")[0] for name in names}


@pytest.fixture
def logs(tiny_checkpoint: Path) -> Path:
    return tiny_checkpoint.parents[1] / "logs"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path) -> dict:
    return torch.load(tiny_checkpoint, weights_only=True)


def test_the_loss_falls_on_one_repeated_batch(logs: Path) -> None:
    losses = [float(loss) for loss in history(logs, "val/loss").values()]  # the same noise and times each time
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.85 * losses[0]
    assert len(history(logs, "train/loss")) == 6


def test_the_run_keeps_its_whole_recipe(logs: Path, tiny_recipe: Path) -> None:
    (saved,) = logs.rglob("config.yaml")
    kept, given = yaml.safe_load(saved.read_text()), yaml.safe_load(tiny_recipe.read_text())
    assert kept["model"]["learning_rate"] == given["model"]["learning_rate"]
    assert kept["model"]["prompt_encoder"]["init_args"]["full_attention"] is True  # a default, said all the same


def test_a_checkpoint_holds_what_is_trained_and_nothing_frozen(checkpoint: dict) -> None:
    assert trained(checkpoint["state_dict"]) == {"prompt_encoder", "backbone"}
    average = checkpoint["callbacks"]["EMA"]["average"]
    statistics = checkpoint["state_dict"].keys() - average.keys()
    assert {name.rpartition(".")[2] for name in statistics} == {"batches", "center", "second_moment", "rotate"}
    (optimizer,) = checkpoint["optimizer_states"]
    assert len(optimizer["state"]) == len(average)


def test_the_frozen_models_are_no_part_of_the_module_tree(tiny_checkpoint: Path) -> None:
    model = Pipeline.load(str(tiny_checkpoint)).model
    model.encode_prompts(["a red circle"])
    model.vae.load()
    assert trained(dict(model.named_parameters())) == {"prompt_encoder", "backbone"}
    assert all(type(module).__module__.startswith(("lidit.", "torch.")) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_gradient_reaches_every_trained_parameter_and_no_frozen_one(tiny_checkpoint: Path) -> None:
    model = Pipeline.load(str(tiny_checkpoint), ema=False).model  # after some steps nothing is zero any more
    batch = Batch(["a", "b"], ["a red circle", "two blue squares"], image=torch.rand(2, 3, 32, 48) * 2 - 1)
    loss, _ = model.loss(batch, torch.Generator().manual_seed(0))
    loss.mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    frozen = [model.vae._model, *(llm._model for llm in model.llms)]
    assert all(p.grad is None and not p.requires_grad for part in frozen for p in part.parameters())


def test_load_from_checkpoint_rebuilds_the_model(tiny_checkpoint: Path, checkpoint: dict) -> None:
    model = TextToImage.load_from_checkpoint(tiny_checkpoint, map_location="cpu")
    assert all(torch.equal(p, checkpoint["state_dict"][name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("step", [3, 4])  # between two validations, and right before one
def test_a_resumed_run_has_the_losses_and_weights_of_an_uninterrupted_one(
    step: int, tiny_recipe: Path, tiny_checkpoint: Path, logs: Path, tmp_path: Path, checkpoint: dict
) -> None:
    resumed = tiny_checkpoint.with_name(f"step={step}.ckpt")
    elsewhere = [f"--trainer.logger.init_args.save_dir={tmp_path}", f"--trainer.callbacks.dirpath={tmp_path}"]
    assert main(["fit", "--config", str(tiny_recipe), "--ckpt_path", str(resumed), *elsewhere]) == 0
    for column in ("train/loss", "val/loss"):
        whole, rest = history(logs, column), history(tmp_path, column)
        assert rest == {at: loss for at, loss in whole.items() if at >= step}
    (last,) = tmp_path.rglob("step=6.ckpt")
    again = torch.load(last, weights_only=True)
    assert same(again["state_dict"], checkpoint["state_dict"])
    assert same(again["callbacks"]["EMA"]["average"], checkpoint["callbacks"]["EMA"]["average"])


def same(weights: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return weights.keys() == others.keys() and all(torch.equal(p, others[name]) for name, p in weights.items())


def test_a_checkpoint_of_another_architecture_is_not_resumed(
    tiny_recipe: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    changed = ["--model.backbone.init_args.depth=1", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    assert main(["fit", "--config", str(tiny_recipe), "--ckpt_path", str(tiny_checkpoint), *changed]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the checkpoint is of another architecture" in message
    assert "backbone.blocks.1." in message
    assert "use the recipe it was trained with" in message


@pytest.mark.parametrize(("content", "message"), [(b"half", "not a complete checkpoint"), (None, "not found")])
def test_a_checkpoint_that_is_missing_or_truncated_is_not_resumed(
    content: bytes | None, message: str, tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    place = tmp_path / "last.ckpt"
    if content:
        place.write_bytes(content)
    elsewhere = f"--trainer.logger.init_args.save_dir={tmp_path / 'logs'}"
    assert main(["fit", "--config", str(tiny_recipe), "--ckpt_path", str(place), elsewhere]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("lidit: error: ")
    assert message in said
    assert str(place) in said


def test_the_test_verb_measures_the_averaged_weights_as_validation_did(
    tiny_recipe: Path, tiny_checkpoint: Path, logs: Path, tmp_path: Path
) -> None:
    shards = yaml.safe_load(tiny_recipe.read_text())["data"]["val"]
    given = [f"--data.test={shards}", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    assert main(["test", "--config", str(tiny_recipe), "--ckpt_path", str(tiny_checkpoint), *given]) == 0
    assert list(history(tmp_path, "test/loss").values()) == list(history(logs, "val/loss").values())[-1:]


def test_a_run_that_starts_from_weights_begins_with_their_average_at_step_0(
    tiny_recipe: Path, tiny_checkpoint: Path, logs: Path, tmp_path: Path
) -> None:
    given = [f"--start_from={tiny_checkpoint}", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    given += [f"--trainer.callbacks.dirpath={tmp_path}", "--trainer.max_steps=2", "--model.learning_rate=0"]
    assert main(["fit", "--config", str(tiny_recipe), *given]) == 0
    assert list(history(tmp_path, "train/loss")) == [0, 1]
    (start,) = history(tmp_path, "val/loss").values()
    ended = float(list(history(logs, "val/loss").values())[-1])
    assert float(start) == pytest.approx(ended, rel=1e-3)  # whitening has measured two more batches


def test_weights_to_start_from_must_fit_and_leave_no_doubt(
    tiny_recipe: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture
) -> None:
    start = ["fit", "--config", str(tiny_recipe), f"--start_from={tiny_checkpoint}"]
    assert main([*start, "--model.backbone.init_args.depth=1"]) == 1
    assert "is of another architecture" in capsys.readouterr().err
    assert main([*start, f"--ckpt_path={tiny_checkpoint}"]) == 1
    assert "give one of them" in capsys.readouterr().err


def test_a_part_is_taken_whatever_the_rest_of_the_model_is(
    tiny_recipe: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    start = ["fit", "--config", str(tiny_recipe), "--start_part=backbone"]
    assert main([*start]) == 1
    assert "--start_part backbone is a part of a model; name the model with --start_from" in capsys.readouterr().err
    given = [*start, f"--start_from={tiny_checkpoint}", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    given += [f"--trainer.callbacks.dirpath={tmp_path}", "--trainer.max_steps=2", "--model.learning_rate=0"]
    refined = "--model.prompt_encoder.init_args.refiner_depth=1"  # not as the checkpoint's
    assert main([*given, refined]) == 0
    path = sorted(tmp_path.rglob("*.ckpt"))[-1]
    ours, theirs = read(str(path)).weights, read(str(tiny_checkpoint)).weights
    same = {name: torch.equal(ours[name], weight) for name, weight in theirs.items() if name in ours}
    assert all(equal for name, equal in same.items() if name.startswith("backbone."))
    assert not all(same.values())
    assert main([*given, "--model.backbone.init_args.depth=1"]) == 1
    assert "the backbone of" in (said := capsys.readouterr().err)
    assert "is of another architecture" in said


def test_a_setting_given_with_a_checkpoint_counts(tiny_recipe: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    given = ["--model.learning_rate=0.5", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    assert main(["fit", "--config", str(tiny_recipe), "--ckpt_path", str(tiny_checkpoint), *given]) == 0
    (saved,) = tmp_path.rglob("config.yaml")
    assert yaml.safe_load(saved.read_text())["model"]["learning_rate"] == 0.5


def test_features_made_before_give_the_loss_of_prompts_encoded_now(tiny_checkpoint: Path) -> None:
    model = Pipeline.load(str(tiny_checkpoint)).model
    prompts, image = ["a red circle", ""], torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made = {"features": model.encode_prompts(prompts), "latent": model.vae.load().encode(image)}
    online, cached = (
        model.loss(batch, torch.Generator().manual_seed(1))[0]
        for batch in (Batch(["a", "b"], prompts, image=image), Batch(["a", "b"], prompts, **made))
    )
    assert torch.equal(online, cached)


class OfRank(Trainer):
    """What a model asks its trainer for, in the process of a rank that has trained on so many batches."""

    def __init__(self, rank: int, ranks: int, batches: int):
        self.ranks = {"rank": rank, "num_replicas": ranks}
        total = SimpleNamespace(processed=batches)
        self.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=total)))

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        return self.ranks


@pytest.mark.parametrize("passes", [1, 2], ids=["at once", "accumulated"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_sample_has_the_same_loss_on_any_number_of_ranks(ranks: int, passes: int, tiny_checkpoint: Path) -> None:
    model, latent = Pipeline.load(str(tiny_checkpoint)).model, torch.zeros(8, 4, 4, 4)
    features = model.encode_prompts(["a red circle"] * 8)

    def losses(rank: int, ranks: int, batches: int, size: int) -> Tensor:
        model._trainer = OfRank(rank, ranks, batches)
        own = [tuple(part[:size] for part in llm) for llm in features]
        batch = Batch(["key"] * size, ["a red circle"] * size, latent=latent[:size], features=own)
        return model.loss(batch, model._draws(batch))[0].detach()

    whole, size = losses(0, 1, 5, 8), 8 // ranks // passes
    parts = [losses(rank, ranks, 5 * passes + i, size) for i in range(passes) for rank in range(ranks)]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)
    assert len(whole.round(decimals=4).unique()) == 8


@pytest.fixture
def unbuilt(checkpoint: dict) -> TextToImage:
    return build({key: value for key, value in checkpoint["hyper_parameters"].items() if not key.startswith("_")})


@pytest.mark.parametrize(("timed", "compiled"), [(True, False), (False, False), (False, True)])
@torch.no_grad()
def test_text_that_is_the_same_at_every_time_is_encoded_once(
    tiny_checkpoint: Path, timed: bool, compiled: bool
) -> None:
    model = TextToImage.load_from_checkpoint(tiny_checkpoint).eval()
    if not timed:
        widths = [pool.in_features for pool in model.prompt_encoder.pool]
        model.prompt_encoder = PromptEncoder(widths, model.backbone.width, refiner_depth=0, fusion="concat").eval()
    features = model.encode_prompts(["a red circle", "a blue square"])
    x, t, calls = torch.randn(2, 4, 4, 4), torch.tensor([0.75, 0.75]), []
    expected = [model.predict(x, time, features) for time in (t, t / 2)]
    assert (expected[0] - expected[1]).abs().max() > 0
    model.prompt_encoder.register_forward_hook(lambda *_: calls.append(1))
    Parallel(compile=compiled, compile_backend="eager").apply(model.backbone)
    predict = model.predictor(features)
    for time, prediction in zip((t, t / 2), expected, strict=True):
        torch.testing.assert_close(predict(x, time), prediction)
    assert len(calls) == (2 if timed else 1)


def test_nothing_is_built_before_training_asks_for_it(unbuilt: TextToImage) -> None:
    assert unbuilt.backbone is None
    assert unbuilt.state_dict() == {}
    unbuilt.configure_model()
    built = unbuilt.backbone
    unbuilt.configure_model()
    assert unbuilt.backbone is built


def test_the_learning_rate_warms_up_and_then_stays(unbuilt: TextToImage) -> None:
    unbuilt.warmup_steps = 4
    assert [unbuilt.rate(step) for step in (0, 1, 3, 4, 1000)] == [0.25, 0.5, 1.0, 1.0, 1.0]


def test_matrices_decay_and_vectors_do_not(unbuilt: TextToImage) -> None:
    unbuilt.configure_model()
    matrices, vectors = unbuilt.configure_optimizers()["optimizer"].param_groups
    assert matrices["weight_decay"] == unbuilt.weight_decay > 0
    assert vectors["weight_decay"] == 0
    assert all(p.ndim > 1 for p in matrices["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(unbuilt.parameters()))


def test_only_the_named_parts_are_trained(tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = ["fit", "--config", str(tiny_recipe), f"--trainer.logger.init_args.save_dir={tmp_path}"]
    given += [f"--trainer.callbacks.dirpath={tmp_path}", "--model.learning_rate=0.1"]
    assert main([*given, "--model.trained=[prompt_encoder]", "--trainer.max_steps=2"]) == 0
    paths = sorted(tmp_path.rglob("step=[12].ckpt"))
    first, last = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
    assert first.keys() == last.keys()
    moved = {name.split(".")[0] for name in first if not torch.equal(first[name], last[name])}
    assert moved == {"prompt_encoder"}
    assert main([*given, "--model.trained=[promt_encoder]"]) == 1
    assert "model.trained names 'promt_encoder', which is in no weight's name" in capsys.readouterr().err


def test_the_processes_that_read_data_tokenise_captions_and_training_is_the_same(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []  # of the tokenizers in this process
    split = Prompts.split

    def watched(self: Prompts, prompt: str) -> Split:
        asked.extend([prompt] if prompt not in self.known else [])
        return split(self, prompt)

    monkeypatch.setattr(Prompts, "split", watched)
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path)}}
    more = ["--trainer.callbacks", "[]", "--trainer.logger", yaml.safe_dump(logger), "--trainer.max_steps", "2"]
    losses, counts = [], []
    for workers in ("0", "1"):
        asked.clear()
        argv = ["--config", str(tiny_recipe), *more, "--trainer.limit_val_batches", "0", "--data.num_workers", workers]
        losses.append(run("fit", argv).trainer.callback_metrics["train/loss"].item())
        counts.append(len(asked))
    assert losses[0] == losses[1]
    assert counts[0] >= 2 * 2 * 16  # two LLMs, two steps, 16 captions
    assert counts[1] == 0
