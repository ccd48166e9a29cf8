"""What all data modules share: batch arithmetic, loaders, exact resume, normalisation on the device, prediction.

Shape letters: B batch, V views of an image, C channels, H height, W width.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .batching import limited, optimizer_steps, resume_at_epoch_end, split_batch, useful_workers
from .predict import PredictImages, find_images
from .sampling import EvalSampler, ResumableLoader, TrainSampler, epoch_order, pass_batch
from .transforms import KeyedRandomErasing, Transform, check_share
from .workers import outlive_signals

Batch = tuple[Tensor, Tensor]
BatchDataset = Dataset[Batch]  # with __len__ and __getitems__(keys) -> (uint8 x_BCHW, int64 y_B)

_TRUE_PRECISION = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


class ImageDataModule(pl.LightningDataModule):
    """Base of the data modules: a subclass supplies data sets of uint8 batches and a transform for prediction.

    Args:
        batch_size: GLOBAL training batch, images per optimizer step over all devices.
        batch_size_per_device: the most training images that one device takes at once; gradient accumulation follows.
        eval_batch_size: images per device in validation, test and prediction.
        num_workers: loader processes per device; no more than cores, or batches, are started.
        seed: of order and augmentation.
        predict_path: folder, image, or text file of paths, for `predict`.
        img_size: side of the images that the network gets, in pixels.
        in_chans: 1 (greyscale) or 3 (RGB).
        mean, std: per channel, for pixels in 0–1.
        reprob: probability of random erasing per training image.
        remode: what is put there: "pixel", "rand" or "const".
        views: what test and predict look at, and average the probabilities of: the "center", that and its mirror image
            ("flip"), or where VIEWS has them centre and corners ("five_crop") and all their mirror images ("ten_crop").

    Attributes:
        class_names: in label order; None in `predict`, `validate` and `test` while only a checkpoint can tell.
        predict_files: names for predictions.csv, in order, after setup("predict").
        train_set, val_set, test_set: data sets, after setup.
        scored_classes: after setup("test"), the labels whose logits are compared; None: all.
    """

    VIEWS: ClassVar[tuple[str, ...]] = ("center", "flip")

    def __init__(
        self,
        *,
        batch_size: int,
        batch_size_per_device: int | None,
        eval_batch_size: int,
        num_workers: int,
        seed: int,
        predict_path: str | None,
        img_size: int,
        in_chans: int,
        mean: Sequence[float],
        std: Sequence[float],
        reprob: float = 0.0,
        remode: str = "pixel",
        views: str = "center",
    ) -> None:
        super().__init__()
        if in_chans not in (1, 3):
            raise ValueError(f"in_chans is {in_chans}: images are read as greyscale (1) or RGB (3)")
        if len(mean) != in_chans or len(std) != in_chans:
            raise ValueError(f"mean {tuple(mean)} and std {tuple(std)} must have in_chans = {in_chans} numbers each")
        positive = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "img_size": img_size}
        if batch_size_per_device is not None:
            positive["batch_size_per_device"] = batch_size_per_device
        for name, value in (positive | {"num_workers": num_workers, "seed": seed}).items():
            if value < (least := int(name in positive)):
                raise ValueError(f"data.{name} is {value}: it must be at least {least}")
        if not all(math.isfinite(value) for value in mean) or not all(0 < value < math.inf for value in std):
            raise ValueError(f"mean {tuple(mean)} must be finite, and std {tuple(std)} positive as well")
        check_share(reprob=reprob)
        if remode not in ("pixel", "rand", "const"):
            raise ValueError(f"remode is {remode!r}: choose pixel, rand or const")
        if remode != "pixel" and not reprob:
            warnings.warn(f"remode={remode!r} has no effect while reprob is 0", stacklevel=3)
        if views not in self.VIEWS:
            raise ValueError(f"views is {views!r}: {type(self).__name__} knows {', '.join(self.VIEWS)}")
        self.batch_size = batch_size
        self.batch_size_per_device = batch_size_per_device
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.predict_path = predict_path
        self.img_size = img_size
        self.in_chans = in_chans
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.views = views
        self.class_names: list[str] | None = None
        self.scored_classes: list[int] | None = None
        self.predict_files: Sequence[str] = []
        self.train_set: BatchDataset | None = None
        self.val_set: BatchDataset | None = None
        self.test_set: BatchDataset | None = None
        self._predict_set: PredictImages | None = None
        self._erase = KeyedRandomErasing(probability=reprob, mode=remode) if reprob else None
        self._resume = (0, 0)  # epoch, and batches of it that this rank has consumed

    # ---- for subclasses

    @abstractmethod
    def setup_data(self, stage: str) -> None:
        """Set class_names and the data sets that `stage` (fit, validate, test, predict) needs; cheap if repeated."""

    @abstractmethod
    def predict_transform(self) -> Transform:
        """The evaluation transform for image files of any size."""

    # ---- Lightning: setup and loaders

    def setup(self, stage: str) -> None:
        """Load what `stage` needs; for fit, also set the trainer's accumulation from the global batch size.

        Raises:
            ValueError: data missing or wrong, or a batch size that does not divide; each says what to change.
        """
        self._check_trainer()
        if self.views != "center" and stage in ("fit", "validate"):
            warnings.warn(f"data.views {self.views} has no effect in {stage}, only in test and predict", stacklevel=2)
        self.setup_data(stage)
        if stage == "fit":
            self._resume = (0, 0)
            assert self.train_set is not None
            size = len(self.train_set)  # type: ignore[arg-type]
            if size < self.batch_size:
                raise ValueError(
                    f"the training set has {size} images, fewer than one global batch of {self.batch_size}: "
                    f"set data.batch_size to {size} or less"
                )
            self._set_accumulation()
        elif stage == "predict":
            if self.predict_path is None:
                raise ValueError(
                    "nothing to predict: give --data.predict_path FOLDER (or an image, or a list of paths)"
                )
            self.predict_files, paths = find_images(self.predict_path)
            self._predict_set = PredictImages(paths, self.predict_transform(), in_chans=self.in_chans)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches (uint8 x_BCHW, y_B); in a resumed run the resumed epoch starts where it was left."""
        assert self.train_set is not None, "call setup('fit') first"
        world, rank = self._world()
        epoch, batches = self._resume
        if self.trainer is not None:
            resume_at_epoch_end(self.trainer)
            # reload_dataloaders_every_n_epochs asks for a loader again in later epochs.
            now = self.trainer.fit_loop.epoch_progress.current.processed
            epoch, batches = (epoch, batches) if epoch >= now else (now, 0)
        sampler = TrainSampler(
            size=len(self.train_set),  # type: ignore[arg-type]
            batch_size=self.batch_size,
            world=world,
            rank=rank,
            seed=self.seed,
            epoch=epoch,
            skip=batches * self.micro_batch_size,
            fixed_order=self._fixed_order,
        )
        return self._loader(self.train_set, sampler, self.micro_batch_size)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Batches (uint8 x_BCHW, y_B), equally many on every rank; label -1 is padding."""
        return self._eval_loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Batches (uint8 x_BCHW, y_B), equally many on every rank; label -1 is padding."""
        return self._eval_loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Batches (uint8 x_BCHW, index_B), equally many on every rank; index -1 is padding."""
        return self._eval_loader(self._predict_set)

    def _eval_loader(self, dataset: BatchDataset | None) -> DataLoader[Batch]:
        assert dataset is not None, "call setup(stage) first"
        world, rank = self._world()
        size = len(dataset)  # type: ignore[arg-type]
        sampler = EvalSampler(size=size, batch_size=self.eval_batch_size, world=world, rank=rank)
        return self._loader(dataset, sampler, self.eval_batch_size)

    def _loader(self, dataset: BatchDataset, sampler: TrainSampler | EvalSampler, batch_size: int) -> DataLoader[Batch]:
        on_cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        workers = useful_workers(self.num_workers, batches=-(-len(sampler) // batch_size))
        return ResumableLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=on_cuda,
            collate_fn=pass_batch,
            worker_init_fn=outlive_signals,
            # Without its own generator every iterator draws its workers' seed from the main process's.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def images_of_step(self, epoch: int, batch: int) -> list[int]:
        """Numbers of the training images, of all ranks, in the optimizer step that batch `batch` of an epoch is in."""
        number = batch // self.accumulation
        size = len(self.train_set)  # type: ignore[arg-type]
        order_N = epoch_order(size, seed=self.seed, epoch=0 if self._fixed_order else epoch)
        return order_N[number * self.batch_size : (number + 1) * self.batch_size].tolist()

    # ---- batch arithmetic

    @property
    def micro_batch_size(self) -> int:
        """Training images per device and step of the loop."""
        return self._split()[0]

    @property
    def accumulation(self) -> int:
        """Steps of the loop per optimizer step."""
        return self._split()[1]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch, exactly as the trainer will take them (its batch limits included)."""
        assert self.train_set is not None, "call setup('fit') first"
        loop_steps = len(self.train_set) // self.batch_size * self.accumulation  # type: ignore[arg-type]
        limit = None if self.trainer is None else self.trainer.limit_train_batches
        return optimizer_steps(limited(loop_steps, limit), self.accumulation)

    @property
    def _fixed_order(self) -> bool:
        """Whether every epoch goes through the images in the order of the first."""
        return self.trainer is not None and self.trainer.overfit_batches > 0

    def _split(self) -> tuple[int, int]:
        return split_batch(
            batch_size=self.batch_size,
            world=self._world()[0],
            batch_size_per_device=self.batch_size_per_device,
        )

    def _set_accumulation(self) -> None:
        micro, accumulation = self._split()
        if self.trainer is None:
            return
        given = self.trainer.accumulate_grad_batches
        if given not in (1, accumulation):
            raise ValueError(
                f"trainer.accumulate_grad_batches is {given}, but data.batch_size {self.batch_size} on "
                f"{self._world()[0]} device(s) of {micro} images each takes {accumulation}: leave "
                f"trainer.accumulate_grad_batches out, and set data.batch_size_per_device for a smaller micro-batch"
            )
        self.trainer.accumulate_grad_batches = accumulation

    def _world(self) -> tuple[int, int]:
        """(number of ranks that read different images, this one's number)."""
        strategy = None if self.trainer is None else self.trainer.strategy
        kwargs = getattr(strategy, "distributed_sampler_kwargs", None)  # absent on one device
        return (1, 0) if kwargs is None else (kwargs["num_replicas"], kwargs["rank"])

    def _check_trainer(self) -> None:
        trainer = self.trainer
        if trainer is None:
            return
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                "trainer.use_distributed_sampler must be false: hornet-lit's own samplers already share the images out "
                "over the devices, and Lightning would replace them"
            )
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):
            raise ValueError(
                "GradientAccumulationScheduler would change the global batch size that data.batch_size fixes: remove it"
            )

    # ---- exact resume

    def state_dict(self) -> dict[str, Any]:
        """Position in the data: `epoch` and `batches` of it consumed per rank, and what they only hold for."""
        epoch, batches = self._position()
        return {
            "epoch": epoch,
            "batches": batches,
            "images": batches * self.micro_batch_size * self._world()[0],
            "seed": self.seed,
            "size": 0 if self.train_set is None else len(self.train_set),  # type: ignore[arg-type]
            "class_names": self.class_names,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the position of `state_dict`; in validate, test and predict only take its class names.

        Raises:
            ValueError: classes differ, or a position within an epoch cannot be met with these settings.
        """
        self.match_classes(state_dict["class_names"])
        if self.train_set is None or (self.trainer is not None and self.trainer.state.fn != "fit"):
            return
        epoch, batches = state_dict["epoch"], state_dict["batches"]
        if batches:  # at an epoch's start everything may change; within it the rest of the epoch must be the same
            size = len(self.train_set)  # type: ignore[arg-type]
            for name, saved, now in (
                ("data.seed", state_dict["seed"], self.seed),
                ("images", state_dict["size"], size),
            ):
                if saved != now:
                    raise ValueError(
                        f"the checkpoint was saved within epoch {epoch} with {name} = {saved}, and now it is {now}: "
                        f"restore {name} = {saved}, or resume from a checkpoint saved at the end of an epoch"
                    )
            if batches * self.micro_batch_size * self._world()[0] != state_dict["images"]:
                each = state_dict["images"] // batches
                raise ValueError(
                    f"the checkpoint was saved within epoch {epoch} with {each} images per step of the loop (devices × "
                    f"images each), and now there are {self.micro_batch_size * self._world()[0]}: use the same devices "
                    f"and batch sizes, or resume from a checkpoint saved at the end of an epoch"
                )
        self._resume = (epoch, batches)

    def match_classes(self, names: list[str] | None) -> None:
        """Compare the class list with a checkpoint's, or take it over where there is none yet.

        Raises:
            ValueError: they differ, with the first difference.
        """
        if names is None or self.class_names == names:
            return
        if self.class_names is not None:
            pairs = zip([*names, None], [*self.class_names, None], strict=False)
            first = next(i for i, (ours, theirs) in enumerate(pairs) if ours != theirs)
            was = names[first] if first < len(names) else "absent"
            now = self.class_names[first] if first < len(self.class_names) else "absent"
            raise ValueError(
                f"the checkpoint was trained on {len(names)} classes, the data has {len(self.class_names)}; they first "
                f"differ in class {first}: {was} in the checkpoint, {now} in the data. Use the data it was trained on, "
                f"or start a new training from its weights (model.weights)"
            )
        self.class_names = list(names)

    def _position(self) -> tuple[int, int]:
        """(epoch, consumed batches) that a training resumed now has to begin with."""
        if self.trainer is None:
            return self._resume
        loop = self.trainer.fit_loop
        epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current
        # Between two epochs the batch counters are still the old epoch's. `processed` counts a batch as soon as its
        # optimizer step is done, before on_train_batch_end, where ModelCheckpoint saves; `completed` only after it.
        if epochs.started <= epochs.processed:
            return epochs.processed, 0
        if batches.processed >= self.trainer.num_training_batches:
            return epochs.processed + 1, 0
        return epochs.processed, batches.processed

    # ---- on the device

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """uint8 x_BCHW on the device → normalised float32 (or the type of a `*-true` precision); erased in training.

        Where `views` asks for several, test and predict get x_BVCHW.
        """
        x_BCHW, y_B = batch
        x_BCHW = self.normalise(x_BCHW)
        trainer = self.trainer
        if self._erase is not None and trainer is not None and trainer.training:
            loop = trainer.fit_loop
            # Counters of this batch's epoch and place, which a resumed run has too (the running total it may not).
            place = loop.epoch_progress.current.processed, loop.epoch_loop.batch_progress.current.ready
            x_BCHW = self._erase(x_BCHW, self.seed, *place, self._world()[1])
        if self.views in ("flip", "ten_crop") and trainer is not None and (trainer.testing or trainer.predicting):
            x_BVCHW = x_BCHW if x_BCHW.ndim == 5 else x_BCHW[:, None]
            x_BCHW = torch.cat([x_BVCHW, x_BVCHW.flip(-1)], dim=1)  # here and not on the host: half to send
        # Lightning converts inputs before this hook, when they are still integers.
        dtype = None if trainer is None else _TRUE_PRECISION.get(str(trainer.precision))
        return (x_BCHW if dtype is None else x_BCHW.to(dtype)), y_B

    def normalise(self, x_BCHW: Tensor) -> Tensor:
        """uint8 → float32, scaled to 0–1, less the mean, over the standard deviation."""
        # The same three operations as torchvision's ToTensor and Normalize, so that the bits agree as well.
        return x_BCHW.float().div_(255).sub_(self._channels(self.mean, x_BCHW)).div_(self._channels(self.std, x_BCHW))

    def denormalise(self, x_BCHW: Tensor) -> Tensor:
        """Back to uint8 pixels, for pictures; the inverse of `normalise`."""
        x_BCHW = x_BCHW.detach().float()
        x_BCHW = x_BCHW * self._channels(self.std, x_BCHW) + self._channels(self.mean, x_BCHW)
        return x_BCHW.mul(255).round().clamp(0, 255).to(torch.uint8)

    @staticmethod
    def _channels(values: Sequence[float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=like.device).view(1, -1, 1, 1)
