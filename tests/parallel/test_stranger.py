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
from lidit.draws import draw
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
        t = draw(torch.rand, x0.shape[:1], generator, x0.device) ** self.power  # the same for any number of ranks
        noise = draw(torch.randn, x0.shape, generator, x0.device)
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
    assert "TFLOP an image" in capsys.readouterr().out

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


EVIL = [
    {"backbone": {"class_path": "evil.Backbone"}},
    {"backbone": "evil.backbone"},
    {"backbone": "lidit.cli.main"},
    {"backbone": {"class_path": "lidit.fit.os.system", "init_args": {"command": "touch RAN"}}},
    {"backbone": {"class_path": "lidit.disk.whole.remove", "init_args": {"path": "VICTIM"}}},
    {"backbone": {"class_path": "lidit.fit.fit", "init_args": {"argv": ["--help"]}}},
    {"backbone": {"class_path": "lidit.jobs.local.subprocess.call", "dict_kwargs": {"args": ["touch", "RAN"]}}},
    {"backbone": {"class_path": "lidit.models.lidit.LIDiT", "init_args": {"depth": {"class_path": "evil.Depth"}}}},
    {"backbone": {"class_path": "lidit.models.lidit.LIDiT", "init_args": {"depth.class_path": "evil.Depth"}}},
    {"backbone": {"class_path": ["evil.Backbone"]}},
    {"backbone.class_path": "evil.Backbone"},
    {"prompt_encoder.class_path": "evil.Encoder"},
    {"objective.class_path": "evil.Objective"},
    {"llms": ["evil.LLM"]},
    {"llms": '[{"class_path": "evil.LLM"}]'},
    {"llms": [{"class_path": "evil.LLM", "init_args": {}}]},
    {"llms+": ["evil.LLM"]},
    {"vae": {"class_path": "lidit.models.vae.evil.VAE"}},
    {"objective": {"class_path": "evil.Objective"}},
    {"learning_rate": {"class_path": "evil.Rate"}},
]


@pytest.mark.parametrize("change", EVIL, ids=str)
def test_nothing_that_an_untrusted_checkpoint_names_runs(change: dict, tmp_path: Path) -> None:
    from lidit.pipeline import build

    victim, ran = tmp_path / "victim", tmp_path / "ran"
    victim.mkdir()
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    change = json.loads(json.dumps(change).replace("RAN", str(ran)).replace("VICTIM", str(victim)))
    bundled = json.loads(Path("lidit/assets/lidit/config.json").read_text())["model"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        with pytest.raises(ValueError, match="configuration"):
            build(bundled | change)
    assert not ran.exists()
    assert victim.is_dir()


def test_the_settings_of_the_bundled_model_name_nothing_untrusted() -> None:
    from lidit.pipeline import build

    bundled = json.loads(Path("lidit/assets/lidit/config.json").read_text())["model"]
    assert build(bundled).backbone is None


class Tied(OwnBackbone):
    """Two names for one weight, and a number that is computed when it is built."""

    def __init__(self, channels: int, width: int = 24):
        super().__init__(channels, width)
        self.blocks[1].weight = self.blocks[0].weight
        self.frequencies = torch.linspace(0, 1, width)

    def forward(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        return super().forward(x, t, text._replace(pooled=text.pooled + self.frequencies))


def test_tied_weights_and_computed_numbers_of_a_loaded_model_are_as_they_were_built() -> None:
    from lidit.pipeline import build

    parts = {"backbone": own("Tied"), "prompt_encoder": own("OwnEncoder"), "objective": own("OwnObjective")}
    bundled = json.loads(Path("lidit/assets/lidit/config.json").read_text())["model"]
    first, second = (build(bundled | parts, [MODULE]) for _ in range(2))
    first.configure_model()
    second.adopt(first.state_dict(), "the first")
    assert second.backbone.blocks[0].weight is second.backbone.blocks[1].weight
    told = Text(torch.randn(1, 3, 24), torch.ones(1, 3, dtype=torch.bool), torch.randn(1, 24))
    x, t = torch.randn(1, 16, 4, 4), torch.rand(1)
    assert torch.equal(first.backbone(x, t, told), second.backbone(x, t, told))


def test_a_recipe_of_ones_own_is_kept_as_it_was_written(recipe: Callable[..., Path]) -> None:
    from lidit.models.older import updated

    content = yaml.safe_load(recipe("kept", **PARTS).read_text())
    assert updated(content) == content
