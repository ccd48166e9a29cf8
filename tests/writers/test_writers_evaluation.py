"""EvaluationReport: its tables against scikit-learn's counts, and what its picture shows."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from sklearn.metrics import confusion_matrix
from writer_doubles import NAMES, TinyData, TinyModule, quiet_trainer

from hornet_lit.writers import EvaluationReport, evaluation
from hornet_lit.writers.names import in_words
from hornet_lit.writers.outcomes import Confusion, Outcomes
from hornet_lit.writers.report_drawing import draw_report


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB")).astype(int)


def rows(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def outcomes(label: list[int], predicted: list[int], confidence: list[float] | None = None) -> Outcomes:
    return Outcomes(
        label_N=np.array(label, dtype=np.float32),
        predicted_N=np.array(predicted, dtype=np.float32),
        confidence_N=np.array(confidence or [0.5] * len(label), dtype=np.float32),
    )


def run_test(folder: Path, *, count: int, module: LightningModule | None = None) -> Path:
    trainer = quiet_trainer(callbacks=[EvaluationReport(output=str(folder))])
    trainer.test(module or TinyModule(), datamodule=TinyData(count=count), verbose=False)
    return folder


def test_tables_of_a_test(tmp_path: Path) -> None:
    report = run_test(tmp_path / "deep" / "report", count=40)
    module, data = TinyModule(), TinyData(count=40)
    data.trainer = quiet_trainer()
    images = data.test_dataloader().dataset
    with torch.no_grad():
        predicted = module.logits(images.x_NCHW).argmax(1).tolist()
    expected_KK = confusion_matrix(images.y_N, predicted, labels=range(7))
    occurs = [k for k in range(7) if expected_KK[k].any() or expected_KK[:, k].any()]

    head, *matrix = rows(report / "confusion.csv")
    assert head[1:] == [NAMES[k] for k in occurs] == [row[0] for row in matrix]
    assert [[int(cell) for cell in row[1:]] for row in matrix] == expected_KK[np.ix_(occurs, occurs)].tolist()
    table = [dict(zip(rows(report / "classes.csv")[0], row, strict=True)) for row in rows(report / "classes.csv")[1:]]
    assert [int(row["class"]) for row in table] == occurs and [row["name"] for row in table] == head[1:]
    for row in table:
        k = int(row["class"])
        counts_K = expected_KK[k].copy()
        assert (int(row["images"]), int(row["correct"])) == (counts_K.sum(), counts_K[k])
        assert float(row["accuracy"]) == pytest.approx(counts_K[k] / counts_K.sum(), rel=1e-5)
        counts_K[k] = 0
        assert row["confused_images"] == (str(counts_K.max()) if counts_K.any() else "")
        assert row["confused_name"] == (NAMES[counts_K.argmax()] if counts_K.any() else "")
    assert pixels(report / "report.png").shape[1] > 1000


def test_counting() -> None:
    found = outcomes([4, 4, 4, 9, 9, -1, 2], [4, 9, 9, 4, 9, 0, 4], [0.9, 0.5, 0.4, 0.05, 1.0, 0.3, 0.2])
    assert found.correct == 2 and len(found.label_N) == 6
    pairs = [(4, 9, 2, 3), (2, 4, 1, 1), (9, 4, 1, 2)]  # the most frequent first, then the larger share of its class
    assert found.confusions() == [Confusion(label=a, predicted=b, images=n, of=of) for a, b, n, of in pairs]
    assert [(row.label, row.images, row.correct, row.confused, row.confused_images) for row in found.table()] == [
        (2, 1, 0, 4, 1),
        (4, 3, 1, 9, 2),
        (9, 2, 1, 4, 1),
    ]
    assert found.matrix([2, 4, 9]).tolist() == [[0, 1, 0], [0, 1, 2], [0, 1, 1]]
    images, confidence, accuracy = found.reliability()
    assert images.tolist() == [1, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1]
    assert confidence[14] == 1 and accuracy[[0, 14]].tolist() == [0, 1] and np.isnan(accuracy[1])


def test_a_class_that_is_only_predicted_has_no_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TinyModule, "logits", lambda self, x_BCHW: torch.eye(7)[torch.full((len(x_BCHW),), 5)])
    assert [row[0] for row in rows(run_test(tmp_path, count=3) / "classes.csv")[1:]] == ["0", "1", "2", "5"]
    assert rows(tmp_path / "classes.csv")[4] == ["5", NAMES[5], "0", "0", "", "", "", ""]


@pytest.mark.parametrize("weights", ["raw", "EMA"])
def test_the_picture_says_whose_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    drawn = {}
    monkeypatch.setattr(evaluation, "draw_report", lambda **kwargs: drawn.update(kwargs))
    module = TinyModule()
    module.ema = "averages" if weights == "EMA" else None
    run_test(tmp_path, count=9, module=module)
    assert drawn["title"].startswith("test: ") and drawn["title"].endswith(f"of 9 images right, {weights} weights")


def test_too_many_classes_for_a_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_test(tmp_path, count=20)
    monkeypatch.setattr(evaluation, "MOST_CLASSES", 3)
    run_test(tmp_path, count=20)
    assert "no confusion matrix: 7 classes occur, and it is for at most 3" in capsys.readouterr().out
    assert not (tmp_path / "confusion.csv").exists() and len(rows(tmp_path / "classes.csv")) == 8


def test_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ValueError, match="is a file: name a folder"):
        run_test(tmp_path / "taken", count=3)
    with pytest.raises(ValueError, match=r"the report cannot be written: .*taken"):
        run_test(tmp_path / "taken" / "report", count=3)
    assert (tmp_path / "taken").read_text() == "mine"


def test_output_that_cannot_be_written_to_is_told_before_the_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation.EvaluationReport, "on_test_batch_end", lambda *_, **__: pytest.fail("tested"))
    monkeypatch.setattr("os.access", lambda path, mode: False)  # who runs the tests may write anywhere
    with pytest.raises(ValueError, match=r"cannot be written to\n.*--report\.output"):
        run_test(tmp_path, count=3)


@pytest.mark.parametrize("classes", [10, 1000])
def test_a_confusion_shows_in_the_matrix(tmp_path: Path, classes: int) -> None:
    """Twenty images a class, all right but one of class 0, which is taken for the last: the top right corner."""
    label = np.repeat(np.arange(classes), 20).tolist()
    sheets = []
    for wrong in (classes - 1, 0):
        found = outcomes(label, [wrong, *label[1:]], [0.95] * len(label))
        picture = tmp_path / f"{wrong}.png"
        names = [f"$class$ {k}" for k in range(classes)]
        count_MM = found.matrix(range(classes))
        draw_report(picture=picture, title="t", metrics={}, outcomes=found, count_MM=count_MM, class_names=names)
        sheets.append(pixels(picture))
    height, width, _ = sheets[0].shape
    changed_HW = np.abs(sheets[0] - sheets[1]).max(axis=2) > 8
    # the matrix alone: left of the bars and lists
    row_N, column_N = np.nonzero(changed_HW[:, : int(0.58 * width)])
    assert ((row_N < 0.3 * height) & (column_N > 0.4 * width)).sum() >= 16, "less than four by four pixels"


def test_one_class_without_a_mistake_and_no_matrix(tmp_path: Path) -> None:
    found, names = outcomes([3, 3], [3, 3]), [str(k) for k in range(10)]
    draw_report(
        picture=tmp_path / "a.png", title="t", metrics={}, outcomes=found, count_MM=found.matrix([3]), class_names=names
    )
    draw_report(picture=tmp_path / "b.png", title="t", metrics={}, outcomes=found, count_MM=None, class_names=names)
    assert pixels(tmp_path / "a.png").shape == pixels(tmp_path / "b.png").shape


def test_wnids_in_words() -> None:
    assert in_words(["n01440764", "n99999999", "cat"]) == ["tench, Tinca tinca", "n99999999", "cat"]
    assert in_words(["7", "seven"]) == ["7", "seven"]
