"""LearningCurves and PredictionSheet: what their pixels show, from a known csv and from known images."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from writer_doubles import TinyData, TinyModule, quiet_trainer

from hornet_lit.writers import LearningCurves, PredictionSheet
from hornet_lit.writers.drawing import BLUE, GREEN, GREY, ORANGE, RED, Shown, draw_curves, draw_sheet, read_metrics
from hornet_lit.writers.names import short_name
from hornet_lit.writers.pictures import _Collector


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB")).astype(int)


def where(picture_HWC: np.ndarray, colour: str, *, off: int = 0) -> np.ndarray:
    """Rows and columns (N, 2) of the pixels of a `#rrggbb` colour."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return np.argwhere(np.abs(picture_HWC - rgb).max(axis=2) <= off)


def write_metrics(folder: Path, rows: list[dict[str, object]]) -> Path:
    path = folder / "metrics.csv"
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, sorted({name for row in rows for name in row}))
        table.writeheader()
        table.writerows(rows)
    return path


def test_curves_of_a_known_csv(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = []
    for epoch in range(10):
        rows += [{"epoch": epoch, "step": 100 * epoch + s, "train/loss": 3 - epoch / 5} for s in range(9, 100, 10)]
        rows.append(
            {"epoch": epoch, "step": 100 * epoch + 99, "val/acc1": epoch / 10, "val/acc1_ema": 0.9 - epoch / 10}
        )
    metrics = write_metrics(tmp_path, rows)
    assert draw_curves(metrics=metrics, picture=tmp_path / "curves.png")
    picture_HWC = pixels(tmp_path / "curves.png")
    height, width, _ = picture_HWC.shape
    assert width == 2 * 672 and height == 456  # two panels: what was not logged takes no room

    # the loss (grey) is in the left panel, falling; raw top-1 (blue) rises and EMA's (orange) falls in the right one
    loss = where(picture_HWC[40:, : width // 2], GREY, off=12)
    left = loss[loss[:, 1] < np.percentile(loss[:, 1], 15), 0].mean()
    assert left < loss[(loss[:, 1] > 300) & (loss[:, 1] < 420), 0].mean()
    for colour, sign in ((BLUE, -1), (ORANGE, 1)):
        assert not len(where(picture_HWC[:, : width // 2], colour))
        line = where(picture_HWC, colour)
        assert len(line) > 300
        assert sign * np.corrcoef(line[:, 1], line[:, 0])[0, 1] > 0.8


def test_metrics_are_read_in_step_order_without_what_is_not_finite(tmp_path: Path) -> None:
    rows = [{"epoch": e, "step": s, "train/loss": v} for e, s, v in [(0, 9, 3.0), (1, 19, "nan"), (1, 15, 2.0)]]
    rows.append({"epoch": 0, "step": 9, "train/loss": 2.5})  # the same step again, after a resume
    curves, steps_per_epoch = read_metrics(write_metrics(tmp_path, rows))
    assert curves["train/loss"].steps.tolist() == [9, 15]
    assert curves["train/loss"].values.tolist() == [2.5, 2.0]
    assert steps_per_epoch == 10


def test_no_metrics_no_picture(tmp_path: Path) -> None:
    assert not draw_curves(metrics=write_metrics(tmp_path, [{"step": 1, "other": 2}]), picture=tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def shown(position: int, *, level: int, right: bool, channels: int = 3) -> Shown:
    pixels_HWC = np.full((16, 16, channels), level, dtype=np.uint8)
    return Shown(
        position=position,
        pixels_HWC=pixels_HWC,
        label=1,
        predicted=1 if right else 0,
        probability=0.75,
        probability_of_label=0.75 if right else 0.2,
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_sheet_of_known_images(tmp_path: Path, channels: int) -> None:
    draw_sheet(
        picture=tmp_path / "sheet.png",
        title="Title",
        spread=[shown(i, level=90, right=True, channels=channels) for i in range(8)],
        mistakes=[shown(9, level=150, right=False, channels=channels)],
        class_names=["a $wrong$ one", "right"],
    )
    picture_HWC = pixels(tmp_path / "sheet.png")
    width = picture_HWC.shape[1]
    assert 1400 < width < 1500
    even, wrong = (where(picture_HWC, f"#{level:02x}{level:02x}{level:02x}") for level in (90, 150))
    assert even.shape[0] > 8 * 150**2 and 150**2 < wrong.shape[0] < 170**2
    assert even[:, 0].max() < wrong[:, 0].min()  # the mistakes lie below
    assert even[:, 1].max() > width - 40 and wrong[:, 1].max() < width / 4  # eight in a row, and one
    green, red = where(picture_HWC, GREEN), where(picture_HWC, RED)
    assert len(green) > 8 * 4 * 150 and len(red) > 4 * 150
    assert red[:, 0].min() > green[:, 0].max()
    assert red[:, 0].max() > wrong[:, 0].max() + 8  # the words below the image
    assert not len(where(picture_HWC[-20:], RED)) and (picture_HWC[-8:] == 255).all()  # nothing runs off the page


def collect(count: int, *, num_images: int, batch: int, wrong: dict[int, float]) -> _Collector:
    """`count` one-pixel images of value position; those in `wrong` are mistaken with that probability."""
    collector = _Collector(num_images=num_images)
    position_N = torch.arange(count)
    for places in position_N.split(batch):
        right = torch.tensor([1 - wrong.get(int(p), 0.1) for p in places])
        padding = torch.tensor([-1])
        collector.add(
            x_BCHW=torch.cat([places, padding]).float()[:, None, None, None],
            y_B=torch.cat([torch.zeros_like(places), padding]),
            logits_BK=torch.cat([torch.stack([right, 1 - right], dim=1), torch.tensor([[0.5, 0.5]])]).log(),
            denormalise=lambda x_BCHW: x_BCHW.to(torch.uint8),
        )
    return collector


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("count", [5, 48, 97, 250])
def test_spread_is_even_and_does_not_depend_on_the_batch_size(count: int, batch: int) -> None:
    collector = collect(count, num_images=16, batch=batch, wrong={})
    positions = [image.position for image in collector.spread()]
    assert [int(image.pixels_HWC[0, 0, 0]) for image in collector.spread()] == positions
    assert collector.seen == collector.right == count
    assert len(positions) == min(16, count) == len(set(positions))
    steps = np.diff([*positions, count])
    assert positions[0] == 0 and steps.max() <= 2 * count / len(positions) + 2
    assert len(collector._spread) <= 2 * 16


@pytest.mark.parametrize("batch", [1, 30])
def test_mistakes_are_the_most_confident_ones(batch: int) -> None:
    wrong = {3: 0.6, 20: 0.9, 21: 0.7, 40: 0.9, 77: 0.55}
    collector = collect(80, num_images=9, batch=batch, wrong=wrong)
    assert [image.position for image in collector.mistakes()] == [20, 40, 21]
    first = collector.mistakes()[0]
    assert (first.label, first.predicted) == (0, 1)
    assert (first.probability, first.probability_of_label) == (pytest.approx(0.9), pytest.approx(0.1))
    assert collector.right == 75 and collector.seen == 80
    assert len(collector.spread()) == 6


@pytest.mark.parametrize("channels", [1, 3])
def test_a_fit_leaves_both_pictures(tmp_path: Path, channels: int, capsys: pytest.CaptureFixture[str]) -> None:
    logger = CSVLogger(tmp_path, name="", version="run", flush_logs_every_n_steps=1000)
    trainer = quiet_trainer(max_epochs=3, logger=logger, callbacks=[LearningCurves(), PredictionSheet(num_images=8)])
    trainer.fit(TinyModule(channels=channels), datamodule=TinyData(count=37, channels=channels))
    for name in ("curves.png", "predictions.png"):
        assert pixels(tmp_path / "run" / name).std() > 20
    out = capsys.readouterr().out
    assert "learning curves: " in out and "prediction sheet: " in out
    # what was drawn held all three epochs
    curves, steps_per_epoch = read_metrics(tmp_path / "run" / "metrics.csv")
    assert len(curves["train/loss"].steps) == 30 and len(curves["val/acc1"].steps) == 3 and steps_per_epoch == 10


def test_curves_of_a_running_job_are_there_after_its_first_validation(tmp_path: Path) -> None:
    seen = []

    class Watcher(TinyModule):
        def on_train_epoch_start(self) -> None:
            seen.append((tmp_path / "run" / "curves.png").exists())

        def training_step(self, batch, batch_idx):
            if self.current_epoch == 2:
                (tmp_path / "run" / "curves.png").unlink()
                raise RuntimeError("stop here")
            return super().training_step(batch, batch_idx)

    logger = CSVLogger(tmp_path, name="", version="run")
    trainer = quiet_trainer(max_epochs=3, logger=logger, callbacks=[LearningCurves(), PredictionSheet(num_images=4)])
    with pytest.raises(RuntimeError, match="stop here"):
        trainer.fit(Watcher(), datamodule=TinyData(count=8))
    assert seen == [False, True, True]
    assert (tmp_path / "run" / "curves.png").exists()  # drawn again on the way out
    assert (tmp_path / "run" / "predictions.png").exists()


@pytest.mark.parametrize("function", ["validate", "test"])
def test_validate_and_test_leave_a_sheet(tmp_path: Path, function: str) -> None:
    trainer = quiet_trainer(default_root_dir=tmp_path, callbacks=[LearningCurves(), PredictionSheet(num_images=4)])
    getattr(trainer, function)(TinyModule(), datamodule=TinyData(count=9), verbose=False)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.png"]


def test_without_a_run_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's default_root_dir is then the working directory, which is not ours to fill."""
    monkeypatch.chdir(tmp_path)
    trainer = quiet_trainer(callbacks=[PredictionSheet(num_images=4)])
    with pytest.warns(UserWarning, match=r"no predictions\.png: there is no run folder"):
        trainer.validate(TinyModule(), datamodule=TinyData(count=9), verbose=False)
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_a_warning(tmp_path: Path) -> None:
    class NoLogits(TinyModule):
        def validation_step(self, batch, batch_idx):
            return None

    callbacks = [LearningCurves(), PredictionSheet()]
    trainer = quiet_trainer(default_root_dir=tmp_path, max_epochs=1, callbacks=callbacks)
    with pytest.warns(UserWarning) as caught:
        trainer.fit(NoLogits(), datamodule=TinyData(count=8))
    said = [str(warning.message) for warning in caught]
    assert sum("add a CSVLogger" in text for text in said) == 1
    assert sum("no predictions.png" in text for text in said) == 1
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="at least 1 image"):
        PredictionSheet(num_images=0)


def test_a_picture_that_fails_does_not_end_the_run(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="run")
    (tmp_path / "run" / "curves.png").mkdir(parents=True)  # nothing can be moved over a folder
    trainer = quiet_trainer(max_epochs=1, logger=logger, callbacks=[LearningCurves()])
    with pytest.warns(UserWarning, match="curves.png could not be drawn: IsADirectoryError"):
        trainer.fit(TinyModule(), datamodule=TinyData(count=8))
    assert trainer.state.finished


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    callbacks = [LearningCurves(), PredictionSheet()]
    trainer = quiet_trainer(default_root_dir=tmp_path, fast_dev_run=2, callbacks=callbacks)
    trainer.fit(TinyModule(), datamodule=TinyData(count=8))
    assert not list(tmp_path.iterdir())


def test_short_names() -> None:
    names = ["tench, Tinca tinca", "American Staffordshire terrier", "two\nlines", ""]
    shortened = [short_name(number=number, class_names=names, letters=12) for number in range(5)]
    assert shortened == ["tench", "American St…", "two lines", "3", "4"]
    assert short_name(number=2, class_names=None, letters=12) == "2"


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    draw_curves(metrics=write_metrics(tmp_path, [{"step": 1, "train/loss": 2}]), picture=tmp_path / "curves.png")
    assert plt.get_fignums() == before and (tmp_path / "curves.png").exists()
