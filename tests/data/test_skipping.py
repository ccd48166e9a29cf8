"""Unreadable images that a training goes on without: which take their place, what is listed, and when it is enough."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import pytest
import torch

from hornet_lit.data import ImageNetDataModule

from .recorder import Recorder, digest, make_trainer
from .test_imagenet import write_split
from .test_resume import run

BAD = ["n01/0.JPEG", "n10/2.JPEG"]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nine images to train on and nine to validate with, two of each unreadable; the first is what pads batches."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        write_split(tmp_path / "data" / split)
        for name in BAD:
            (tmp_path / "data" / split / name).write_bytes(b"<html>")
    return tmp_path / "data"


def module(root: Path, **options) -> ImageNetDataModule:
    defaults = dict(batch_size=3, batch_size_per_device=None, eval_batch_size=4, num_workers=0, img_size=16)
    return ImageNetDataModule(root=str(root), **defaults | options)


def listed(path: Path) -> list[str]:
    with open(path, newline="") as file:
        return sorted({row[0] for row in csv.reader(file)})


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_with_images_drawn_from_seed_epoch_and_index(root: Path, workers: int) -> None:
    def batches(**options) -> list[tuple[str, list[int]]]:
        data = module(root, skip_unreadable=2, **options)
        data.setup("fit")
        return [(digest(x_BCHW), y_B.tolist()) for x_BCHW, y_B in data.train_dataloader()]

    seen = batches(num_workers=workers)
    assert len(seen) == 3 and all(0 <= label < 3 for _, labels in seen for label in labels)
    assert listed(Path("unreadable_train.csv")) == [str(root / "train" / name) for name in BAD]
    Path("unreadable_train.csv").unlink()
    assert seen == batches()
    assert seen != batches(seed=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_one_more_than_allowed_is_an_error_that_names_it_and_the_list(root: Path, workers: int) -> None:
    data = module(root, skip_unreadable=1, num_workers=workers)
    data.setup("fit")
    message = r"more than data\.skip_unreadable 1 images of .*train cannot be read, the last is .*unreadable_train\.csv"
    with pytest.raises(ValueError, match=message):
        list(data.train_dataloader())
    if workers:
        return
    with pytest.raises(ValueError, match=message.replace("train", "val")):
        list(data.val_dataloader())
    for path in (root / "train").glob("*/*"):
        path.write_bytes(b"")
    data = module(root, skip_unreadable=1000)
    data.setup("fit")
    with pytest.raises(ValueError, match="cannot read image"):  # and no search without end
        list(data.train_dataloader())


def test_every_checkpoint_of_a_training_that_skips_continues_it(root: Path, tmp_path: Path) -> None:
    def make() -> ImageNetDataModule:
        return module(root, skip_unreadable=2)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cannot be read.*")
        whole, saver = run(tmp_path / "whole", make, max_epochs=2)
        assert len(set(whole.seen)) == 6
        for number, (path, trained) in enumerate(saver.saved.items()):
            if "batch_end" in path and trained in (1, 2, 4):
                resumed, _ = run(tmp_path / str(number), make, ckpt=path, max_epochs=2)
                assert resumed.seen == whole.seen[trained:], path
    Path("unreadable_train.csv").write_text("one,of before\n")
    with pytest.raises(ValueError, match="more than"):
        run(tmp_path / "more", make, ckpt=next(iter(saver.saved)), max_epochs=2)


def test_evaluation_counts_and_names_them_and_puts_nothing_in_their_place(root: Path) -> None:
    class Labels(Recorder):
        def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
            self.seen += batch[1].tolist()

    Path("unreadable_val.csv").write_text("of,an earlier run\n")
    recorder = Labels()
    said = (
        r"2 of the 9 images of .*val cannot be read and count in no result; .*/unreadable_val\.csv lists them: .*/n01"
    )
    with pytest.warns(UserWarning, match=said):
        make_trainer().validate(recorder, datamodule=module(root, skip_unreadable=2), verbose=False)
    assert recorder.seen == [-1, 0, 0, 1, 1, 1, 2, 2, -1]
    assert listed(Path("unreadable_val.csv")) == [str(root / "val" / name) for name in BAD]
    with pytest.warns(
        UserWarning, match="2 of the 9 images of .*train cannot be read and others were trained on instead"
    ):
        make_trainer(max_epochs=1).fit(Recorder(), datamodule=module(root, skip_unreadable=2))


def test_predict_allows_none_and_nobody_allows_fewer(root: Path) -> None:
    with pytest.warns(UserWarning, match="skip_unreadable has no effect in predict"):
        data = module(root, skip_unreadable=9, predict_path=str(root / "val"))
        data.setup("predict")
    with pytest.raises(ValueError, match=r"cannot read image .*n01/0\.JPEG"):
        list(data.predict_dataloader())
    with pytest.raises(ValueError, match="skip_unreadable is -1: give a number"):
        module(root, skip_unreadable=-1)


def test_lists_name_any_file(root: Path) -> None:
    odd = root / "train/n02" / 'odd,\n\udcff".JPEG'
    odd.write_bytes(b"")
    data = module(root, skip_unreadable=3)
    data.setup("fit")
    for index in range(10):
        data.train_set[0, index]
    assert str(odd) in data.train_set.skipped.files() and len(data.train_set.skipped.files()) == 3
