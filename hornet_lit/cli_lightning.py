"""fit, validate, test and predict: LightningCLI, wired to ImageClassifier and the data modules.

What is ours here, and why:
- bare recipe names for --config; every name is checked before jsonargparse, so that a typo is told in a few lines;
- validate, test and predict need weights: LightningCLI would score random ones and exit 0;
- --ckpt_path: its settings are the defaults and conflicts are errors (LightningCLI lets it override options silently);
- `--ckpt_path auto` goes on in the run's own folder, or begins there; metrics.csv is continued, not deleted;
- a signal ends a fit with a checkpoint (cli_stop), and no process outlives the others;
- config.yaml goes to the run's folder only, and a second run there does not abort;
- checkpoints are read with weights_only=True, and predictions are streamed to a file, never returned.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from hornet_lit import cli_checkpoint, cli_classes, writers
from hornet_lit.cli_errors import UserError, printable, told
from hornet_lit.cli_keys import KeyChecker, blame, check_ranges, options, value_error
from hornet_lit.cli_process import Process, exit_code
from hornet_lit.cli_recipes import Config, run_folder, with_recipes
from hornet_lit.cli_record import RunRecord
from hornet_lit.cli_stop import GracefulStop, check_folder, continue_metrics, refuse_stray
from hornet_lit.data import ImageDataModule
from hornet_lit.module import ImageClassifier
from hornet_lit.strategy import DurableCheckpointIO, FullyShardedStrategy  # the latter is named bare in recipes

RUNS = Path("runs")
AUTO = "auto"
BASES = {
    "data": ImageDataModule,
    "trainer.callbacks": Callback,
    "trainer.logger": Logger,
    "trainer.profiler": Profiler,
    "trainer.strategy": Strategy,
}
# What Lightning's methods take and we decide: the objects themselves, safe reading, and that nothing is returned.
OURS = {
    "model",
    "datamodule",
    "dataloaders",
    "train_dataloaders",
    "val_dataloaders",
    "weights_only",
    "return_predictions",
}


def run(command: str, words: Sequence[str], *, process: Process) -> None:
    """Runs fit, validate, test or predict with the options `words`; UserError for what the user can mend."""
    progress: dict[str, bool] = {}
    _quieten()
    if (attempt := os.environ.get("TORCHELASTIC_RESTART_COUNT")) is not None:
        _keep_apart(attempt)
    try:
        HornetCLI(command, words, progress=progress, process=process)
    except Exception as error:  # `told` decides which it knows
        short = told(error, constructing="constructed" not in progress)
        if short is not None and process.noted is not None:  # the others were faster to go
            short.exit_code = exit_code(process.noted)
        if short is None or short is error:
            raise
        raise short from error
    finally:
        process.end_children()


def _quieten() -> None:
    """Drops what Lightning says about itself, and a warning about callbacks that only a training needs."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda line: "Tip:" not in line.getMessage())
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    warnings.filterwarnings("ignore", message=r".*callbacks used to create the checkpoint need to be provided")
    warnings.filterwarnings("ignore", message=r".*does not have many workers")


def _keep_apart(attempt: str) -> None:
    """Keeps what processes tell each other through torchrun's store apart from what they did before a restart.

    torch 2.15 does not: a process that is faster than its neighbour reads the address that the neighbour had in the
    last attempt, and cannot connect (2 of 2 restarts with gloo).
    """
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")  # the name itself is a function's
    create = rendezvous._create_c10d_store

    def create_for_attempt(*args: Any, **kwargs: Any) -> torch.distributed.Store:
        return torch.distributed.PrefixStore(f"attempt_{attempt}", create(*args, **kwargs))

    rendezvous._create_c10d_store = create_for_attempt


@rank_zero_only
def _say(line: str) -> None:
    print(printable(line), file=sys.stderr)


class Parser(LightningArgumentParser):
    """The parser of one command. Its errors are UserErrors, without the 50 lines of usage."""

    configs: Sequence[Config] = ()
    words: Sequence[str] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a parser that jsonargparse made for one class: it reads what this raises
            super().error(message, ex)
        raise UserError(value_error(message, self.configs, self.words))


class HornetCLI(LightningCLI):
    """LightningCLI for one command.

    Args:
        command: fit, validate, test or predict.
        words: the options after it.
        progress: gets the key "constructed" once model, data and Trainer exist.
        process: handles the signals.
    """

    def __init__(self, command: str, words: Sequence[str], *, progress: dict[str, bool], process: Process) -> None:
        self.command = command
        self.progress = progress
        self.process = process
        self.automatic: Path | None = None  # the run's folder, with --ckpt_path auto
        self.resumed: str | None = None  # the checkpoint that is read, if any
        self.stop = GracefulStop(process)
        super().__init__(
            ImageClassifier,
            ImageDataModule,
            subclass_mode_data=True,
            save_config_callback=RunRecord,
            trainer_defaults={
                "use_distributed_sampler": False,
                "callbacks": [self.stop] if command == "fit" else [],
            },
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"prog": "hornet-lit", "allow_abbrev": False},
            args=[command, *words],
            auto_configure_optimizers=False,
            # The module's and data's own save_hyperparameters() keep plain values; Lightning's variant would add the
            # name of a function that loading then calls.
            load_from_checkpoint_support=False,
        )

    # ---- options

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the one that was asked for: building a parser takes a quarter of a second."""
        return {self.command: OURS}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        return super()._prepare_subcommand_parser(klass, subcommand, **(kwargs | {"allow_abbrev": False}))

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({"trainer.use_distributed_sampler": False, "trainer.logger": self._default_logger()})
        parser.add_lightning_class_args(ImageClassifier, "model")
        parser.add_lightning_class_args(ImageDataModule, "data", subclass_mode=True)
        if self.command == "predict":
            parser.add_lightning_class_args(writers.PredictionWriter, "prediction")
        if self.command == "test":
            parser.add_lightning_class_args(writers.EvaluationReport, "report")

    def _default_logger(self) -> dict[str, Any] | bool:
        if self.command != "fit":
            return False
        return {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": str(RUNS), "name": "fit"},
        }

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Checks names, reads the checkpoint's settings, refuses conflicts, and sets `self.config`."""
        words, configs = with_recipes(args[1:])
        command_parser = self._subcommand_parsers[self.command]
        for each in (parser, command_parser):
            each.configs, each.words = configs, words
        names = {option.lstrip("-") for action in command_parser._actions for option in action.option_strings}
        rooms = {"trainer": Trainer, "model": ImageClassifier}
        checker = KeyChecker(names=names, data_class=None, bases=BASES, rooms=rooms, command=self.command)
        cli_classes.allow([*(config.values for config in configs), *words])
        if {"--help", "-h"} & set(words):
            parser.parse_args([self.command, *words])

        given = self._given_checkpoint(words, configs)
        settings = None if given in (None, AUTO) else self._checkpoint_settings(given, configs)
        checker.data_class, base = _data_of(checker, words, configs, settings)
        for config in configs:
            checker.check_config(config)
        checker.check_options(words)
        self._refuse_missing(words, configs, settings, has_data=checker.data_class is not None)
        if given == AUTO:
            settings = self._automatic_settings(command_parser, words)

        # The explicit model options, with the data class only named: a config of the checkpoint's goes first, so
        # that whatever is given later wins.
        data_only = ["--config", json.dumps({"data": base})] if base else []
        model: dict[str, Any] = {}
        pinned: list[str] = []
        if settings is not None:
            explicit = command_parser.parse_args([*data_only, *words], defaults=False).get("model")
            valid = {name.removeprefix("model.") for name in names if name.startswith("model.")}
            model, pinned = cli_checkpoint.merge_model(
                settings, {} if explicit is None else explicit.as_dict(), command=self.command, valid=valid, words=words
            )
        first = {"model": model} | ({"data": base} if base else {})
        self.config = parser.parse_args([self.command, "--config", json.dumps(first), *words])
        chosen = self.config[self.command]
        cli_classes.refuse_functions(chosen.as_dict())
        check_ranges(chosen)
        for key in pinned:
            chosen["model"][key] = model[key]
        if settings is not None:
            self.resumed = str(settings.path)
            if self.automatic is None:  # config.yaml keeps "auto", so that every start of a run writes the same
                chosen["ckpt_path"] = self.resumed
        if self.command == "predict":
            chosen["trainer"]["logger"] = False  # nothing is logged: the recipe's would leave an empty run folder
        if chosen["trainer"]["use_distributed_sampler"]:
            raise UserError(
                "trainer.use_distributed_sampler must be false: the data modules share the images out themselves"
            )
        weights = chosen["model"]["weights"]
        if weights and "://" not in weights and not Path(weights).exists():  # said before a large folder is listed
            raise UserError(
                f"no weight file at {weights}\n"
                "give yours as --model.weights FILE: the authors' .pth, a .ckpt of hornet-lit, or safetensors"
            )

    def _given_checkpoint(self, words: Sequence[str], configs: Sequence[Config]) -> str | None:
        given = [config.values.get("ckpt_path") for config in configs]
        given += [value for name, value in options(words) if name == "ckpt_path"]
        text = next((value for value in reversed(given) if value not in (None, "null")), None)
        if text == AUTO and self.command != "fit":
            raise UserError(f"--ckpt_path auto is for fit\nfor {self.command} give --ckpt_path last, best or FILE.ckpt")
        return None if text is None else str(text)

    def _checkpoint_settings(self, text: str, configs: Sequence[Config]) -> cli_checkpoint.Settings:
        path = cli_checkpoint.resolve_path(text, runs=run_folder(configs) or RUNS, say=_say)
        if str(path) != text:
            _say(f"--ckpt_path {text}: {path}")
        return cli_checkpoint.read_settings(path)

    def _automatic_settings(
        self, parser: LightningArgumentParser, words: Sequence[str]
    ) -> cli_checkpoint.Settings | None:
        """Of the newest checkpoint in the folder that these very options name; None where there is none yet."""
        logger = parser.parse_args(words, defaults=False).get("trainer.logger", self._default_logger())
        self.automatic = cli_checkpoint.run_folder(logger)
        settings = cli_checkpoint.newest(self.automatic / "checkpoints", say=_say)
        _say(f"--ckpt_path auto: {settings.path if settings else f'nothing in {self.automatic} yet: from the start'}")
        return settings

    def _refuse_missing(
        self,
        words: Sequence[str],
        configs: Sequence[Config],
        settings: cli_checkpoint.Settings | None,
        *,
        has_data: bool,
    ) -> None:
        """Without weights, validate, test and predict would use random ones and exit 0; without data nothing runs."""
        models = [config.values.get("model") for config in configs]
        weights = [model.get("weights") for model in models if isinstance(model, dict) and "weights" in model]
        weights += [value for name, value in options(words) if name == "model.weights"]
        if self.command != "fit" and settings is None and (not weights or weights[-1] in (None, "", "null")):
            raise UserError(
                f"{self.command} needs trained weights, or it would use random ones\n"
                "give --ckpt_path FILE.ckpt (of a run), or --model.weights FILE (official or other weights)"
            )
        if not has_data:
            raise UserError(
                f"{self.command} needs data: give --config RECIPE"
                + ("" if self.command == "fit" else ", or a --ckpt_path that was trained by `hornet-lit fit`")
                + "\n`hornet-lit recipes` lists the recipes"
            )

    def _parse_ckpt_path(self) -> None:
        """Done in `parse_arguments`, where conflicts can be seen."""

    # ---- running

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except Exception as error:  # `told` decides, and an answer to the options gets the name of its option
            if type(short := told(error, constructing=True)) is not UserError:
                raise
            parser = self._subcommand_parsers[self.command]
            raise UserError(blame(str(short), parser.configs, parser.words)) from error

    def after_instantiate_classes(self) -> None:
        self.progress["constructed"] = True
        self.process.launcher = self.trainer.strategy.launcher
        # Lightning would register its own in place of cli_process's, just before the training.
        self.trainer._signal_connector.register_signal_handlers = lambda: None
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # no recipe's own
            self.trainer.strategy.checkpoint_io = DurableCheckpointIO()
        checkpoint = self.resumed
        if checkpoint and Path(checkpoint).is_dir() and not isinstance(self.trainer.strategy, FullyShardedStrategy):
            raise UserError(
                f"--ckpt_path {checkpoint} is a sharded checkpoint, which only --config fsdp reads\n"
                f"`hornet-lit convert {checkpoint} whole.ckpt` makes one file of it, which goes with any strategy"
            )
        model, data = self.model.hparams, self.datamodule
        if model["in_chans"] != data.in_chans:
            raise UserError(
                f"model.in_chans is {model['in_chans']} but the images of {type(data).__name__} have {data.in_chans} "
                f"channel(s)\nset --model.in_chans {data.in_chans}, or name other data"
            )
        if self.command == "fit" and model["img_size"] not in (None, data.img_size):
            warnings.warn(
                f"model.img_size is {model['img_size']} but the images have {data.img_size} pixels a side: "
                f"set model.img_size and data.img_size alike",
                stacklevel=2,
            )
        for callback in self.trainer.callbacks if self.command == "fit" and model["ema_decay"] is None else ():
            if str(monitor := getattr(callback, "monitor", None)).endswith("_ema"):
                # Lightning would say so at the end of the first epoch, which may be hours away.
                raise UserError(
                    f"{type(callback).__name__} monitors {monitor!r}, which needs averaged weights, but "
                    "model.ema_decay is null\nset model.ema_decay, or monitor 'val/acc1' in a copy of the recipe "
                    "(`hornet-lit recipes copy NAME`)"
                )

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["weights_only"] = True
        kwargs["ckpt_path"] = self.resumed
        if subcommand == "predict":
            kwargs["return_predictions"] = False
        return kwargs

    def before_fit(self) -> None:
        """Under fast_dev_run nothing is written, but ModelCheckpoint's save_last would be."""
        if self.trainer.fast_dev_run:
            self.trainer.callbacks = [each for each in self.trainer.callbacks if not isinstance(each, Checkpoint)]
        continue_metrics(self.trainer)
        self.stop.resumed = self.resumed
        if self.resumed is None:
            refuse_stray(self.trainer)
        if self.automatic is not None:
            check_folder(self.trainer, self.automatic)

    def after_fit(self) -> None:
        """Says where the run's files are."""
        checkpoints = self.trainer.checkpoint_callback
        # Not trainer.log_dir, which is a collective call: a process that has gone would leave the others waiting.
        if (folder := getattr(self.trainer.logger, "log_dir", None)) and not self.trainer.fast_dev_run:
            _say(f"run folder: {folder}")
        for label, attribute in (("best checkpoint", "best_model_path"), ("last checkpoint", "last_model_path")):
            if path := getattr(checkpoints, attribute, ""):
                _say(f"{label}: {path}")


def _data_of(
    checker: KeyChecker,
    words: Sequence[str],
    configs: Sequence[Config],
    settings: cli_checkpoint.Settings | None,
) -> tuple[type | None, dict[str, Any] | None]:
    """(the data module's class, the checkpoint's data settings where nothing else names a class)."""
    for name, value in reversed(list(options(words))):
        if name in ("data", "data.class_path") and value is not None:
            return checker.find_class(value, path="data", source="the command line"), None
    for config in reversed(configs):
        data = config.values.get("data")
        if isinstance(data, dict) and "class_path" in data:
            return checker.find_class(data["class_path"], path="data", source=config.source), None
    if settings is None or settings.data is None:
        return None, None
    kind = checker.find_class(settings.data["class_path"], path="data", source=str(settings.path))
    return kind, settings.data
