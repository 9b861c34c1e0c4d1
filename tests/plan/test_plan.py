"""What a recipe is said to cost is what it takes, and what would make it fit is named."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.multiprocessing import start_processes

from lidit.cli import main
from lidit.parallel import Parallel
from lidit.plan.activations import saved_bytes
from lidit.plan.costs import planned
from lidit.plan.memory import GB, Plan
from lidit.plan.operations import INSTRUCTION, DryRun, FeatureSizes, Sizes
from lidit.plan.plan import read, verdict
from tests.plan.stages import STAGES, words

CONFIGS = Path(__file__).parents[2] / "experiments/configs"
MINI = ["--config", str(CONFIGS / "mini.yaml"), "--pixels", "64", "--model.backbone.init_args.depth", "2"]
SLOW = pytest.mark.slow


@cache
def plan(*words: str) -> Plan:
    """A plan of the miniature, which does not draw while it trains."""
    return planned(*read([*MINI, *words]))


def test_what_a_recipe_takes_is_printed(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", *MINI, "--gpus", "[1, 2]"]) == 0
    said = capsys.readouterr().out
    assert "For pictures of 64 x 64 and captions of 128 tokens" in said
    assert "M parameters" in said
    assert "TFLOP a batch of 128." in said
    assert "recipe: 1" in said
    assert "It fits" in said


@pytest.mark.parametrize("every", [pytest.param(0, marks=SLOW), 1, pytest.param(2, marks=SLOW)])
@pytest.mark.parametrize("precision", [pytest.param("32-true", marks=SLOW), "bf16-mixed"])
def test_the_peak_of_a_step_is_within_15_percent(every: int, precision: str) -> None:
    given, model = read(
        [
            *MINI,
            "--model.optimizer",
            "adamw",
            "--trainer.precision",
            precision,
            "--data.batch_size",
            "8",
            "--parallel.checkpoint_every",
            str(every),
        ]
    )
    counted = planned(given, model).memory()
    backbone, encoder = model.build()
    Parallel(checkpoint_every=every).apply(backbone)
    parts = torch.nn.ModuleDict({"backbone": backbone, "prompt_encoder": encoder}).eval()
    optimizer = torch.optim.AdamW(parts.parameters())
    lengths = [INSTRUCTION + llm.prompts.max_tokens for llm in model.llms]
    features = [
        (torch.randn(8, n, llm.width), torch.ones(8, n, dtype=torch.bool), torch.full((8,), INSTRUCTION))
        for n, llm in zip(lengths, model.llms, strict=True)
    ]
    latent, t = torch.randn(8, model.vae.channels, 8, 8), torch.rand(8)

    def step() -> None:  # in the order of Lightning: the gradients of the last step are there in the forward pass
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = backbone(latent, t, encoder(features, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    tracker = MemTracker()
    tracker.track_external(parts, optimizer, *(tensor for each in features for tensor in each))
    with tracker:
        step()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    expected = sum(size for what, size in counted.items() if what not in ("EMA", "frozen", "noise", "encoding"))
    assert expected == pytest.approx(peak, rel=0.15)


def test_parameters_and_their_states_are_those_of_the_model() -> None:
    given, model = read([*MINI, "--model.trained", "[backbone]", "--model.optimizer", "adamw"])
    found, skeleton = planned(given, model), model.skeleton()
    assert found.parameters == sum(p.numel() for p in skeleton.parameters())
    assert found.trained == sum(p.numel() for p in skeleton["backbone"].parameters())
    memory = found.memory()
    assert memory["weights"] == memory["EMA"] == 4 * found.parameters
    assert memory["optimizer"] == 2 * memory["gradients"] == 8 * found.trained
    spread = replace(found, gpus=4, copies=2).memory()
    assert spread["weights"] == memory["weights"] / 2


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A folder that says it is a cache of everything."""
    (tmp_path / "identity.json").write_text('{"llms": [{}, {}], "vae": {"name": "a"}}')
    return tmp_path


@pytest.mark.slow
def test_what_is_cached_is_not_loaded_unless_validation_or_a_callback_reads_it(cache: Path) -> None:
    cached, undrawn = ["--data.cache", str(cache)], ["--trainer.callbacks", "[]"]
    without = plan(*cached, *undrawn, "--data.val_cache", str(cache))
    assert without.memory()["frozen"] == 0
    assert without.flops < plan().flops
    assert plan(*cached, *undrawn, "--trainer.limit_val_batches", "0").memory()["frozen"] == 0
    validating = plan(*cached, *undrawn)
    assert validating.memory()["frozen"] == plan().memory()["frozen"] > 0
    assert validating.unread == "cache features: `lidit prep precompute`, data.val_cache"
    drawing = plan(*cached, "--data.val_cache", str(cache))
    assert drawing.memory()["frozen"] == plan().memory()["frozen"]
    assert drawing.unread == "cache features: `lidit prep precompute`, no callback JudgedSamples"
    assert drawing.flops == without.flops  # of a step


def test_muon_keeps_one_number_of_a_matrix() -> None:
    _, model = read(MINI)
    model.backbone, model.prompt_encoder = model.build()
    optimizer = model.configure_optimizers()["optimizer"]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.ndim)
    assert plan().memory()["optimizer"] == kept


def test_what_is_not_trained_is_not_kept_for() -> None:
    backbone, encoder = plan("--model.trained", "[backbone]"), plan("--model.trained", "[prompt_encoder]")
    assert max(backbone.saved[0][1], encoder.saved[0][1]) < plan().saved[0][1]
    assert max(backbone.flops, encoder.flops) < plan().flops


def test_what_sharding_and_encoding_hold_for_a_while_is_counted() -> None:
    alone = replace(plan(), saved={0: (0, 100)}, width=2, encoding=0, images=64)
    assert alone.memory()["reduced"] == 0
    assert alone.memory()["noise"] == 64 * alone.noise
    ddp = replace(alone, gpus=8)
    assert ddp.memory()["reduced"] == 4 * alone.trained  # the buckets beside the gradients
    assert ddp.memory()["noise"] == 8 * alone.noise  # each rank draws its own
    sharded = replace(ddp, copies=1)
    assert sharded.memory()["gathered"] == 2 * (2 * alone.unit + 2 * alone.precise)
    assert sharded.memory()["reduced"] == 2 * alone.unit + 2 * alone.precise + 4 * alone.unit
    encoding = replace(sharded, encoding=10**9)
    assert encoding.memory()["encoding"] == 8 * 10**9 - (sharded.total - sum(list(sharded.memory().values())[:5]))
    assert replace(sharded, encoding=1).total == sharded.total  # it is over before the pass


def test_a_cached_part_has_no_operations(cache: Path) -> None:
    cached = list(plan("--data.cache", str(cache)).operations().values())
    assert cached[2:] == [0, 0, 0]
    assert list(plan().operations())[2:] == ["LLM 1, bundled:llm_llama", "LLM 2, bundled:llm_qwen", "VAE, bundled:vae"]
    assert min(plan().operations().values()) > 0


@pytest.mark.parametrize(("way", "text"), [("before", 60), ("after", 60), ("never", 60 + 2 * INSTRUCTION)])
def test_the_instruction_is_cut_once(way: str, text: int) -> None:
    _, model = read([*MINI, "--model.prompt_encoder.init_args.truncate", way])
    seen: list[int] = []
    dry_run = DryRun(model.build)
    dry_run.backbone.register_forward_pre_hook(lambda module, given: seen.append(given[2].tokens.shape[1]))
    features = [FeatureSizes(INSTRUCTION + 30, 30, llm.width) for llm in model.llms]
    dry_run(Sizes((2, model.vae.channels, 8, 8), tuple(features)))
    assert seen == [text]


@pytest.mark.parametrize("bf16", [False, True])
def test_weights_are_not_among_what_is_saved_but_their_casts_are(bf16: bool) -> None:
    linear, x = torch.nn.Linear(64, 64), torch.randn(2, 64, requires_grad=True)

    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return linear(x)

    assert saved_bytes(run) == (2 * 64 * 2 + 64 * 64 * 2 if bf16 else 2 * 64 * 4)


def test_more_pixels_and_more_tokens_take_more() -> None:
    assert plan("--pixels", "128").flops > plan().flops
    assert plan("--tokens", "8").total < plan().total


def test_the_cheapest_switch_that_is_enough_is_named() -> None:
    small = plan("--data.batch_size", "64")
    assert verdict(small, 2 * small.total).startswith("It fits")
    less = replace(small, llms=int(100 * GB))
    assert "cache features" in verdict(less, small.total / 0.8)
    without = replace(small, llms=0, others=0)
    assert "accumulate_grad_batches 2x" in verdict(without, without.total)
    one = replace(without, images=1, saved={0: (0, int(60 * GB)), 1: (0, int(10 * GB)), 2: (0, int(30 * GB))})
    assert "checkpoint_every 2" in verdict(one, 40 * GB)
    assert "checkpoint_every 1" in verdict(one, 20 * GB)
    heavy = replace(one, parameters=int(10 * GB), trained=int(10 * GB))
    assert "GPUs, sharded" in verdict(heavy, 100 * GB)
    several = replace(without, gpus=8, parameters=int(4 * GB), trained=int(4 * GB))
    assert "strategy sharded" in verdict(several, 40 * GB)
    both = replace(one, llms=int(100 * GB), saved={**one.saved, 1: (0, int(80 * GB))})
    assert "Nothing that the plan knows" in verdict(both, 1 * GB)


def test_of_several_switches_only_those_that_are_needed_are_named() -> None:
    gigabytes = {0: (0, int(60 * GB)), 1: (0, int(40 * GB)), 2: (0, int(50 * GB))}
    plan_ = replace(plan("--data.batch_size", "64"), images=1, llms=int(30 * GB), saved=gigabytes, unread="no LLMs")
    assert verdict(plan_, 60 * GB).endswith("Together: no LLMs; --parallel.checkpoint_every 2.")
    recomputed = replace(plan_, every=1, parameters=int(GB), trained=int(GB), saved={1: (0, int(20 * GB))})
    assert "Together: no LLMs" in verdict(recomputed, 30 * GB)
    assert "checkpoint_every" not in verdict(recomputed, 30 * GB)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--pixels", "0"], "--pixels 0 is no multiple of 16"),
        (["--pixels", "-16"], "--pixels -16 is no multiple of 16"),
        (["--pixels", "60"], "--pixels 60 is no multiple of 16"),
        (["--gpus", "[0]"], "--gpus [0]"),
        (["--gpus", "[]"], "--gpus []"),
        (["--gpu_memory", "-1"], "--gpu_memory -1"),
        (["--tokens", "0"], "--tokens 0"),
        (["--disk", "0"], "--disk 0: it must be above 0"),
        (["--price", "-2"], "--price -2: it must be above 0"),
        (["--samples", "0"], "--samples 0: it must be above 0"),
        (["--utilisation", "40"], "--utilisation 40: it is a share of the peak"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", *MINI, *words]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, a process that has trained forks no other")
def test_a_process_that_planned_forks_ones_that_train() -> None:
    with FakeTensorMode():
        torch.ones(1)
    train = torch.ones(1, requires_grad=True).backward
    train()
    (child,) = start_processes(lambda rank: train(), nprocs=1, join=False, start_method="fork").processes
    child.join()
    assert child.exitcode == 0


def test_a_unet_is_planned_and_has_no_blocks_to_recompute(cache: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--config", str(CONFIGS / "mini_unet.yaml"), "--pixels", "64", "--data.cache", str(cache)]
    assert main(["plan", *words, "--trainer.limit_val_batches", "0"]) == 0
    said = capsys.readouterr().out
    assert "recipe: 1" in said
    assert "recomputing every block" not in said
    found = planned(*read([*words, "--trainer.limit_val_batches", "0"]))
    assert found.trained == found.parameters
    assert found.unit == found.parameters
    assert not any("checkpoint_every" in switch for switch, _ in found.cheaper())
    assert main(["plan", *words, "--parallel.checkpoint_every", "1"]) == 1
    assert "no blocks to checkpoint" in capsys.readouterr().err


def test_a_frozen_unet_is_counted_beside_what_is_trained() -> None:
    given, model = read(["--config", str(CONFIGS / "llmdiff_mini.yaml"), "--pixels", "64"])
    found = planned(given, model)
    backbone, _ = model.build()
    frozen = sum(p.nbytes for p in backbone.load(torch.device("cpu")).parameters())
    vae = sum(p.nbytes for p in model.vae.load()._model.parameters())
    assert found.others == vae + frozen
    assert found.parameters < frozen / 4
    assert found.flops > 0


@pytest.mark.slow
def test_a_frozen_unet_that_nobody_has_read_is_planned(no_hub: None, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--config", str(CONFIGS / "llmdiff_sd15.yaml"), "--pixels", "256"]) == 0
    said = capsys.readouterr().out
    names = "Qwen/Qwen2.5-1.5B-Instruct, stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert f"No cache has the config.json of {names}" in said
    assert "51.9M parameters, 51.9M of them trained" in said


@SLOW  # the test above stands for them in `make test`
@pytest.mark.parametrize("name", STAGES)
def test_the_papers_recipes_are_planned_without_a_hub(name: str, no_hub: None, capsys: pytest.CaptureFixture) -> None:
    few = ["--model.backbone.init_args.depth", "1", "--pixels", str(STAGES[name].pixels), "--gpus", "[8]"]
    assert main(["plan", *words(STAGES[name].recipes, name), *few, "--tokens", "8"]) == 0
    said = capsys.readouterr().out
    names = "stabilityai/stable-diffusion-3-medium-diffusers: their sizes are those that came with lidit"
    assert names in said.partition("\n")[0]
    assert "It fits: " in said


def test_a_backbone_of_somebody_elses_that_decides_by_values_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "theirs.py").write_text(
        "from lidit.models.lidit import LIDiT\n\n\nclass Deciding(LIDiT):\n    def forward(self, x, *rest):\n"
        "        return x if x.mean() > 0 else super().forward(x, *rest)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["plan", *MINI, "--model.backbone.class_path", "theirs.Deciding"]) == 1
    said = capsys.readouterr().err
    assert "theirs.Deciding cannot be run without values" in said
    assert said.partition("lidit: error")[2].strip().count("\n") == 0


@pytest.mark.parametrize(("memory", "copies"), [("80", None), ("0.01", 1)])
def test_where_the_strategy_is_left_open_it_is_the_one_that_fit_takes(memory: str, copies: int | None) -> None:
    words = ["--trainer.accelerator", "gpu", "--trainer.devices", "8", "--gpu_memory", memory]
    assert plan(*words).copies == copies


def test_a_recipe_for_gpus_is_planned_without_one(capsys: pytest.CaptureFixture) -> None:
    words = ["--trainer.accelerator", "gpu", "--trainer.devices", "8", "--trainer.num_nodes", "2"]
    assert main(["plan", *MINI, *words, "--trainer.strategy", "sharded"]) == 0
    assert "recipe: 16" in capsys.readouterr().out
