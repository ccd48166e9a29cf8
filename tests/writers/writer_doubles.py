"""A module and a datamodule with the few names that the writers ask for, small enough to run in milliseconds.

Run as a script it is one of `--world` gloo processes that predict, then fit: the tests compare their files.
"""

import argparse
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

NAMES = ["plain", 'a "quoted" name', "comma, and more", "line\nbreak", "ünï ✓", "$dollar$", "seven"]
SIDE = 8


class Shares(Sampler[int]):
    """Rank r's places of an order, r, r + world, …, filled up with −1 to equal length."""

    def __init__(self, *, order: list[int], trainer: Trainer) -> None:
        rank, world = trainer.global_rank, trainer.world_size
        self.places = order[rank::world]
        self.places += [-1] * (-(-len(order) // world) - len(self.places))

    def __iter__(self):
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class Images(torch.utils.data.Dataset):
    def __init__(self, *, count: int, channels: int = 1, labelled: bool) -> None:
        self.x_NCHW = torch.rand(count, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(count))
        self.y_N = torch.arange(count) % len(NAMES)
        self.labelled = labelled

    def __len__(self) -> int:
        return len(self.x_NCHW)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        if place == -1:
            return torch.zeros_like(self.x_NCHW[0]), -1
        return self.x_NCHW[place], int(self.y_N[place]) if self.labelled else place


class TinyData(LightningDataModule):
    def __init__(self, *, count: int, channels: int = 1, order: list[int] | None = None) -> None:
        super().__init__()
        self.count, self.channels = count, channels
        self.order = list(range(count)) if order is None else order
        self.class_names = list(NAMES)
        self.predict_files = [f"folder/image {i}, {'x' * (i % 3)}.png" for i in range(count)]

    def _loader(self, labelled: bool) -> DataLoader:
        images = Images(count=self.count, channels=self.channels, labelled=labelled)
        return DataLoader(images, batch_size=4, sampler=Shares(order=self.order, trainer=self.trainer))

    def train_dataloader(self) -> DataLoader:
        return self._loader(True)

    val_dataloader = test_dataloader = train_dataloader

    def predict_dataloader(self) -> DataLoader:
        return self._loader(False)

    def denormalise(self, x_BCHW: Tensor) -> Tensor:
        return (x_BCHW * 255).round().to(torch.uint8)


class TinyModule(LightningModule):
    def __init__(self, *, channels: int = 1, classes: int = len(NAMES)) -> None:
        super().__init__()
        seed_everything(7, verbose=False)
        self.head = torch.nn.Linear(channels * SIDE * SIDE, classes)
        self.class_names: list[str] | None = None

    def logits(self, x_BCHW: Tensor) -> Tensor:
        return self.head(x_BCHW.flatten(1) - 0.5)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = torch.nn.functional.cross_entropy(self.logits(batch[0]), batch[1], ignore_index=-1)
        self.log("train/loss", loss)
        self.log("train/lr", 0.1 / (1 + self.global_step))
        self.log("train/grad_norm", loss.detach() * 2)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        logits_BK = self.logits(batch[0])
        self.log("val/acc1", (logits_BK.argmax(1) == batch[1]).float().mean())
        return {"logits": logits_BK}

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"logits": self.logits(batch[0]), "label": batch[1]}

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        # one row at a time: a matrix product may round differently for another batch size
        logits_BK = torch.cat([self.logits(x_1CHW) for x_1CHW in batch[0].split(1)])
        return {"index": batch[1], "probability": logits_BK.softmax(dim=1)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def quiet_trainer(**settings: object) -> Trainer:
    """A trainer on the CPU without bars and checkpoints; `settings` go on top."""
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
    }
    return Trainer(**(defaults | settings))


def predict(*, folder: Path, world: int, counts: list[int]) -> None:
    """Predict sets of several sizes into folder/<count>.csv; then one whose image 2 is left out and 5 comes twice."""
    from hornet_lit.writers import PredictionWriter

    settings = {"strategy": "ddp", "devices": world} if world > 1 else {"devices": 1}
    for count in counts:
        writer = PredictionWriter(output=str(folder / f"{count}.csv"), top_k=3)
        trainer = quiet_trainer(callbacks=[writer], **settings)
        assert trainer.world_size == world
        assert trainer.predict(TinyModule(), datamodule=TinyData(count=count)) is None
    writer = PredictionWriter(output=str(folder / "broken.csv"))
    trainer = quiet_trainer(callbacks=[writer], **settings)
    try:
        trainer.predict(TinyModule(), datamodule=TinyData(count=7, order=[0, 1, 3, 4, 5, 5, 6]))
    except ValueError as error:
        (folder / f"broken.{trainer.global_rank}.txt").write_text(str(error))


def fit(*, folder: Path, world: int) -> None:
    """Fit two epochs on `world` processes with both picture callbacks, into folder/run."""
    from hornet_lit.writers import LearningCurves, PredictionSheet

    trainer = quiet_trainer(
        max_epochs=2,
        logger=CSVLogger(folder, name="", version="run"),
        callbacks=[LearningCurves(), PredictionSheet(num_images=16)],
        strategy="ddp",
        devices=world,
    )
    trainer.fit(TinyModule(), datamodule=TinyData(count=37))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--counts", type=int, nargs="+", required=True)
    asked = parser.parse_args()
    predict(folder=asked.folder, world=asked.world, counts=asked.counts)
    fit(folder=asked.folder, world=asked.world)
