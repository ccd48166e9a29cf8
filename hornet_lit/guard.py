"""Optimizer steps whose loss or gradients are not finite: found before the weights change, told with their cause."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from hornet_lit.last import save_last


class NonFiniteError(RuntimeError):
    """Training met a loss or gradient that is not finite."""


class GuardedModule(pl.LightningModule):
    """Judges each step by its loss and the norm of its gradients, all processes alike.

    A subclass sets `network`, has the hyper-parameter `skip_nonfinite`, calls `may_step` with the gradients in place,
    before anything changes them, and hands its hooks on. A checkpoint holds "skipped_steps".
    """

    network: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.skipped_steps = 0

    def may_step(self, *, loss: Tensor, norm: Tensor, judged: Tensor, batch_idx: int, lr: float) -> bool:
        """Whether to take the step. If not, its gradients are gone: the optimizer then changes nothing.

        Args:
            loss, norm: 0-d, of this process's last batch, and of all gradients.
            judged: what has to be finite beside the loss: the norm, or the loss itself where a scaler skips steps.
            batch_idx: of that batch, within the epoch.
            lr: learning rate, for the message.

        Raises:
            NonFiniteError: something is not finite and `skip_nonfinite` steps have been skipped. The details are in
                the run's folder, and so is a checkpoint from before this step.
        """
        finite = torch.stack((loss, judged)).isfinite().all().to(torch.uint8)
        if distributed.is_initialized():
            distributed.all_reduce(finite, op=distributed.ReduceOp.MIN)
        if finite:
            return True
        norms = stage_norms(self.network)
        told = (
            f"at batch {batch_idx} of epoch {self.current_epoch} (step {self.global_step}): loss {loss.item():g}, "
            f"gradient norm {norm.item():g}, learning rate {lr:g}"
        )
        where = self._dump({"loss": loss.item(), "gradient_norm": norm.item(), "learning_rate": lr}, norms, batch_idx)
        cap = self.hparams["skip_nonfinite"]
        if self.skipped_steps < cap:
            self.skipped_steps += 1
            rank_zero_warn(f"step skipped {told} ({self.skipped_steps} of {cap} that may be; model.skip_nonfinite)")
            self.network.zero_grad(set_to_none=True)
            return False
        stages = [name for name, value in norms.items() if not math.isfinite(value)]
        saved = self._save_before()
        lines = [f"training stopped {told}"]
        lines.append(f"not finite: the gradients of {', '.join(stages)}" if stages else "the gradients are finite")
        if where is not None:
            lines[-1] += f"; details in {where}"
        if saved is not None:
            lines.append(
                f"go on from before this step with --ckpt_path {saved} and --model.skip_nonfinite {max(1, 2 * cap)}, "
                "--trainer.precision 32-true or a lower --trainer.gradient_clip_val"
            )
        lines.append("or train anew with a lower model.lr or a longer model.warmup_epochs")
        raise NonFiniteError("\n".join(lines))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["skipped_steps"] = self.skipped_steps
        super().on_save_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped_steps = checkpoint.get("skipped_steps", 0)
        super().on_load_checkpoint(checkpoint)

    def _dump(self, values: dict[str, float], norms: dict[str, float], batch_idx: int) -> Path | None:
        """Writes what is known of the step to the run's folder; None where there is none. All processes call it."""
        folder = self.trainer.log_dir
        if folder is None or not self.trainer.loggers or self.trainer.fast_dev_run:
            return None
        path = Path(folder, f"nonfinite-step{self.global_step}.json")
        images_of_step = getattr(getattr(self.trainer, "datamodule", None), "images_of_step", None)
        contents: dict[str, Any] = {
            "step": self.global_step,
            "epoch": self.current_epoch,
            "batch": batch_idx,
            "precision": str(self.trainer.precision),
            **{name: _plain(value) for name, value in values.items()},
            "gradient_norms": {name: _plain(value) for name, value in norms.items()},
            "images": images_of_step(self.current_epoch, batch_idx) if images_of_step else None,
        }
        if self.trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
        return path

    def _save_before(self) -> Path | None:
        """Saves the training as it was before the step. All processes call it."""
        loop = self.trainer.fit_loop.epoch_loop
        # The batches that were accumulated for this step have to come again.
        back = loop.batch_progress.current.processed % self.trainer.accumulate_grad_batches
        for counters in (loop.batch_progress.current, loop.batch_progress.total):
            counters.ready = counters.started = counters.completed = counters.processed = counters.processed - back
        return save_last(self.trainer)


def stage_norms(network: nn.Module) -> dict[str, float]:
    """2-norms of the gradients of the network's parts, by the beginning of their parameters' names.

    Under FSDP2 all processes call it.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, p in network.named_parameters():
        if p.grad is not None:
            first, _, rest = name.partition(".")
            number = rest.partition(".")[0]
            parts.setdefault(f"{first}.{number}" if number.isdigit() else first, []).append(p.grad)
    norms = {name: nn.utils.get_total_norm(gradients) for name, gradients in parts.items()}
    return {name: (n.full_tensor() if isinstance(n, DTensor) else n).item() for name, n in norms.items()}


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else f"{value:g}"  # JSON has no nan
