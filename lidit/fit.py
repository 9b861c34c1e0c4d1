"""`lidit fit`, `validate` and `test`: LightningCLI over `TextToImage` and `ShardData`."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed import DistNetworkError

from lidit.arguments import parse
from lidit.callbacks.checkpoints import Checkpoints
from lidit.callbacks.preemption import Preemption
from lidit.callbacks.record import Record
from lidit.checkpoint import check_whole, newest
from lidit.data.datamodule import ShardData
from lidit.disk.folder import CHECKPOINTS, checkpoints_in
from lidit.jobs import signals
from lidit.module import TextToImage
from lidit.parallel import Parallel
from lidit.pipeline import adopt, adopt_part, read
from lidit.recipe import completed, described
from lidit.strategy import chosen_strategy

PARSER = {"allow_abbrev": False, "exit_on_error": False}
NUMBERED = ("TensorBoardLogger", "CSVLogger")  # loggers that number their runs
LOGGERS = [
    {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": {"save_dir": "runs", "name": "fit"}}
    for name in NUMBERED
]
TRAINER = {"logger": LOGGERS, "use_distributed_sampler": False}  # ShardData gives each rank its share itself
NOISE = (
    "Experiment logs directory",  # of the CSV logger; the recipe has just been saved there
    "Total length of `list` across ranks is zero",  # without data.val there is no validation
    ".*isinstance.treespec, LeafSpec",  # Lightning 2.6 with today's torch
    "FSDP2-wrapped module .* returned a view tensor",  # into which nobody writes
    "Mismatch dtype between input and weight",  # of QK-norm's float32 weights under bf16 autocast, as it should be
)


class RecipeCLI(LightningCLI):
    """LightningCLI with error messages of one line, whose loggers write one folder per start of a run."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs, each with those arguments of the Trainer's method that are no keys of a recipe."""
        given = {"model", "dataloaders", "datamodule"}
        return {"fit": given | {"train_dataloaders", "val_dataloaders"}, "validate": given, "test": given}

    def parse_arguments(self, parser: ArgumentParser, args: list[str]) -> None:
        words, self.preset = completed(args[1:])
        self.config = parse(parser, [args[0], *words], self._subcommand_parsers[args[0]])
        self.given.preset = None  # its settings are in the recipe now
        if self.preset:
            rank_zero_info(described(self.preset, self.given.model))
        # Lightning would silently override the recipe by the checkpoint's settings, so it gets the path later
        self.ckpt_path, self.given.ckpt_path = self.given.ckpt_path, None

    @property
    def given(self) -> Namespace:
        """The recipe, as the command line overrides it."""
        return self.config[self.config.subcommand]

    def text(self) -> str:
        """The recipe as YAML, with all its defaults and no object made of it yet."""
        given = self.given.clone()
        given.pop("config", None)  # the names of the files it came from
        return self._subcommand_parsers[self.config.subcommand].dump(given, skip_none=False, skip_validation=True)

    def add_arguments_to_parser(self, parser: ArgumentParser) -> None:
        """Add the arguments that Lightning does not have."""
        parser.add_argument(
            "--preset",
            type=str | None,
            default=None,
            help="Settings of another system, such as hunyuan (docs/prompt_encoders.md). They override the recipe, and"
            " the command line overrides them.",
        )
        parser.add_argument(
            "--start_from",
            type=str | None,
            default=None,
            help="Weights to begin with: `bundled:NAME`, an exported folder, or a checkpoint, whose averaged weights"
            " are taken. Training starts at step 0; to resume a run, say --ckpt_path.",
        )
        parser.add_argument(
            "--start_ema", type=bool, default=True, help="Take the averaged weights of the checkpoint of --start_from."
        )
        parser.add_argument(
            "--start_part",
            type=Literal["backbone", "prompt_encoder"] | None,
            default=None,
            help="Take only this part's weights from --start_from, such as the backbone's if the LLM is another; the"
            " other part gets new weights. By default, both parts are taken.",
        )
        parser.add_argument(
            "--run",
            type=str | None,
            default=None,
            help="The run's folder, such as runs/first. Each start logs into its folder version_N, and checkpoints are"
            " in its folder checkpoints. When the run is told to stop (SIGUSR1, SIGTERM), it saves first. `lidit runs`"
            " shows its state. Without --run, each start is a run of its own.",
        )
        parser.add_argument(
            "--resume",
            type=Literal["auto"] | None,
            default=None,
            help="auto: resume from the run's newest checkpoint that is complete and fits; begin if there is none.",
        )
        parser.add_class_arguments(Parallel, "parallel")

    def before_instantiate_classes(self) -> None:
        """Decide where things are written; loggers of one folder get one version, or they would count each other's."""
        given = self.given
        if given.run:
            lay_out(given, Path(given.run))
        if self.ckpt_path:
            check_whole(Path(self.ckpt_path))
        given.ckpt_path = self.ckpt_path
        for init in numbered(given):
            if init.version is None:
                init.version = CSVLogger(init.save_dir, init.name).version

    def instantiate_trainer(self, **kwargs: object) -> Trainer:
        """Find the checkpoint to resume, choose a strategy if the recipe names none, and let a run be preempted."""
        given, model = self.config_init[self.config.subcommand], self.model
        if SLURMEnvironment.detect() and not given.trainer.plugins:  # Lightning's own requeue saves in the handler
            kwargs["plugins"] = SLURMEnvironment(auto_requeue=False)
        model.parallel = given.parallel
        if given.resume or given.run:
            given.ckpt_path = resumed(model, given.run, given.resume, given.ckpt_path)
        kwargs |= chosen_strategy(model, given)
        if given.run and self.config.subcommand == "fit":
            if given.trainer.enable_checkpointing is False:
                raise ValueError(
                    "a run with a folder saves when it is told to stop: leave out --run, or say "
                    "--trainer.enable_checkpointing true"
                )
            kwargs["callbacks"] = attended(given.trainer.callbacks or [], Path(given.run))
        else:
            signals.release()
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Give the model the weights it starts from.

        Raises:
            ValueError: the weights are of another model, or two options contradict each other.
        """
        given = self.config_init[self.config.subcommand]
        if given.start_from and given.ckpt_path and not given.resume:
            raise ValueError("--start_from begins at step 0 and --ckpt_path resumes a run; give one of them")
        if given.start_part and not given.start_from:
            raise ValueError(f"--start_part {given.start_part} is a part of a model; name the model with --start_from")
        if given.start_from and not given.ckpt_path:
            found = read(given.start_from, given.start_ema)
            if given.start_part:
                adopt_part(self.model, given.start_part, found.weights, given.start_from)
            else:
                adopt(self.model, found.weights, found.llms, given.start_from)

    before_validate = before_test = before_fit


def numbered(given: Namespace) -> list[Namespace]:
    """The settings of those loggers in a recipe that number their runs."""
    loggers = given.trainer.logger if isinstance(given.trainer.logger, list) else [given.trainer.logger]
    named = [logger for logger in loggers if isinstance(logger, Namespace)]  # others: True, False, None
    return [logger.init_args for logger in named if logger.class_path.rpartition(".")[2] in NUMBERED]


def lay_out(given: Namespace, folder: Path) -> None:
    """Make a recipe's loggers, and its checkpoints if they have no folder yet, write into a run's folder."""
    given.trainer.default_root_dir = str(folder)
    for init in numbered(given):
        init.save_dir, init.name = str(folder.parent), folder.name
    for callback in given.trainer.callbacks or []:
        if callback.class_path.rpartition(".")[2] == Checkpoints.__name__ and callback.init_args.folder is None:
            callback.init_args.folder = str(folder / CHECKPOINTS)


def attended(callbacks: list[Callback], run: Path) -> list[Callback]:
    """A recipe's callbacks, and those that a run with a folder needs: state, checkpoints, and saving when stopped."""
    own = (Record(str(run)), Checkpoints(folder=str(run / CHECKPOINTS)), Preemption())
    return callbacks + [c for c in own if not any(isinstance(there, type(c)) for there in callbacks)]


def resumed(model: TextToImage, run: str | None, resume: str | None, ckpt_path: str | None) -> str | None:
    """The checkpoint to resume, or None to begin.

    Raises:
        ValueError: the options contradict each other, or the run's folder already holds a run.
    """
    if resume and ckpt_path:
        raise ValueError("--resume auto finds the checkpoint itself, and --ckpt_path names one; give one of them")
    if resume and not run:
        raise ValueError("--resume auto resumes a run: name its folder, such as --run runs/first")
    folder = Path(run) / CHECKPOINTS
    if resume:
        found = newest(folder, model.shapes(), rank_zero_info)
        rank_zero_info(f"{run}: going on from {found}" if found else f"{run}: nothing to resume; the run begins")
        return str(found) if found else None
    if not ckpt_path and (there := checkpoints_in(folder)):
        raise ValueError(f"{run} has checkpoints ({there[0].name}); say --resume auto, or name another folder as --run")
    return ckpt_path


def run(verb: str, argv: list[str], kind: type[RecipeCLI] | None = None) -> RecipeCLI:
    """Run one of Lightning's verbs and return what was built.

    Args:
        verb: fit, validate or test.
        argv: the command line after the verb.
        kind: class of the command line, by default RecipeCLI.

    Raises:
        ArgumentError: the recipe or the command line is not understood.
        ValueError: the Trainer cannot do what the recipe asks for.
    """
    quiet()
    try:
        return (kind or RecipeCLI)(
            TextToImage,
            ShardData,
            args=[verb, *argv],
            parser_kwargs={"prog": "lidit", **PARSER} | {name: dict(PARSER) for name in RecipeCLI.subcommands()},
            trainer_defaults=TRAINER,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
        )
    except MisconfigurationException as error:
        raise ValueError(explained(str(error))) from error
    except DistNetworkError as error:
        raise ValueError(explained(str(error))) from error


def read_recipe(
    argv: list[str], ask: Callable[[ArgumentParser], None] | None = None, verb: str = "fit"
) -> tuple[Namespace, TextToImage, ShardData]:
    """A recipe as `lidit fit` understands it, with its classes instantiated; nothing is built, written or looked for.

    Args:
        argv: what follows the verb.
        ask: adds what is asked beside the recipe.
        verb: fit, validate or test.

    Returns:
        The recipe; its model, not built; its data, not opened.

    Raises:
        ArgumentError: the recipe or the command line is not understood.
    """
    recipe = unstarted(argv, ask, verb)
    return recipe.config_init[verb], recipe.model, recipe.datamodule


def unstarted(argv: list[str], ask: Callable[[ArgumentParser], None] | None = None, verb: str = "fit") -> RecipeCLI:
    """The command line behind `read_recipe`, with its recipe as text.

    Raises:
        ArgumentError: the recipe or the command line is not understood.
    """

    class Unstarted(RecipeCLI):
        def add_arguments_to_parser(self, parser: ArgumentParser) -> None:
            super().add_arguments_to_parser(parser)
            if ask:
                ask(parser)

        def before_instantiate_classes(self) -> None:
            pass

        def instantiate_trainer(self, **kwargs: object) -> Any:  # none: the devices it asks for need not be here
            return None

        def _run_subcommand(self, subcommand: str) -> None:
            pass

    return run(verb, argv, Unstarted)


def explained(message: str) -> str:
    """A message of Lightning or PyTorch, replaced by one with the fix if it is about this machine."""
    if "EADDRINUSE" in message:
        port = os.environ.get("MASTER_PORT", "?")
        return (
            f"port {port} (MASTER_PORT) is taken on this machine, and the ranks cannot meet there; choose another: "
            "`lidit launch slurm --env MASTER_PORT=N`, `lidit launch local --port N`, or MASTER_PORT in the environment"
        )
    if "No supported gpu backend found" in message or "CUDAAccelerator" in message:
        return (
            "the recipe asks for GPUs, and this machine shows none: say --trainer.accelerator cpu, or start it where "
            "there are some (`lidit launch slurm --gpus-per-node N`; `nvidia-smi` lists them)"
        )
    return message


def quiet() -> None:
    """Hide the messages that Lightning and tokenizers print at every start and that nobody can act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes that read data tokenise one caption at a time
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()


def fit(argv: list[str]) -> None:
    """Train a model from a recipe."""
    run("fit", argv)


def validate(argv: list[str]) -> None:
    """Measure the validation loss of a checkpoint."""
    run("validate", argv)


def test(argv: list[str]) -> None:
    """Measure the test loss of a checkpoint."""
    run("test", argv)
