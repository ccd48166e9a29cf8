"""test_report/: what a test found, as tables and a picture.

Every rank keeps three numbers an image; they are gathered once, at the end, so that the tables are exact for any number
of ranks, and no matrix of all classes by all classes is held while the network runs.

Shape legend: B images of a batch, N images of the set, K classes of the network, M classes that occur.
"""

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torchmetrics.utilities.distributed import gather_all_tensors

from .names import class_names_of, in_words
from .outcomes import ClassRow, Outcomes
from .pictures import only_a_warning
from .report_drawing import draw_report

MOST_CLASSES = 2000  # whose pairs are written out: the table has 8 MB at that number


class EvaluationReport(Callback):
    """Write what `trainer.test` found into a folder: `classes.csv`, `confusion.csv` and `report.png`.

    - classes.csv: a row per class that occurs, as label or as prediction: `class` (its number), `name`, `images`,
      `correct`, `accuracy`, and the class that its other images are most often taken for: `confused_class`,
      `confused_name`, `confused_images`.
    - confusion.csv: images by label (rows) and prediction (columns), for the same classes.
    - report.png: that matrix, the weakest classes, the most frequent confusions, and accuracy against confidence.

    All are of the averaged (EMA) weights where the module has an `ema`, and the picture says which. Above 2000 classes
    the matrix is left out, with a line that says so. Earlier files are replaced; process 0 writes.

    `test_step` must return `{"logits": logits_BK, "label": label_B}` with label −1 on padding. Class names come from
    the module's `class_names`, else from the datamodule's; ImageNet's wnids are put into words. The picture's heading
    tells the datamodule's `evaluation_set` and `views`, if it has any, and what was logged as `test/…`.

    Args:
        output: the folder; it is made where it is missing.

    Raises:
        ValueError: `output` is a file, or cannot be written to.
    """

    def __init__(self, output: str = "test_report") -> None:
        self.output = output
        self._rows: list[torch.Tensor] = []
        self._classes = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "test" and Path(self.output).is_file():
            raise ValueError(f"report output {self.output!r} is a file: name a folder")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows, problem = [], None
        if trainer.is_global_zero and not trainer.fast_dev_run:  # before the test, whose numbers would be lost
            try:
                Path(self.output).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                problem = f"the report cannot be written: {error}"
            else:
                problem = None if os.access(self.output, os.W_OK) else f"{self.output!r} cannot be written to"
        self._raise_everywhere(trainer, problem)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not isinstance(outputs, dict) or not {"logits", "label"} <= outputs.keys():
            raise ValueError('EvaluationReport needs a test_step that returns {"logits": …, "label": …}')
        logits_BK, label_B = outputs["logits"].detach().float(), outputs["label"]
        predicted_B = logits_BK.argmax(dim=1)  # as accuracy does; among probabilities, several can be 1.0
        confidence_B = logits_BK.softmax(dim=1).gather(1, predicted_B[:, None])[:, 0]
        # One tensor is one collective call; float32 holds whole numbers up to 2^24.
        self._classes = logits_BK.shape[1]
        self._rows.append(torch.stack([label_B.float(), predicted_B.float(), confidence_B], dim=1))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather and write. Every rank raises what went wrong on rank 0, so that none waits for another."""
        row_N3, self._rows = torch.cat(self._rows), []
        if trainer.world_size > 1:
            row_N3 = torch.cat(gather_all_tensors(row_N3))
        problem = None
        if trainer.is_global_zero and not trainer.fast_dev_run:
            label_N, predicted_N, confidence_N = row_N3.cpu().numpy().T
            outcomes = Outcomes(label_N=label_N, predicted_N=predicted_N, confidence_N=confidence_N)
            try:
                self._write(trainer, outcomes, weights="raw" if getattr(pl_module, "ema", None) is None else "EMA")
            except OSError as error:
                problem = f"the report cannot be written: {error}"
        self._raise_everywhere(trainer, problem)

    @staticmethod
    def _raise_everywhere(trainer: Trainer, problem: str | None) -> None:
        problem = trainer.strategy.broadcast(problem)
        if problem is not None:
            raise ValueError(f"{problem}\nname another folder: --report.output FOLDER")

    def _write(self, trainer: Trainer, outcomes: Outcomes, *, weights: str) -> None:
        folder = Path(self.output)
        table = outcomes.table()
        names = class_names_of(trainer) or [str(number) for number in range(self._classes)]
        words = in_words(names)
        _write_csv(folder / "classes.csv", _class_rows(table, names, words))
        count_MM = None
        if len(table) <= MOST_CLASSES:
            count_MM = outcomes.matrix([row.label for row in table])
            shown = [names[row.label] for row in table]
            rows = ([name, *counts] for name, counts in zip(shown, count_MM.tolist(), strict=True))
            _write_csv(folder / "confusion.csv", [["label \\ prediction", *shown], *rows])
        else:
            (folder / "confusion.csv").unlink(missing_ok=True)  # an earlier test's would pass for this one's
            print(f"no confusion matrix: {len(table)} classes occur, and it is for at most {MOST_CLASSES}", flush=True)
        data = getattr(trainer, "datamodule", None)
        tested = getattr(data, "evaluation_set", None) or "test"
        views = "" if (kind := getattr(data, "views", "center")) == "center" else f", views {kind}"
        with only_a_warning("report.png"):
            draw_report(
                picture=folder / "report.png",
                title=f"{tested}: {outcomes.correct} of {len(outcomes.label_N)} images right, {weights} weights{views}",
                metrics={name: float(value) for name, value in trainer.callback_metrics.items()},
                outcomes=outcomes,
                count_MM=count_MM,
                class_names=words,
            )
        print(f"test report: {folder.resolve()}", flush=True)


def _class_rows(table: Sequence[ClassRow], names: Sequence[str], words: Sequence[str]) -> Iterable[Sequence[object]]:
    full = [name if name == text else f"{name} {text}" for name, text in zip(names, words, strict=True)]
    yield "class", "name", "images", "correct", "accuracy", "confused_class", "confused_name", "confused_images"
    for row in table:
        accuracy = f"{row.correct / row.images:.6g}" if row.images else ""
        other = ("", "", "") if row.confused is None else (row.confused, full[row.confused], row.confused_images)
        yield row.label, full[row.label], row.images, row.correct, accuracy, *other


def _write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    os.replace(temporary, path)
