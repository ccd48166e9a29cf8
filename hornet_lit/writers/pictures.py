"""curves.png and predictions.png: a run's learning curves, and validation images with what the network says of them.

matplotlib is imported where it draws (drawing.py), and only its object API is used: no pyplot state, no window, no
start-up cost.
A picture that fails is a warning: a month of training must not end because a font is missing.

Shape legend: B images of a batch, K classes, C channels, H × W pixels.
"""

import heapq
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from .drawing import COLUMNS, Shown, draw_curves, draw_sheet
from .names import class_names_of

REDRAW_SHARE = 0.02  # of the running time may go into redrawing the curves of a run in progress


class LearningCurves(Callback):
    """Draw curves.png beside the CSVLogger's metrics.csv: loss, top-1, learning rate and gradient norm against epochs.

    Drawn when fit ends, also by an exception or Ctrl-C, and after validations in between as long as that takes under
    2 % of the time, so that a running job can be looked at. `draw_curves` draws the same from any metrics.csv.

    It reads `train/loss`, `val/loss`, `val/loss_ema`, `val/acc1`, `val/acc1_ema` (fractions, drawn as percent),
    `train/lr` and `train/grad_norm`, and leaves out what was not logged. Without a CSVLogger there is a warning.
    """

    def __init__(self) -> None:
        self._next = -math.inf  # time.monotonic() from which the next drawing in between is due

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run and _csv_logger(trainer) is None:
            rank_zero_warn("LearningCurves draws from metrics.csv: add a CSVLogger to trainer.logger to get curves.png")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and time.monotonic() >= self._next:
            started = time.monotonic()
            self._draw(trainer, final=False)
            now = time.monotonic()
            self._next = now + (now - started) / REDRAW_SHARE

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, final=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._draw(trainer, final=False)

    def _draw(self, trainer: Trainer, *, final: bool) -> None:
        logger = _csv_logger(trainer)
        if logger is None or not trainer.is_global_zero:
            return
        with only_a_warning("curves.png"):
            logger.save()  # rows not yet written out; Lightning mostly has, other users of the logger need not have
            metrics = Path(logger.log_dir, "metrics.csv")
            drawn = metrics.is_file() and draw_curves(metrics=metrics, picture=metrics.with_name("curves.png"))
            if final and drawn:
                print(f"learning curves: {metrics.with_name('curves.png').resolve()}", flush=True)
            elif final:
                rank_zero_warn(f"no learning curves: {metrics} has no loss, accuracy, learning rate or gradient norm")


class PredictionSheet(Callback):
    """Draw predictions.png: validation (or test) images with true class, predicted class and its probability.

    Two thirds are spread evenly over the set, one third are the mistakes made with most confidence; every mistake is
    marked in red and with a cross. From the last complete validation of a fit, or from validate or test, into
    `trainer.log_dir`. With several processes, of the images that process 0 saw: its share is an even one. Without a
    logger it is drawn into `default_root_dir` where one was given; else there is a warning and no sheet.

    `validation_step` and `test_step` must return `{"logits": logits_BK}`, and `"label": label_B` where the batch's own
    labels are sets; batches are `(x_BCHW, y_B)` with label −1 on padding, or x_BVCHW, of whose V views the first is
    drawn; `trainer.datamodule.denormalise(x_BCHW)` gives uint8 pixels. Memory: 3 × `num_images` images in uint8.

    Args:
        num_images: most images on the sheet, at least 1; 48 make six full rows.
    """

    def __init__(self, num_images: int = 48) -> None:
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}: ask for at least 1 image on the sheet")
        self.num_images = num_images
        self._folder: Path | None = None
        self._collecting: _Collector | None = None
        self._complete: _Collector | None = None
        self._title = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # log_dir is a collective call: every rank must make it, which on_exception could not promise
        folder = trainer.log_dir or trainer.default_root_dir
        self._folder = None if trainer.fast_dev_run or stage == "predict" else Path(folder)
        self._collecting = self._complete = None
        # Lightning puts the working directory for a default_root_dir that was not given: no place of ours to fill.
        if self._folder is not None and not trainer.loggers and self._folder.resolve() == Path.cwd():
            rank_zero_warn("no predictions.png: there is no run folder; give trainer.logger, or default_root_dir")
            self._folder = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect(trainer, outputs, batch, dataloader_idx)

    on_test_start, on_test_batch_end = on_validation_start, on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, f"Validation images after epoch {trainer.current_epoch + 1}")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, "Test images")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._draw(trainer)

    def _start(self, trainer: Trainer) -> None:
        wanted = trainer.is_global_zero and not trainer.sanity_checking and self._folder is not None
        self._collecting = _Collector(num_images=self.num_images) if wanted else None

    def _collect(self, trainer: Trainer, outputs: Any, batch: Any, dataloader_idx: int) -> None:
        if self._collecting is None or dataloader_idx != 0:
            return
        denormalise = getattr(getattr(trainer, "datamodule", None), "denormalise", None)
        if denormalise is None or not isinstance(outputs, dict) or "logits" not in outputs:
            rank_zero_warn(
                'no predictions.png: it needs a datamodule with denormalise and a step that returns {"logits": …}'
            )
            self._collecting = self._folder = None
            return
        x, y = batch
        self._collecting.add(
            x_BCHW=x[:, 0] if x.ndim == 5 else x,
            y_B=outputs.get("label", y),
            logits_BK=outputs["logits"],
            denormalise=denormalise,
        )

    def _finish(self, trainer: Trainer, title: str) -> None:
        if self._collecting is None:
            return
        self._complete, self._collecting = self._collecting, None
        self._title = title if trainer.state.fn != TrainerFn.VALIDATING else "Validation images"
        if trainer.state.fn != TrainerFn.FITTING:
            self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        sheet, self._complete = self._complete, None
        if sheet is None or self._folder is None or sheet.seen == 0:
            return
        with only_a_warning("predictions.png"):
            picture = self._folder / "predictions.png"
            share = f" (the share of process 0 of {trainer.world_size})" if trainer.world_size > 1 else ""
            title = f"{self._title}: {sheet.right} of {sheet.seen} right, {100 * sheet.right / sheet.seen:.1f} %{share}"
            draw_sheet(
                picture=picture,
                title=title,
                spread=sheet.spread(),
                mistakes=sheet.mistakes(),
                class_names=class_names_of(trainer),
            )
            print(f"prediction sheet: {picture.resolve()}", flush=True)


class _Collector:
    """Keep an even spread of a stream of images of unknown length, and its most confident mistakes.

    The spread keeps every `stride`-th image and doubles the stride whenever it holds twice what is asked for: bounded,
    without random numbers, and the same whatever the batch size.
    """

    def __init__(self, *, num_images: int) -> None:
        self.num_images = num_images
        self.num_mistakes = num_images // 3
        self.seen = 0
        self.right = 0
        self._stride = 1
        self._spread: list[Shown] = []
        self._mistakes: list[tuple[float, int, Shown]] = []  # a heap, the least confident first

    def add(self, *, x_BCHW: Tensor, y_B: Tensor, logits_BK: Tensor, denormalise: Callable[[Tensor], Tensor]) -> None:
        probability_BK = logits_BK.detach().float().softmax(dim=1)
        probability_B, predicted_B = probability_BK.max(dim=1)
        true_B = probability_BK.gather(1, y_B.clamp(min=0)[:, None])[:, 0]
        said_3B = torch.stack([predicted_B.double(), probability_B.double(), true_B.double()]).cpu()
        labels, (predicted, probability, of_label) = y_B.tolist(), said_3B.tolist()

        for b, label in enumerate(labels):
            if label == -1:
                continue
            position, wrong = self.seen, predicted[b] != label
            self.seen += 1
            self.right += not wrong
            rank = (probability[b], -position)  # of equally confident mistakes the first stays
            worst = wrong and self.num_mistakes > 0 and (self._has_room() or rank > self._mistakes[0][:2])
            if position % self._stride and not worst:
                continue
            shown = Shown(
                position=position,
                pixels_HWC=_pixels(denormalise(x_BCHW[b : b + 1])[0]),
                label=label,
                predicted=int(predicted[b]),
                probability=probability[b],
                probability_of_label=of_label[b],
            )
            if worst:
                push = heapq.heappush if self._has_room() else heapq.heapreplace
                push(self._mistakes, (*rank, shown))
            if position % self._stride == 0:
                self._spread.append(shown)
                if len(self._spread) > 2 * self.num_images:
                    self._spread, self._stride = self._spread[::2], 2 * self._stride

    def mistakes(self) -> list[Shown]:
        """The mistakes, the most confident first."""
        return [shown for _, _, shown in sorted(self._mistakes, key=lambda entry: entry[:2], reverse=True)]

    def spread(self) -> list[Shown]:
        """An even spread, in the order seen, that fills the sheet up beside the mistakes, in full rows if it can."""
        wanted = self.num_images - len(self._mistakes)
        if wanted > COLUMNS:
            wanted -= wanted % COLUMNS
        wanted = min(wanted, len(self._spread))
        places = np.linspace(0, len(self._spread) - 1, wanted).round().astype(int)
        return [self._spread[place] for place in places]

    def _has_room(self) -> bool:
        return len(self._mistakes) < self.num_mistakes


def _pixels(x_CHW: Tensor) -> np.ndarray:
    channels = 3 if x_CHW.shape[0] >= 3 else 1
    assert x_CHW.dtype == torch.uint8, f"denormalise gave {x_CHW.dtype}, not uint8"
    return x_CHW[:channels].permute(1, 2, 0).cpu().contiguous().numpy()


def _csv_logger(trainer: Trainer) -> CSVLogger | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)


@contextmanager
def only_a_warning(picture: str) -> Iterator[None]:
    """Whatever goes wrong with a picture is worth a line, and never the run that it pictures."""
    try:
        yield
    except Exception as error:  # a full disk, a font, matplotlib: a run of days must not end of any
        rank_zero_warn(f"{picture} could not be drawn: {type(error).__name__}: {error}")
