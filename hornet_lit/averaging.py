"""The averaged weights in a training: when they begin, how they are saved and resumed, what a resume may not do."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from hornet_lit.optim import Ema


class AveragedModule(pl.LightningModule):
    """Keeps the average of `network` in `ema`: None where there is none, or not yet.

    A subclass sets `network`, has the hyper-parameters `ema_decay` and `ema_start_epoch`, calls `plan_ema` when it
    knows the steps, and hands its hooks on. A checkpoint holds "ema": {"decay", "state_dict"}, the latter None where
    the average has not begun, and no "ema" at all where none is kept: so that a resume can tell these apart.
    """

    network: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.ema: Ema | None = None
        self._ema_state: dict[str, Tensor] | None = None  # of a checkpoint, until `ensure_ema`
        self._ema_decay: float | None = None
        self._ema_start = 0

    def plan_ema(self, *, steps_per_epoch: float, total_steps: int) -> None:
        """Fix the optimizer step after which the average begins, as a copy of the weights.

        Raises:
            ValueError: if the training ends before, or a callback other than ModelCheckpoint monitors the average.
        """
        self._ema_start = round(self.hparams["ema_start_epoch"] * steps_per_epoch)
        if self.hparams["ema_decay"] is None or self._ema_start == 0:
            return
        if self._ema_start >= total_steps:
            raise ValueError(
                f"the average of the weights would begin after {self._ema_start} steps but the training takes "
                f"{total_steps}: lower model.ema_start_epoch or train longer"
            )
        for callback in self._watching_ema():
            if not isinstance(callback, ModelCheckpoint):
                raise ValueError(
                    f"{type(callback).__name__} monitors {callback.monitor!r}, which does not exist before epoch "
                    f"{self.hparams['ema_start_epoch']:g} (model.ema_start_epoch): monitor 'val/acc1'"
                )

    def _watching_ema(self) -> list[pl.Callback]:
        return [each for each in self.trainer.callbacks if str(getattr(each, "monitor", None)).endswith("_ema")]

    def ensure_ema(self) -> None:
        """Take the averages of a loaded checkpoint in, once the parameters are where they will stay.

        Sharded strategies restore late, so this is done at the start of each loop and not on loading.
        """
        if self._ema_state is None:
            return
        if self.ema is None:
            self.ema = Ema(self.network, decay=self._ema_decay)
        self.ema.load_state_dict(self.network, self._ema_state)
        self._ema_state = None

    def _begin_ema(self, step: int) -> None:
        if self.ema is None and self.hparams["ema_decay"] is not None and step >= self._ema_start:
            self.ema = Ema(self.network, decay=self.hparams["ema_decay"])

    def on_train_start(self) -> None:
        self.ensure_ema()
        if self.ema is None and self.hparams["ema_decay"] is not None and self.global_step > self._ema_start:
            raise ValueError(
                f"cannot resume: the checkpoint of step {self.global_step} has no averaged weights, but they should "
                f"have begun at step {self._ema_start}: keep model.ema_start_epoch and the batch size of the run"
            )
        self._begin_ema(self.global_step)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.network)
        else:
            self._begin_ema(self.global_step + 1)  # Lightning counts this step later

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.ema is None and self.hparams["ema_decay"] is not None and self.trainer.state.fn == "fit":
            # Not begun. ModelCheckpoint takes nan for the worst of all values, and would fail without one.
            for callback in self._watching_ema():
                self.log(callback.monitor, float("nan"))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        # Whole tensors, also in a sharded checkpoint: at the size of these networks every process can gather them.
        if self._ema_state is not None:
            checkpoint["ema"] = {"decay": self._ema_decay, "state_dict": self._ema_state}
        elif self.ema is not None:
            checkpoint["ema"] = {"decay": self.ema.decay, "state_dict": self.ema.state_dict(self.network)}
        elif self.hparams["ema_decay"] is not None:
            checkpoint["ema"] = {"decay": self.hparams["ema_decay"], "state_dict": None}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved, wanted = checkpoint.get("ema"), self.hparams["ema_decay"]
        if self._trainer is not None and self.trainer.training:
            if saved is None and wanted is not None:
                raise ValueError(
                    "cannot resume: model.ema_decay is set but the checkpoint has no averaged weights: "
                    "set --model.ema_decay null, or start anew with --model.weights"
                )
            if saved is not None and wanted is None:
                raise ValueError(
                    "cannot resume: the checkpoint has averaged weights, which would be lost: "
                    f"set --model.ema_decay {saved['decay']}, or start anew with --model.weights"
                )
        self._ema_state = None if saved is None else saved["state_dict"]
        self._ema_decay = None if saved is None else saved["decay"]
        if self._ema_state is None:
            self.ema = None
