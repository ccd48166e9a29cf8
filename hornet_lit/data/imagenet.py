"""ImageNet-1k and -22k, and any folder of class folders, with the published transforms.

Shape letters: B batch, C channels, H height, W width, N images in the set.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Literal, NoReturn

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .base import ImageDataModule
from .evaluation_sets import EVALUATION_SETS, imagenet_classes, open_evaluation_set, scored_classes
from .images import read_bytes
from .sampling import KeyedImages
from .skipping import SkipList
from .sources import (
    FolderImages,
    HuggingFaceImages,
    LabelledImages,
    class_folders,
    stratified_split,
    tar_images,
    wds_images,
    wds_shards,
)
from .transforms import COLOR_JITTER, Transform, check_crop, check_share, eval_transform, train_transform

_SYNONYMS = {"val": ("val", "validation"), "validation": ("validation", "val")}
_GREY_MEAN, _GREY_STD = (0.449,), (0.226,)  # the RGB values' averages, as timm uses for one channel


class ImageNetDataModule(ImageDataModule):
    """Images in class folders, tar files, WebDataset shards or a Hugging Face data set.

    The class list is the training set's, sorted by name (or `class_map`'s); labels of val and test go through it. An
    unreadable image is an error that names it, in training and evaluation alike, unless `skip_unreadable` allows some.

    Args:
        root: folder that holds the splits: train/ and val/ (or validation/) with a folder per class; or train.tar and
            val.tar with such folders (or a <class>.tar per class) in them; or train/ with <class>.tar files; or shards.
        dataset: "" for the above, `wds/` for WebDataset shards in `root`, `hfds/NAME` for a Hugging Face data set
            (`root` is then its cache folder), as in timm.
        train_split, val_split, test_split: names of the splits in `root`; for `wds/` also patterns such as
            train-{0000..1023}.tar. By default test is val.
        val_fraction: share of the training images to hold out as val when `root` has no val split; by class, from seed.
        class_map: text file with one class per line in the order of their labels; classes not in it are left out. For
            `wds/` and `hfds/` it names the labels.
        batch_size: GLOBAL training batch.
        batch_size_per_device: the most training images that one device takes at once (None: no limit).
        eval_batch_size: images per device in validation, test and prediction.
        num_workers: loader processes per device.
        seed: of order, augmentation and val_fraction.
        predict_path: folder, image, or text file of paths, for `predict`.
        img_size: side of the images that the network gets, in pixels.
        in_chans: 3, or 1 for greyscale.
        crop_pct: None for the published evaluation (0.875 below 384 pixels, from there on the whole image squashed).
        scale, ratio: area and aspect ratio of the random resized crop.
        hflip: probability of a left-right flip.
        color_jitter: strength; acts only without auto_augment, as in the published code.
        auto_augment: timm's configuration string, or None.
        interpolation: of resizing, by timm's names.
        reprob, remode: random erasing: probability per image, and "pixel", "rand" or "const".
        mean, std: of pixels in 0–1; None for ImageNet's.
        views: what test and predict look at, and average the probabilities of: the "center", that and its mirror image
            ("flip"), centre and corners ("five_crop"), or these five and their mirror images ("ten_crop").
        evaluation_set: for classifiers of ImageNet-1k's 1000 classes: the set that lies at `root` and that `test` reads
            in the place of a split, so that dataset, test_split and class_map do not count; see `open_evaluation_set`.
        skip_unreadable: how many different unreadable images of a split to go on without; they are listed in
            unreadable_<train, val or test>.csv in the run's folder. While training, another image takes such a one's
            place, drawn from (seed, epoch, index); in val and test it counts in no result. `predict` allows none.
    """

    VIEWS = ("center", "flip", "five_crop", "ten_crop")

    def __init__(
        self,
        *,
        root: str = "data/imagenet",
        dataset: str = "",
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "val",
        val_fraction: float | None = None,
        class_map: str | None = None,
        batch_size: int = 4096,
        batch_size_per_device: int | None = 128,
        eval_batch_size: int = 192,
        num_workers: int = 10,
        seed: int = 0,
        predict_path: str | None = None,
        img_size: int = 224,
        in_chans: int = 3,
        crop_pct: float | None = None,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        color_jitter: float = COLOR_JITTER,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        interpolation: str = "bicubic",
        reprob: float = 0.25,
        remode: str = "pixel",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        views: Literal["center", "flip", "five_crop", "ten_crop"] = "center",
        evaluation_set: Literal["imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "imagenet_real"]
        | None = None,
        skip_unreadable: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            batch_size_per_device=batch_size_per_device,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            predict_path=predict_path,
            img_size=img_size,
            in_chans=in_chans,
            mean=mean or (_GREY_MEAN if in_chans == 1 else IMAGENET_DEFAULT_MEAN),
            std=std or (_GREY_STD if in_chans == 1 else IMAGENET_DEFAULT_STD),
            reprob=reprob,
            remode=remode,
            views=views,
        )
        if dataset and not dataset.startswith(("wds/", "hfds/")):
            raise ValueError(
                f"dataset is {dataset!r}: leave it empty for folders and tar files, or give wds/ or hfds/NAME"
            )
        if evaluation_set not in (None, *EVALUATION_SETS):
            raise ValueError(f"evaluation_set is {evaluation_set!r}: choose {', '.join(EVALUATION_SETS)}")
        check_share(hflip=hflip)
        check_crop(scale=scale, ratio=ratio, crop_pct=crop_pct, color_jitter=color_jitter)
        if val_fraction is not None and not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction is {val_fraction}: give a share between 0 and 1, such as 0.1")
        if skip_unreadable < 0:
            raise ValueError(
                f"skip_unreadable is {skip_unreadable}: give a number of images, or 0 for an error at the first"
            )
        self.root = root
        self.dataset = dataset
        self.train_split = train_split
        self.val_split = val_split
        self.test_split = test_split
        self.val_fraction = val_fraction
        self.class_map = class_map
        self.crop_pct = crop_pct
        self.scale = scale
        self.ratio = ratio
        self.hflip = hflip
        self.color_jitter = color_jitter
        self.auto_augment = auto_augment
        self.interpolation = interpolation
        self.evaluation_set = evaluation_set
        self.skip_unreadable = skip_unreadable
        self.save_hyperparameters(logger=False)  # Lightning refuses names that the module has with other values
        self._opened: dict[str, LabelledImages] = {}
        self._skip_folder: Path | None = None
        self._classes_are_evals = False  # until a checkpoint tells the class list that it was trained on

    def setup_data(self, stage: str) -> None:
        if self.skip_unreadable:
            self._set_skip_folder(stage)
        if stage in ("fit", "validate") and self.evaluation_set is not None:
            raise ValueError(f"evaluation_set {self.evaluation_set} is for `hornet-lit test`: leave it out of {stage}")
        if stage == "fit":
            if self.train_set is None:
                self._setup_fit()
            return
        if stage == "test" and self.evaluation_set is not None:
            self.class_names, self.scored_classes = imagenet_classes(), scored_classes(self.evaluation_set)
            self._set_eval(stage, open_evaluation_set(self.evaluation_set, self.root, in_chans=self.in_chans))
            return
        if self.class_names is None:
            self.class_names = self._class_list()
        if stage in ("validate", "test"):
            split = self.val_split if stage == "validate" else self.test_split
            images = self._held_out() if stage == "validate" and self._splits_train() else self.open_split(split)
            if self.class_names is None:
                self.class_names, self._classes_are_evals = images.classes, True
            self._set_eval(stage, images)

    def match_classes(self, names: list[str] | None) -> None:
        if self.test_set is not None and self.evaluation_set is not None and names not in (None, self.class_names):
            mend = "test a classifier of ImageNet-1k"
            if len(names) == len(self.class_names or ()):
                mend += ", or, if it is one under other names, give the file as --model.weights"
            raise ValueError(
                f"{self.evaluation_set} needs ImageNet-1k's 1000 classes by their wnids, and the checkpoint was "
                f"trained on {len(names)} others ({names[0]}, …): {mend}"
            )
        if names is not None and self._classes_are_evals:
            # Evaluated without the training set at hand: the checkpoint knows the class list.
            self.class_names, self._classes_are_evals = list(names), False
            for stage, images in (("validate", self.val_set), ("test", self.test_set)):
                if isinstance(images, KeyedImages):
                    self._set_eval(stage, images.source)  # type: ignore[arg-type]
        super().match_classes(names)

    def predict_transform(self) -> Transform:
        return self._eval_transform(five_crops=self.views in ("five_crop", "ten_crop"))

    def _eval_transform(self, *, five_crops: bool) -> Transform:
        return eval_transform(
            img_size=self.img_size,
            in_chans=self.in_chans,
            crop_pct=self.crop_pct,
            interpolation=self.interpolation,
            five_crops=five_crops,
        )

    def _setup_fit(self) -> None:
        everything = self.open_split(self.train_split)
        listed = self._listed_classes()
        self.class_names, self._classes_are_evals = listed or everything.classes, False
        if len(self.class_names) < 2:
            raise ValueError(f"{everything.where} has the one class {self.class_names[0]!r}: a classifier needs two")
        train = everything
        if listed is not None and listed != everything.classes:
            train = everything.relabel(listed, leave_out_others=True)
            if len(train) < len(everything):
                warnings.warn(
                    f"{len(everything) - len(train)} images in {everything.where} are of classes that {self.class_map} "
                    "does not list, and are left out",
                    stacklevel=2,
                )
        validates = self.trainer is None or self.trainer.limit_val_batches != 0
        if self._splits_train():
            kept, _ = stratified_split(train.label_N, fraction=self.val_fraction or 0, seed=self.seed)
            if validates:
                self._set_eval("validate", self._held_out())
            train = train.take(kept)
        elif validates:
            if self.val_fraction is not None:
                warnings.warn(f"val_fraction has no effect, since {self.root} has a val split", stacklevel=2)
            self._set_eval("validate", self.open_split(self.val_split), complete=self.class_map is None)
        transform = train_transform(
            img_size=self.img_size,
            in_chans=self.in_chans,
            scale=self.scale,
            ratio=self.ratio,
            hflip=self.hflip,
            color_jitter=self.color_jitter,
            auto_augment=self.auto_augment,
            interpolation=self.interpolation,
            mean=self.mean,
        )
        self.train_set = KeyedImages(train, transform, seed=self.seed, skipped=self._skip_list("train", train))

    def _set_eval(self, stage: str, images: LabelledImages, *, complete: bool = False) -> None:
        assert self.class_names is not None
        if images.classes != self.class_names:
            left_out = self.class_map is not None
            images = images.relabel(self.class_names, leave_out_others=left_out, complete=complete)
        if stage == "validate":
            transform, skipped = self._eval_transform(five_crops=False), self._skip_list("val", images)
            self.val_set = KeyedImages(images, transform, skipped=skipped)
        else:
            self.test_set = KeyedImages(images, self.predict_transform(), skipped=self._skip_list("test", images))

    # ---- unreadable images

    def _set_skip_folder(self, stage: str) -> None:
        if stage == "predict":
            warnings.warn(
                "data.skip_unreadable has no effect in predict: every image gets its row, or is an error", stacklevel=2
            )
            return
        trainer = self.trainer
        folder = None if trainer is None else trainer.log_dir  # a broadcast: every process asks
        self._skip_folder = Path(folder or "")
        if trainer is None or trainer.is_global_zero:
            # The training's list stays in a run's folder: its cap holds for all of a training that is resumed there.
            split = "test" if stage == "test" else "val"
            (self._skip_folder / f"unreadable_{split}.csv").unlink(missing_ok=True)
        if trainer is not None:
            trainer.strategy.barrier("hornet_lit: lists of unreadable images cleared")

    def _skip_list(self, split: str, images: LabelledImages) -> SkipList | None:
        if not self.skip_unreadable:
            return None
        assert self._skip_folder is not None
        return SkipList(self._skip_folder / f"unreadable_{split}.csv", cap=self.skip_unreadable, where=images.where)

    def teardown(self, stage: str) -> None:
        """Say which images were skipped."""
        if self.trainer is not None and not self.trainer.is_global_zero:
            return
        own = {"fit": (self.train_set, self.val_set), "validate": (self.val_set,), "test": (self.test_set,)}
        for images in own.get(stage, ()):
            if isinstance(images, KeyedImages):
                images.warn_of_skipped()

    # ---- finding the images

    def _splits_train(self) -> bool:
        return self.val_fraction is not None and self.find_split(self.val_split) is None

    def _held_out(self) -> LabelledImages:
        images = self.open_split(self.train_split)
        listed = self._listed_classes()
        if listed is not None and listed != images.classes:
            images = images.relabel(listed, leave_out_others=True)
        assert self.val_fraction is not None
        return images.take(stratified_split(images.label_N, fraction=self.val_fraction, seed=self.seed)[1])

    def _class_list(self) -> list[str] | None:
        """The training set's classes, where they can be told without reading it."""
        listed = self._listed_classes()
        if listed is not None:
            return listed
        if self.train_set is None and not self.dataset:
            found = self.find_split(self.train_split)
            if found is not None and _holds_folders(found):
                return class_folders(Path(found))
        return self.open_split(self.train_split).classes if self._splits_train() else None

    def _listed_classes(self) -> list[str] | None:
        if self.class_map is None:
            return None
        try:
            lines = read_bytes(self.class_map).decode("utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read class_map {self.class_map}: {error}") from error
        names = [line.strip() for line in lines if line.strip()]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"class_map {self.class_map} must list every class once, one a line")
        return names

    def find_split(self, split: str) -> str | None:
        """Path of the folder or tar file of a split, or its name among the shards. None if there is none."""
        for name in _SYNONYMS.get(split, (split,)):
            if self.dataset.startswith("wds/"):
                shards = wds_shards(self.root, name)
                if shards and os.path.isfile(shards[0]):
                    return name
            for path in (os.path.join(self.root, name), os.path.join(self.root, f"{name}.tar")):
                if os.path.exists(path):
                    return path
        return None

    def open_split(self, split: str) -> LabelledImages:
        """The labelled images of a split, listed once.

        Raises:
            ValueError: the split is missing; the message names the path and what would mend it.
        """
        if split not in self._opened:
            self._opened[split] = self._list(split)
        return self._opened[split]

    def _list(self, split: str) -> LabelledImages:
        if self.dataset.startswith("hfds/"):
            return self._list_hugging_face(split)
        found = self.find_split(split)
        if found is None:
            self._raise_missing(split)
        if self.dataset.startswith("wds/"):
            return wds_images(self.root, split=found, class_names=self._listed_classes(), in_chans=self.in_chans)
        if _holds_folders(found):
            return FolderImages(Path(found), in_chans=self.in_chans)
        return tar_images(Path(found), in_chans=self.in_chans)

    def _list_hugging_face(self, split: str) -> LabelledImages:
        names = _SYNONYMS.get(split, (split,))
        for name in names:
            try:
                return HuggingFaceImages(
                    self.dataset, root=self.root, split=name, class_names=self._listed_classes(), in_chans=self.in_chans
                )
            except ValueError:
                if name == names[-1]:
                    raise
        raise AssertionError(split)

    def _raise_missing(self, split: str) -> NoReturn:
        root = Path(os.path.abspath(self.root))
        if root.is_file():
            raise ValueError(f"{root} is a file: set data.root to the folder that holds train/ and val/, or tar files")
        if not root.is_dir():
            raise ValueError(f"data folder {root} does not exist: set data.root to where the images are")
        option = next(o for o in ("train_split", "val_split", "test_split") if getattr(self, o) == split)
        tried = " or ".join(f"{name}/" for name in _SYNONYMS.get(split, (split,)))
        mend = f"put its class folders (or a tar file) there, or name another split with data.{option}"
        if self.dataset:
            tried, mend = (
                f"shards of {split}",
                "give their pattern as the split's name ( train-{0000..0127}.tar)",
            )
        elif split == self.val_split:
            mend += ", or hold training images out with data.val_fraction 0.1, or set trainer.limit_val_batches 0"
        raise ValueError(f"no {tried} in {root}: {mend}")


def _holds_folders(path: str) -> bool:
    return os.path.isdir(path) and not any(Path(path).glob("*.tar"))
