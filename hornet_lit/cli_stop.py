"""Ending a training by a signal so that nothing is lost, and going on in its folder as if it had never ended."""

from __future__ import annotations

import signal
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch import distributed

from hornet_lit.cli_errors import UserError
from hornet_lit.cli_process import Process, exit_code
from hornet_lit.last import save_last
from hornet_lit.writers.metrics import MetricsWriter

FIRST_BATCH = {"ready": 1, "started": 1, "processed": 0, "completed": 0}  # Lightning's counters within a first batch


class GracefulStop(Callback):
    """Ends all processes of a fit together after a signal to any of them, with a checkpoint that resumes bit for bit.

    After every optimizer step, and every batch of a validation, the processes agree whether to stop: one all-reduce of
    a single number. A step after which Lightning validates, or ends the epoch, is no place to stop: what follows it
    would be left out on resuming. Within a validation the checkpoint is written as if it had just begun; Lightning
    then repeats it. Before the first step of this process a signal ends it at once: there is nothing new to save.

    Lightning's own handling is switched off. It knows SIGTERM only, exits with 0, and calls a collective within the
    handler, where a signal to one process hangs the others.
    """

    def __init__(self, process: Process) -> None:
        self.resumed: str | None = None  # the checkpoint that this process found to go on from
        self._process = process
        self._step = 0
        self._stop: int | None = None  # the signal to stop for, once the checkpoint is written
        self._saved: Path | None = None
        self._validating = False  # as the checkpoint in use, or the one being written, was saved

    def state_dict(self) -> dict[str, Any]:
        return {"validating": self._validating}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validating = state_dict["validating"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Processes that resolve `auto` or `last` at different times could find different files, and would go on from
        # them without a word: only the weights are made equal by DDP.
        first = trainer.strategy.broadcast(self.resumed)
        if self.resumed != first:
            raise ValueError(
                f"process {trainer.global_rank} would go on from {self.resumed}, process 0 from {first}: start the run "
                f"again, once nothing writes to its folder any more"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, CSVLogger) and isinstance(writer := logger.experiment, MetricsWriter):
                writer.keep_before(trainer.global_step, validated=not self._validating)
        self._validating = False

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self._step:  # gradients accumulate
            return
        self._step = trainer.global_step
        self._process.noting = True
        loop = trainer.fit_loop.epoch_loop
        if loop._is_training_done or loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
            return
        if signum := self._agreed(trainer):
            self._save(trainer)
            self._stop = signum

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if self._stop:  # not right after saving: Lightning logs a step only after on_train_batch_end
            self._leave(trainer, self._stop)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self._process.noting and (signum := self._agreed(trainer)):
            self._validating = True
            self._save(trainer)
            self._leave(trainer, signum)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for logger in trainer.loggers:
            logger.save()  # so that metrics.csv is never behind a checkpoint
        if self._validating:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            progress |= {"total": FIRST_BATCH, "current": FIRST_BATCH, "is_last_batch": False}

    def _agreed(self, trainer: Trainer) -> int:
        """The signal that any process received, or 0."""
        number = torch.tensor(self._process.noted or 0, device=trainer.strategy.root_device)
        if distributed.is_initialized():
            distributed.all_reduce(number, op=distributed.ReduceOp.MAX)
        return int(number)

    def _save(self, trainer: Trainer) -> None:
        self._saved = save_last(trainer)
        self._process.adopt_children()

    def _leave(self, trainer: Trainer, signum: int) -> None:
        self._process.leave(signum)
        for logger in trainer.loggers:
            logger.save()
        if trainer.is_global_zero:
            name = signal.Signals(signum).name
            where = f"go on with --ckpt_path {self._saved}" if self._saved else "no checkpoint: the run keeps none"
            self._process.say(f"{name}: ended after step {trainer.global_step}; {where}")
        raise SystemExit(exit_code(signum))


def continue_metrics(trainer: Trainer) -> None:
    """Lets the CSVLoggers go on with the metrics.csv of their folder; before `fit`, which makes their writers."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if isinstance(logger, CSVLogger):
            logger._experiment = MetricsWriter(logger.log_dir)


def refuse_stray(trainer: Trainer) -> None:
    """Refuses to begin where Lightning, in a job of SLURM, would go on from a file that some training left behind.

    Raises:
        UserError: there are checkpoints of Lightning's own way to requeue in the current folder.
    """
    found = sorted(Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt")) if SLURMEnvironment.detect() else []
    if found:
        raise UserError(
            f"Lightning would go on from {found[-1]}, which some training left there, since this is a job of SLURM\n"
            "move the file away; to go on from it, name it: --ckpt_path FILE.ckpt"
        )


def check_folder(trainer: Trainer, folder: Path) -> None:
    """Refuses checkpoints that are written where `--ckpt_path auto` would never find them.

    Raises:
        UserError: ModelCheckpoint's dirpath is not the `checkpoints` of `folder`.
    """
    dirpath = getattr(trainer.checkpoint_callback, "dirpath", None)
    if dirpath and Path(dirpath) != (folder / "checkpoints").resolve():
        raise UserError(
            f"--ckpt_path auto looks in {folder / 'checkpoints'}, but ModelCheckpoint writes to {dirpath}\n"
            "leave its dirpath out, or name the file: --ckpt_path FILE.ckpt"
        )
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
