"""The evaluation half of the LightningModule: metrics of raw and averaged weights over labels or sets of labels, over
all or some of the classes, from one or several views of each image; and prediction.

Shapes: B batch, V views of an image, C channels, H height, W width, K classes, L labels that an image has at most. A
label of -1 marks padding: it counts in no metric or loss.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from hornet_lit.optim import Ema

Batch = tuple[torch.Tensor, torch.Tensor]
PADDING = -1
CALIBRATION_BINS = 15


class EvaluatedModule(pl.LightningModule):
    """Scores and predicts with `network` and, where there are any, with the averaged weights in `ema`.

    A subclass sets both, makes `metrics` by `new_metrics` when it knows the number of classes, and has the
    hyper-parameter `predict_weights`.

    `test` compares only the logits of the labels in the datamodule's `scored_classes`, where it has any.
    """

    network: nn.Module | None
    ema: Ema | None
    metrics: nn.ModuleDict

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, torch.Tensor]:
        return self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, torch.Tensor]:
        scored = getattr(getattr(self.trainer, "datamodule", None), "scored_classes", None)
        return self._evaluate("test", batch, scored)

    def _evaluate(self, stage: str, batch: Batch, scored: list[int] | None = None) -> dict[str, torch.Tensor]:
        """Score raw and, where there are any, averaged weights; gives what `_score` does of the last ones scored."""
        scores = self._score(stage, "", batch, scored)
        if self.ema is not None:
            with self.ema.swapped(self.network):
                scores = self._score(stage, "_ema", batch, scored)
        return scores

    def _score(self, stage: str, suffix: str, batch: Batch, scored: list[int] | None) -> dict[str, torch.Tensor]:
        """Updates and logs the metrics; gives logits (B, K) and the one label (B,) that each image was held to."""
        x, y = batch
        logits_BK = self._logits(x, scored)
        y_B = nearest_label(logits_BK, y)
        loss_B = F.cross_entropy(logits_BK, y_B, ignore_index=PADDING, reduction="none")
        for name, metric in self.metrics[stage + suffix].items():
            if name == "loss":
                metric.update(loss_B[y_B != PADDING])
            elif name == "ece":
                metric.update(logits_BK.double().softmax(dim=1), y_B)
            else:
                metric.update(logits_BK, y_B)
            self.log(
                f"{stage}/{name}{suffix}",
                metric,
                on_step=False,
                on_epoch=True,
                batch_size=len(y_B),
                prog_bar=name == "acc1",
            )
        return {"logits": logits_BK, "label": y_B}

    def _logits(self, x: torch.Tensor, scored: list[int] | None = None) -> torch.Tensor:
        """Float32 logits (B, K) of x_BCHW; of x_BVCHW the logarithm of the probabilities' mean over the views.

        Classes that are not in `scored` get -inf, that is the probability 0.
        """
        if x.ndim == 5:  # one view after the other: memory for B images is what the user's batch size promised
            log_p_VBK = torch.stack([self._logits(x_BCHW, scored).log_softmax(dim=1) for x_BCHW in x.unbind(1)])
            return log_p_VBK.logsumexp(dim=0) - math.log(len(log_p_VBK))
        logits_BK = self(x).float()
        if scored is not None:
            others_K = torch.ones(logits_BK.shape[1], dtype=torch.bool)
            others_K[scored] = False
            logits_BK = logits_BK.masked_fill(others_K.to(logits_BK.device), -math.inf)
        return logits_BK

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, torch.Tensor]:
        """(x_BCHW or x_BVCHW, index_B) → {"index": index_B, "probability": (B, K) in float32, mean over the views}."""
        x, index_B = batch
        choice = self.hparams["predict_weights"]
        if choice == "ema" and self.ema is None:
            raise ValueError("the checkpoint has no averaged weights: set --model.predict_weights raw")
        averaged = self.ema is not None and choice != "raw"
        with self.ema.swapped(self.network) if averaged else nullcontext():
            logits_BK = self._logits(x)
        return {"index": index_B, "probability": logits_BK.softmax(dim=1)}


def nearest_label(logits_BK: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The one label (B,) to hold each image to: y_B as it is; of sets y_BL, padded with -1, the most probable label.

    With that label a prediction counts as right exactly if it is in the set, for any top-k, and the loss is that of the
    nearest right answer.
    """
    if y.ndim == 1:
        return y
    logits_BL = logits_BK.gather(1, y.clamp(min=0)).masked_fill(y == PADDING, -math.inf)
    return y.gather(1, logits_BL.argmax(dim=1, keepdim=True))[:, 0]


def new_metrics(classes: int) -> nn.ModuleDict:
    """Of each stage and set of weights: what is logged, by name."""
    return nn.ModuleDict({stage: _metrics_of(classes, stage) for stage in ("val", "val_ema", "test", "test_ema")})


def _metrics_of(classes: int, stage: str) -> nn.ModuleDict:
    # float64: a running mean in float32 over ImageNet's validation set is off in the sixth digit.
    metrics = {"loss": MeanMetric().set_dtype(torch.float64)}
    for k in (1, 5):
        if k < max(classes, 2):
            metrics[f"acc{k}"] = MulticlassAccuracy(classes, top_k=k, average="micro", ignore_index=PADDING)
    if stage.startswith("test"):
        metrics["ece"] = MulticlassCalibrationError(classes, n_bins=CALIBRATION_BINS, ignore_index=PADDING)
    return nn.ModuleDict(metrics)
