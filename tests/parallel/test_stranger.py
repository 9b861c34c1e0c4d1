"""A backbone, a prompt encoder and an objective of a stranger's own, in a file of their own, through every verb."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from lidit.cli import main
from lidit.models.contracts import Text, check_backbone, check_encoder, check_objective

MODULE = __name__


class OwnBackbone(nn.Module):
    """Knows nothing of lidit's: a pixelwise MLP that is told the text's mean and the time."""

    def __init__(self, channels: int, width: int = 24, depth: int = 2):
        super().__init__()
        self.width, self.patch = width, 1
        self.enter, self.leave = nn.Linear(channels, width), nn.Linear(width, channels)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)  # no checkpoint has it

    def forward(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        z = self.enter(x.movedim(1, -1)) + (text.pooled + t[:, None])[:, None, None]
        for block in self.blocks:
            z = z + self.scale * block(z).tanh()
        return self.leave(z).movedim(-1, 1)


class OwnEncoder(nn.Module):
    """The mean of all tokens of all LLMs; the text does not depend on the time."""

    timeless = True

    def __init__(self, llm_widths: list[int], width: int, slope: float = 0.1):
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(e, width) for e in llm_widths)
        self.slope = slope

    @property
    def units(self) -> list[nn.Module]:
        return list(self.project)

    def forward(self, features: list, t: Tensor) -> Text:
        tokens = torch.cat([layer(x.float()) for layer, (x, _, _) in zip(self.project, features, strict=True)], 1)
        tokens = nn.functional.leaky_relu(tokens, self.slope)
        mask = torch.cat([mask for _, mask, _ in features], 1)
        return Text(tokens, mask, (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


class OwnObjective:
    """A straight path at times of its own."""

    predicts = "velocity"

    def __init__(self, power: float = 2.0):
        self.power = power

    def loss(self, predict: Callable, x0: Tensor, generator: object = None) -> tuple[Tensor, Tensor]:
        t = torch.linspace(0.1, 0.9, len(x0), device=x0.device) ** self.power
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0.device)
        at = t[:, None, None, None]
        error = predict((1 - at) * x0 + at * noise, t) - (noise - x0)
        return error.square().flatten(1).mean(1), t

    def times(self, steps: int, latent_hw: tuple[int, int]) -> Tensor:
        return torch.linspace(1, 0, steps + 1)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t - t[:, None, None, None] * prediction


def own(name: str, **arguments: object) -> dict:
    return {"class_path": f"{MODULE}.{name}", "init_args": arguments}


PARTS = {
    "model__backbone": own("OwnBackbone", depth=3),
    "model__prompt_encoder": own("OwnEncoder", slope=0.2),
    "model__objective": own("OwnObjective", power=1.5),
}


@pytest.mark.slow
def test_parts_of_ones_own_go_through_every_verb(
    recipe: Callable[..., Path], fit: Callable[..., dict], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    saving = {"class_path": "lidit.callbacks.checkpoints.Checkpoints", "init_args": {"every_n_steps": 2, "keep": 3}}
    many = PARTS | {"trainer__max_steps": 4, "trainer__val_check_interval": 2, "trainer__callbacks": [saving]}
    alone = fit(recipe("alone", **PARTS, trainer__max_steps=4, trainer__val_check_interval=2), 1)
    sharded = recipe("sharded", **many, trainer__strategy="sharded", parallel__checkpoint_every=1)
    both = fit(sharded, 2, f"--run={tmp_path / 'run'}")
    blocks = [f"backbone.blocks.{i}" for i in range(3)]
    projections = [f"prompt_encoder.project.{i}" for i in range(2)]
    assert both["sharded"] == ["backbone", *blocks, "prompt_encoder", *projections]
    assert both["losses"] == pytest.approx(alone["losses"], abs=2e-5)

    resumed = recipe("resumed", **many | {"trainer__max_steps": 6}, trainer__strategy="sharded")
    ended = fit(resumed, 1, f"--run={tmp_path / 'run'}", "--resume=auto")
    assert list(ended["losses"]) == [5, 6]

    assert main(["plan", "--config", str(resumed), "--pixels", "32", "--gpus", "[1]"]) == 0
    assert "GFLOP an image" in capsys.readouterr().out

    checkpoint, picture = str(tmp_path / "run/checkpoints/step-00000006.ckpt"), tmp_path / "out.png"
    drawing = ["sample", "a red circle", "--out", str(picture), "--size", "32x32", "--steps", "2"]
    assert main([*drawing, "--checkpoint", checkpoint]) == 1
    assert f"say --trust {MODULE.partition('.')[0]}" in capsys.readouterr().err
    assert not picture.exists()
    trusted = ["--trust", f"[{MODULE}]"]
    assert main([*drawing, "--checkpoint", checkpoint, *trusted]) == 0
    first = Image.open(picture).tobytes()

    exported = str(tmp_path / "exported")
    assert main(["export", checkpoint, exported]) == 1
    assert not Path(exported).exists()
    assert main(["export", checkpoint, exported, *trusted]) == 0
    assert main([*drawing, "--checkpoint", exported]) == 1
    assert main([*drawing, "--checkpoint", exported, "--trust", MODULE]) == 0
    assert Image.open(picture).tobytes() == first


@pytest.mark.parametrize(
    ("part", "name", "said"),
    [
        ("backbone", "OwnEncoder", "OwnEncoder does not make a torch.nn.modules.module.Module from (int) alone"),
        ("backbone", "OwnObjective", "OwnObjective"),
        ("prompt_encoder", "OwnObjective", "OwnObjective"),
        ("objective", "OwnBackbone", "OwnBackbone is no objective: it has no loss, times, alpha_sigma, to_x0"),
    ],
)
def test_a_part_in_the_wrong_place_is_refused_before_training(
    part: str, name: str, said: str, recipe: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    path = recipe("wrong", **PARTS | {f"model__{part}": {"class_path": f"{MODULE}.{name}"}})
    assert main(["fit", "--config", str(path)]) in (1, 2)
    out = capsys.readouterr()
    assert said in (out.out + out.err).strip().splitlines()[-1]


def test_a_misspelt_key_of_ones_own_class_is_refused_with_the_near_miss(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    path = recipe("misspelt", **PARTS | {"model__backbone": own("OwnBackbone", dept=3)})
    assert main(["fit", "--config", str(path)]) == 2
    assert "model.backbone: there is no key 'dept'; did you mean depth?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("check", "part", "lacks"),
    [
        (check_backbone, nn.Linear(1, 1), "is no backbone: it has no width, patch, blocks"),
        (check_encoder, nn.Linear(1, 1), "is no prompt encoder: it has no timeless, units"),
        (check_objective, nn.Linear(1, 1), "is no objective: it has no predicts, loss, times, alpha_sigma, to_x0"),
        (check_backbone, OwnObjective(), "OwnObjective is no backbone: it has no width, patch, blocks, forward"),
    ],
)
def test_what_breaks_a_contract_is_told_what_it_lacks(check: Callable, part: object, lacks: str) -> None:
    with pytest.raises(ValueError, match=lacks):
        check(part)


def test_parts_that_keep_their_contracts_pass() -> None:
    check_backbone(OwnBackbone(4))
    check_encoder(OwnEncoder([8], 24))
    check_objective(OwnObjective())


def test_no_module_is_imported_that_a_checkpoint_names_and_nobody_trusts(tmp_path: Path) -> None:
    from lidit.pipeline import build

    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    bundled = json.loads(Path("lidit/assets/lidit/config.json").read_text())["model"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        for part in ({"class_path": "evil.Backbone"}, "evil.backbone", "lidit.cli.main"):
            with pytest.raises(ValueError, match="say --trust"):
                build(bundled | {"backbone": part})
            with pytest.raises(ValueError, match="say --trust"):
                build(bundled | {"llms": [{"class_path": "evil.LLM", "init_args": {}}]})
    assert not (tmp_path / "ran").exists()


def test_a_recipe_of_ones_own_is_kept_as_it_was_written(recipe: Callable[..., Path]) -> None:
    from lidit.models.older import updated

    content = yaml.safe_load(recipe("kept", **PARTS).read_text())
    assert updated(content) == content
