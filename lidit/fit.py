"""`lidit fit`, `validate` and `test`: LightningCLI over `TextToImage` and `ShardData`."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from zipfile import is_zipfile

from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger

from lidit.arguments import parse
from lidit.data.datamodule import ShardData
from lidit.module import TextToImage
from lidit.pipeline import adopt, read

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
    "Mismatch dtype between input and weight",  # of QK-norm's float32 weights under bf16 autocast, as it should be
)


class RecipeCLI(LightningCLI):
    """LightningCLI whose complaints are short, and whose loggers write one folder per run."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs, with the arguments of the Trainer's method that the recipe gives otherwise."""
        given = {"model", "dataloaders", "datamodule"}
        return {"fit": given | {"train_dataloaders", "val_dataloaders"}, "validate": given, "test": given}

    def parse_arguments(self, parser: ArgumentParser, args: list[str]) -> None:
        self.config = parse(parser, args, self._subcommand_parsers[args[0]])
        given = self.config[self.config.subcommand]
        # Lightning would put a checkpoint's settings over the recipe's without a word: it learns of it later
        self.ckpt_path, given.ckpt_path = given.ckpt_path, None

    def add_arguments_to_parser(self, parser: ArgumentParser) -> None:
        """What Lightning's own arguments leave out."""
        parser.add_argument(
            "--start_from",
            type=str | None,
            default=None,
            help="Weights to begin with: `bundled:NAME`, an exported folder, or a checkpoint, whose averaged weights"
            " are taken; training starts anew, from step 0. To go on with a run, say --ckpt_path.",
        )

    def before_fit(self) -> None:
        """Give the model the weights it starts from.

        Raises:
            ValueError: the weights are of another model, or a checkpoint is given as well.
        """
        source = self.config[self.config.subcommand].start_from
        if source and self.ckpt_path:
            raise ValueError("--start_from begins anew and --ckpt_path goes on with a run; give one of them")
        if source:
            _, weights, llms = read(source)
            adopt(self.model, weights, llms, source)

    before_validate = before_test = before_fit

    def before_instantiate_classes(self) -> None:
        """Give loggers that write to one place one number: each would count on from the folder of the one before."""
        given = self.config[self.config.subcommand]
        given.ckpt_path = whole(self.ckpt_path)
        loggers = given.trainer.logger
        for logger in loggers if isinstance(loggers, list) else []:
            init = logger.init_args
            if logger.class_path.rpartition(".")[2] in NUMBERED and init.version is None:
                init.version = CSVLogger(init.save_dir, init.name).version


def whole(checkpoint: str | None) -> str | None:
    """The path of a checkpoint, if it is not half a file.

    Raises:
        ValueError: it is.
    """
    if checkpoint is not None and Path(checkpoint).is_file() and not is_zipfile(checkpoint):
        raise ValueError(f"{checkpoint} is no checkpoint or not a whole one; copy it again, or take an earlier one")
    return checkpoint


def run(verb: str, argv: list[str]) -> RecipeCLI:
    """Run one of Lightning's verbs and return what was built.

    Raises:
        ArgumentError: the recipe or the command line is not understood.
        ValueError: the Trainer cannot do what the recipe asks for.
    """
    quiet()
    try:
        return RecipeCLI(
            TextToImage,
            ShardData,
            args=[verb, *argv],
            parser_kwargs={"prog": "lidit", **PARSER} | {name: dict(PARSER) for name in RecipeCLI.subcommands()},
            trainer_defaults=TRAINER,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
        )
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error


def quiet() -> None:
    """Leave out what Lightning says at every start and nobody can act on."""
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
