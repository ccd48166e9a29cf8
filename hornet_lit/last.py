"""A run's last checkpoint, which is to be the last."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint


class LastCheckpoint(Checkpoint):
    """Saves the last checkpoint where ModelCheckpoint's `save_last` has left it behind.

    Lightning from 2.6 on saves it only together with one of the best: a run whose accuracy stands still would go on
    from its best epoch after a kill, and end with that for its last. A Checkpoint, so that its turn comes after theirs.
    """

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._keep_up(trainer, validated=False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._keep_up(trainer, validated=True)

    def _keep_up(self, trainer: pl.Trainer, *, validated: bool) -> None:
        for saver in trainer.checkpoint_callbacks:
            if not isinstance(saver, ModelCheckpoint) or saver.save_last is not True:  # "link" asks for one of the best
                continue
            every, after_training = saver._every_n_epochs, saver._should_save_on_train_epoch_end(trainer)
            if after_training == validated or not every or (trainer.current_epoch + 1) % every:
                continue
            if not saver._should_skip_saving_checkpoint(trainer):  # as it says if it has saved this step
                saver._save_last_checkpoint(trainer, saver._monitor_candidates(trainer))


def save_last(trainer: pl.Trainer) -> Path | None:
    """Saves the training in place of its last checkpoint; None where the run keeps none. All processes call it."""
    saver = trainer.checkpoint_callback
    if not isinstance(saver, ModelCheckpoint) or not saver.dirpath or trainer.fast_dev_run:
        return None
    path = Path(saver.last_model_path or Path(saver.dirpath, "last.ckpt"))
    saver.last_model_path = str(path)  # known to the checkpoint, so that a resumed run replaces it
    trainer.save_checkpoint(path, weights_only=False)
    return path
