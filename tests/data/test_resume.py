"""A resumed run is fed the same batches, bit for bit, as an uninterrupted one, wherever the checkpoint was made."""

from __future__ import annotations

import random
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from PIL import Image

from hornet_lit.data import DigitsDataModule, ImageDataModule
from hornet_lit.data.sampling import KeyedImages
from hornet_lit.data.transforms import eval_transform, train_transform

from .recorder import Recorder, SaveEverywhere, digest, make_trainer


class Noise:
    """Deterministic pictures for the PIL route."""

    def __len__(self) -> int:
        return 26

    def read(self, index: int):
        pixels = torch.randint(0, 256, (20, 24, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        return Image.fromarray(pixels.numpy()), index % 3


class PilDataModule(ImageDataModule):
    """Published augmentation, random erasing included, on generated pictures."""

    def __init__(self, num_workers: int = 0, seed: int = 0, **kwargs) -> None:
        super().__init__(
            **dict(batch_size=8, batch_size_per_device=None, eval_batch_size=8) | kwargs,
            num_workers=num_workers, seed=seed, predict_path=None, img_size=16, in_chans=3,
            mean=(0.5,) * 3, std=(0.5,) * 3, reprob=0.5,
        )  # fmt: skip
        self.class_names = ["a", "b", "c"]

    def setup_data(self, stage: str) -> None:
        transform = train_transform(img_size=16, mean=self.mean)
        self.train_set = KeyedImages(Noise(), transform, seed=self.seed)
        self.val_set = KeyedImages(Noise(), eval_transform(img_size=16))

    def predict_transform(self):
        return eval_transform(img_size=16)


def run(folder: Path, make_data, *, ckpt: str | None = None, **trainer_options) -> tuple[Recorder, SaveEverywhere]:
    torch.manual_seed(torch.seed() % 2**32)  # a new process has other global random numbers
    saver, module = SaveEverywhere(folder), Recorder()
    folder.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        make_trainer(callbacks=[saver], **trainer_options).fit(module, datamodule=make_data(), ckpt_path=ckpt)
    return module, saver


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_steps": 8, "max_epochs": -1}], ids=["epochs", "steps"])
@pytest.mark.parametrize(
    "validate", [{}, {"val_check_interval": 2}, {"limit_val_batches": 0}], ids=["val", "mid", "no"]
)
@pytest.mark.parametrize("cap", [None, 4], ids=["plain", "accumulated"])
def test_every_checkpoint_continues_the_sequence(tmp_path: Path, limit, validate, cap) -> None:
    def make_data():
        return PilDataModule(batch_size_per_device=cap)

    whole, saver = run(tmp_path / "whole", make_data, **limit, **validate)
    assert len(set(whole.seen)) == len(whole.seen), "batches repeat, so nothing would be shown"
    assert len(saver.saved) >= 8
    wrong = {}
    for place, (path, trained) in enumerate(saver.saved.items()):
        resumed, _ = run(tmp_path / f"resumed{place}", make_data, ckpt=path, **limit, **validate)
        if resumed.seen != whole.seen[trained:]:
            wrong[Path(path).name] = [whole.seen.index(s) if s in whole.seen else "?" for s in resumed.seen]
    assert not wrong


@pytest.mark.parametrize("make", [PilDataModule, partial(DigitsDataModule, batch_size=400)], ids=["pil", "tensor"])
def test_workers_change_nothing_and_resume_too(tmp_path: Path, make) -> None:
    limit = {"max_epochs": 2, "limit_val_batches": 0}
    whole, saver = run(tmp_path / "whole", lambda: make(num_workers=0), **limit)
    in_workers, _ = run(tmp_path / "workers", lambda: make(num_workers=2), **limit)
    assert in_workers.seen == whole.seen
    last_of_epoch = len(whole.seen) // 2
    for path, trained in saver.saved.items():
        if trained in (1, last_of_epoch, last_of_epoch + 1) and "batch_end" in path:
            resumed, _ = run(tmp_path / f"resumed{trained}", lambda: make(num_workers=2), ckpt=path, **limit)
            assert resumed.seen == whole.seen[trained:], trained


def test_exception_within_a_step_repeats_that_batch(tmp_path: Path) -> None:
    class Failing(Recorder):
        def training_step(self, batch, batch_idx):
            if len(self.seen) == 4:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    whole, _ = run(tmp_path / "whole", PilDataModule, max_epochs=3)
    last = OnExceptionCheckpoint(tmp_path, filename="failed")
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer = make_trainer(callbacks=[last], enable_checkpointing=True, max_epochs=3)
        trainer.fit(Failing(), datamodule=PilDataModule())
    resumed, _ = run(tmp_path / "resumed", PilDataModule, ckpt=str(tmp_path / "failed.ckpt"), max_epochs=3)
    assert [s.split()[0] for s in resumed.seen] == [s.split()[0] for s in whole.seen[4:]]


def test_main_process_random_numbers_are_left_alone() -> None:
    """Workers or not, iterating draws nothing from the generators that drop path and mixup use."""
    data = PilDataModule()
    data.setup("fit")
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = [digest(*batch) for batch in data.train_dataloader()]
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert first == [digest(*batch) for batch in data.train_dataloader()]


def test_another_seed_or_epoch_gives_other_batches() -> None:
    batches = set()
    for seed in (0, 1):
        data = PilDataModule(seed=seed)
        data.setup("fit")
        loader = data.train_dataloader()
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            batches.add(digest(next(iter(loader))[0]))
    assert len(batches) == 4


def test_position_that_cannot_be_met_is_refused(tmp_path: Path) -> None:
    _, saver = run(tmp_path, lambda: DigitsDataModule(batch_size=400, seed=1), max_epochs=2)
    middle = next(path for path, trained in saver.saved.items() if trained == 1)
    boundary = next(path for path in saver.saved if "epoch_end" in path)
    for change, message in (
        (dict(seed=2), r"data\.seed = 1"),
        (dict(batch_size=200), "400 images per step"),
        (dict(batch_size_per_device=200), "400 images per step"),
    ):
        make = lambda change=change: DigitsDataModule(**dict(batch_size=400, seed=1) | change)  # noqa: E731
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "no", make, ckpt=middle, max_epochs=2)
        resumed, _ = run(tmp_path / "yes", make, ckpt=boundary, max_epochs=2)  # between epochs all is allowed
        assert len(resumed.seen) == 1437 // make().batch_size * make().accumulation


def test_other_classes_are_refused(tmp_path: Path) -> None:
    _, saver = run(tmp_path, PilDataModule, max_epochs=1)

    def renamed() -> PilDataModule:
        data = PilDataModule()
        data.class_names = ["a", "x", "c"]
        return data

    with pytest.raises(ValueError, match="differ in class 1: b in the checkpoint, x in the data"):
        run(tmp_path / "resumed", renamed, ckpt=next(iter(saver.saved)), max_epochs=2)


def test_reused_data_module_starts_afresh(tmp_path: Path) -> None:
    whole, saver = run(tmp_path / "whole", PilDataModule, max_epochs=2)
    data = PilDataModule()
    resumed, _ = run(tmp_path / "resumed", lambda: data, ckpt=next(iter(saver.saved)), max_epochs=2)
    again, _ = run(tmp_path / "again", lambda: data, max_epochs=2)
    assert resumed.seen == whole.seen[1:]
    assert again.seen == whole.seen


def test_reloading_every_epoch_and_overfitting(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", PilDataModule, max_epochs=3)
    reloading, _ = run(tmp_path / "reload", PilDataModule, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert reloading.seen == whole.seen
    data = PilDataModule()
    trainer = make_trainer(max_epochs=2, overfit_batches=2)
    trainer.fit(Recorder(), datamodule=data)
    assert data.steps_per_epoch == 2
    orders = []
    sampler = data.train_dataloader().sampler
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        orders.append([index for _, index in sampler])
    assert orders[0] == orders[1]
