"""ImageNet and folders of one's own: formats, class lists, splits, and mistakes that people make."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hornet_lit.data import ImageNetDataModule
from hornet_lit.data.sampling import KeyedImages
from hornet_lit.data.sources import PackedStrings, stratified_split, wds_shards

from .recorder import Recorder, make_trainer

CLASSES = ["n01", "n02", "n10"]


def encoded(value: int, kind: str = "JPEG") -> bytes:
    """A picture of one grey level, which survives JPEG exactly."""
    buffer = io.BytesIO()
    Image.new("RGB", (18, 14), (value,) * 3).save(buffer, kind)
    return buffer.getvalue()


def write_split(folder: Path, *, classes: list[str] = CLASSES, per_class: int = 3, base: int = 0) -> None:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            (folder / name / f"{number}.JPEG").write_bytes(encoded(base + 40 * CLASSES.index(name) + number))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_split(tmp_path / "data/train")
    write_split(tmp_path / "data/val", per_class=2, base=20)
    return tmp_path / "data"


def module(root: Path, **options) -> ImageNetDataModule:
    defaults = dict(batch_size=3, batch_size_per_device=None, eval_batch_size=4, num_workers=0, img_size=16, reprob=0.0)
    return ImageNetDataModule(root=str(root), **defaults | options)


def contents(data: KeyedImages) -> list[tuple[int, int]]:
    """(grey level, label) of every image, in order."""
    read = (data.source.read(index) for index in range(len(data)))
    return [(int(np.asarray(image)[7, 7, 0]), label) for image, label in read]


def check(data: ImageNetDataModule, names: list[str] = CLASSES) -> None:
    data.setup("fit")
    assert data.class_names == names
    assert contents(data.train_set) == [(40 * label + n, label) for label in range(3) for n in range(3)]
    assert contents(data.val_set) == [(20 + 40 * label + n, label) for label in range(3) for n in range(2)]
    x_BCHW, y_B = next(iter(data.train_dataloader()))
    assert x_BCHW.shape == (3, 3, 16, 16) and x_BCHW.dtype == torch.uint8 and y_B.dtype == torch.int64


# ---- formats


def test_folders(root: Path) -> None:
    check(module(root))
    (root / "val").rename(root / "validation")
    (root / "train/n02/deeper").mkdir()
    (root / "train/n02/0.JPEG").rename(root / "train/n02/0")  # no image by its name
    (root / "train/n02/0").rename(root / "train/n02/0.jpg")
    (root / "train/n02/2.JPEG").rename(root / "train/n02/deeper/2.JPEG")
    (root / "train/.ipynb_checkpoints").mkdir()
    (root / "train/n01/.hidden.JPEG").write_bytes(b"")
    (root / "train/n01/notes.txt").write_bytes(b"")
    check(module(root))


def pack(folder: Path, target: Path, arcname: str = "") -> None:
    with tarfile.open(target, "w") as archive:
        archive.add(folder, arcname or folder.name)


@pytest.mark.parametrize("layout", ["tar", "tars in a tar", "a tar per class"])
def test_tar_files(root: Path, tmp_path: Path, layout: str) -> None:
    target = tmp_path / "tars"
    target.mkdir()
    for split in ("train", "val"):
        if layout == "tar":
            pack(root / split, target / f"{split}.tar")
            continue
        (target / split).mkdir()
        for name in CLASSES:
            # ImageNet's own: flat tar files, one per class, all of them in a tar file
            with tarfile.open(target / split / f"{name}.tar", "w") as archive:
                for image in sorted((root / split / name).iterdir()):
                    archive.add(image, image.name)
        if layout == "tars in a tar":
            pack(target / split, target / f"{split}.tar", ".")
            for file in (target / split).iterdir():
                file.unlink()
            (target / split).rmdir()
    check(module(target))
    check(module(target, num_workers=2))
    (target / "train").mkdir(exist_ok=True)
    damaged = target / ("val.tar" if layout != "a tar per class" else "val/n02.tar")
    damaged.write_bytes(b"<html>" * 300)
    with pytest.raises(ValueError, match=rf"cannot read .*{damaged.name} as an uncompressed tar file"):
        module(target, train_split="train" if layout == "a tar per class" else "train.tar").setup("fit")


def write_shards(root: Path, target: Path, *, with_json: bool = False) -> None:
    target.mkdir()
    info: dict = {"splits": {}}
    for split, per_class in (("train", 3), ("validation", 2)):
        samples = [(label, name, n) for label, name in enumerate(CLASSES) for n in range(per_class)]
        names = []
        for shard, part in enumerate((samples[:4], samples[4:])):
            names.append(f"some-{split}-{shard:02d}.tar")
            with tarfile.open(target / names[-1], "w") as archive:
                for label, name, n in part:
                    image = (root / ("val" if split == "validation" else split) / name / f"{n}.JPEG").read_bytes()
                    side = {"json": json.dumps({"label": label}).encode()} if with_json else {"cls": b"%d" % label}
                    for extension, data in ({"jpg": image} | side).items():
                        member = tarfile.TarInfo(f"{name}_{n}.{extension}")
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))
        info["splits"][split] = {"filenames": names}
    (target / "_info.json").write_text(json.dumps(info))


@pytest.mark.parametrize("with_json", [False, True])
def test_webdataset_shards(root: Path, tmp_path: Path, with_json: bool) -> None:
    target = tmp_path / "shards"
    write_shards(root, target, with_json=with_json)
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    named = dict(dataset="wds/", class_map=str(tmp_path / "names.txt"))
    check(module(target, dataset="wds/"), ["0", "1", "2"])
    check(module(target, **named))
    (target / "_info.json").unlink()
    check(module(target, **named))
    check(module(target, train_split="some-train-{00..01}.tar", val_split="some-validation-*.tar", **named))
    with pytest.raises(ValueError, match=r"shard .*some-train-02.tar of split .* does not exist"):
        module(target, train_split="some-train-{00..02}.tar", **named).setup("fit")
    with pytest.raises(ValueError, match=r"no shards of other in .*: give their pattern"):
        module(target, train_split="other", **named).setup("fit")
    (tmp_path / "names.txt").write_text("a\nb")
    with pytest.raises(ValueError, match="has the label 2, but there are 2 class names"):
        module(target, **named).setup("fit")


def test_shard_without_labels_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        member = tarfile.TarInfo("a.jpg")
        member.size = len(encoded(1))
        archive.addfile(member, io.BytesIO(encoded(1)))
    with pytest.raises(ValueError, match=r"a in .*train-0.tar has no label: it needs a .cls member"):
        module(tmp_path, dataset="wds/").setup("fit")


def test_shard_patterns(tmp_path: Path) -> None:
    assert wds_shards("r", "a-{08..10}-{x,y}.tar") == [f"r/a-{n}-{c}.tar" for n in ("08", "09", "10") for c in "xy"]
    assert wds_shards("r", "train-{0..1}.tar|1000") == ["r/train-0.tar", "r/train-1.tar"]


def test_hugging_face_data_through_timms_reader(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's own reader, on a stand-in for the package `datasets`, which is large and not among the dependencies."""

    class Split(list):
        info = types.SimpleNamespace(splits={}, features={"label": types.SimpleNamespace(names=CLASSES, num_classes=3)})

        def cast_column(self, *_):
            return self

        def remove_columns(self, _):
            return [{"label": row["label"]} for row in self]

    def load_dataset(name: str, *, split: str, **_):
        assert name == "someone/pictures"
        if split not in ("train", "validation"):
            raise ValueError(f"unknown split {split}")
        folder = root / ("train" if split == "train" else "val")
        files = [(label, path) for label, name in enumerate(CLASSES) for path in sorted((folder / name).iterdir())]
        return Split({"label": label, "image": {"bytes": path.read_bytes(), "path": None}} for label, path in files)

    stand_in = types.ModuleType("datasets")
    stand_in.load_dataset, stand_in.Image = load_dataset, lambda decode: None  # type: ignore[attr-defined]
    for name in [name for name in sys.modules if name.startswith("timm.data.readers.reader_hfds")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="hfds/someone/pictures needs the package datasets: pip install datasets"):
        module(root, dataset="hfds/someone/pictures").setup("fit")
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    check(module(root, dataset="hfds/someone/pictures"))
    with pytest.raises(ValueError, match=r"cannot load hfds/someone/pictures \(dev\): unknown split dev"):
        module(root, dataset="hfds/someone/pictures", val_split="dev").setup("fit")
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds")


# ---- class lists and splits


def test_labels_follow_the_training_classes(root: Path, tmp_path: Path) -> None:
    for path in (root / "val/n01").iterdir():
        path.unlink()
    (root / "val/n01").rmdir()  # torchvision and timm would now call n02 class 0
    with pytest.raises(ValueError, match=r"val has no images of 1 of the 3 classes, such as 'n01': add some, or give"):
        module(root).setup("fit")
    (tmp_path / "map.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    data = module(root, class_map=str(tmp_path / "map.txt"))
    with pytest.warns(UserWarning, match="val has no images of 1 of the 3 classes, such as 'n01'"):
        data.setup("fit")
    assert [label for _, label in contents(data.val_set)] == [1, 1, 2, 2]


def test_class_that_only_val_has_is_an_error(root: Path) -> None:
    (root / "val/n02").rename(root / "val/n03")
    with pytest.raises(ValueError, match="val has the class 'n03', which the training set lacks"):
        module(root).setup("fit")


def test_class_folder_that_is_a_link_to_nothing_is_an_error(root: Path) -> None:
    """Left out, its class would be missing, and the labels of all classes after it shifted."""
    (root / "train/n01").rename(root / "n01")
    (root / "train/n01").symlink_to(root / "gone")
    with pytest.raises(ValueError, match=r"train/n01 is a link to nothing: mend or remove the link"):
        module(root).setup("fit")
    (root / "n01").rename(root / "gone")
    check(module(root))


def test_class_map_orders_and_selects(root: Path, tmp_path: Path) -> None:
    (tmp_path / "map.txt").write_text("n10\nn01\n")
    data = module(root, class_map=str(tmp_path / "map.txt"))
    with pytest.warns(UserWarning, match=r"3 images in .*train are of classes that .*map\.txt does not list"):
        data.setup("fit")
    assert data.class_names == ["n10", "n01"]
    assert contents(data.train_set) == [(0, 1), (1, 1), (2, 1), (80, 0), (81, 0), (82, 0)]
    assert [label for _, label in contents(data.val_set)] == [1, 1, 0, 0]
    (tmp_path / "map.txt").write_text("n10\nn10\n")
    with pytest.raises(ValueError, match="must list every class once"):
        module(root, class_map=str(tmp_path / "map.txt")).setup("fit")
    with pytest.raises(ValueError, match=r"cannot read class_map nothing\.txt"):
        module(root, class_map="nothing.txt").setup("fit")
    (tmp_path / "map.txt").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ValueError, match=r"cannot read class_map .*map\.txt: 'utf-8' codec"):
        module(root, class_map=str(tmp_path / "map.txt")).setup("fit")


def test_missing_things_name_path_and_mend(root: Path, tmp_path: Path) -> None:
    def error(message: str, stage: str = "fit", **options) -> None:
        with pytest.raises(ValueError, match=message):
            module(options.pop("root", root), **options).setup(stage)

    error("data folder /.*elsewhere does not exist: set data.root", root=tmp_path / "elsewhere")
    (tmp_path / "all.tar").write_bytes(b"")
    error("all.tar is a file: set data.root to the folder", root=tmp_path / "all.tar")
    error("no test/ in .*data: put its class folders", stage="test", test_split="test")
    error("no training/ in .*name another split with data.train_split", train_split="training")
    error("dataset is 'torch/imagenet': leave it empty", dataset="torch/imagenet")
    error("val_fraction is 1.5", val_fraction=1.5)
    write_split(tmp_path / "alone/train", classes=["n02"])
    error("alone/train has the one class 'n02': a classifier needs two", root=tmp_path / "alone")
    (root / "val/n02/0.JPEG").unlink()
    (root / "val/n02/1.JPEG").unlink()
    error("class folder .*val/n02 holds no images")
    (root / "train/n10").rename(root / "n10")
    (root / "train/n10").mkdir()
    error("class folder .*train/n10 holds no images .*fill it or remove it")
    for path in root.glob("val/*/*"):
        path.rename(root / "val" / f"{path.parent.name}-{path.name}")
    for path in [p for p in root.glob("val/*") if p.is_dir()]:
        path.rmdir()
    error("no class folders in .*val: put the images into one folder per class", stage="validate")


def test_missing_val_is_never_the_root_or_train(root: Path) -> None:
    (root / "val").rename(root.parent / "val")
    with pytest.raises(ValueError, match=r"no val/ or validation/ in .*data\.val_fraction 0\.1"):
        module(root).setup("fit")
    data = module(root)
    make_trainer(max_epochs=1, limit_val_batches=0).fit(Recorder(), datamodule=data)  # IN-22k has no val split
    assert data.val_set is None


def test_val_fraction_holds_out_by_class_and_seed(root: Path) -> None:
    def split(**options) -> tuple[list, list]:
        data = module(root, **options)
        data.setup("fit")
        return contents(data.train_set), contents(data.val_set)

    with pytest.warns(UserWarning, match="val_fraction has no effect"):
        split(val_fraction=0.3)
    (root / "val").rename(root.parent / "val")
    train, val = split(val_fraction=0.3)
    assert sorted(train + val) == [(40 * label + n, label) for label in range(3) for n in range(3)]
    assert [label for _, label in val] == [0, 1, 2]
    assert split(val_fraction=0.3) == (train, val)
    assert any(split(val_fraction=0.3, seed=seed)[1] != val for seed in range(1, 5))
    alone = module(root, val_fraction=0.3)
    alone.setup("validate")
    assert contents(alone.val_set) == val and alone.class_names == CLASSES
    with pytest.raises(ValueError, match="has one image, so val_fraction cannot"):
        stratified_split(np.array([0, 0, 1]), fraction=0.5, seed=0)


def test_evaluation_without_the_training_set_takes_the_checkpoints_classes(root: Path, tmp_path: Path) -> None:
    trained = module(root)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(Recorder(), datamodule=trained)
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    (root / "train").rename(root.parent / "train")
    for path in (root / "val/n01").iterdir():
        path.unlink()
    (root / "val/n01").rmdir()
    data = module(root)
    with pytest.warns(UserWarning, match="no images of 1 of the 3"):
        make_trainer().validate(Recorder(), datamodule=data, ckpt_path=tmp_path / "it.ckpt", verbose=False)
    assert data.class_names == CLASSES
    assert torch.cat([y_B for _, y_B in data.val_dataloader()]).tolist() == [1, 1, 2, 2]
    (root / "val/n02").rename(root / "val/n77")
    with pytest.raises(ValueError, match="val has the class 'n77', which the training set lacks"):
        make_trainer().validate(Recorder(), datamodule=module(root), ckpt_path=tmp_path / "it.ckpt", verbose=False)


def test_classes_that_changed_since_the_checkpoint_stop_a_resume(root: Path, tmp_path: Path) -> None:
    trainer = make_trainer(max_epochs=1)
    trainer.fit(Recorder(), datamodule=module(root))
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    for split in ("train", "val"):
        write_split(root / f"{split}2", classes=CLASSES[:1])
        (root / f"{split}2/n01").rename(root / split / "n005")
    with pytest.raises(ValueError, match="on 3 classes, the data has 4; they first differ in class 0: n01 in the"):
        make_trainer(max_epochs=2).fit(Recorder(), datamodule=module(root), ckpt_path=tmp_path / "it.ckpt")


def test_predict_needs_no_data_folder(root: Path, tmp_path: Path) -> None:
    data = module(tmp_path / "nowhere", predict_path=str(root / "val"))
    data.setup("predict")
    assert data.class_names is None and list(data.predict_files)[:3] == ["n01/0.JPEG", "n01/1.JPEG", "n02/0.JPEG"]


# ---- small parts


def test_hyperparameters_are_primitive_and_complete(root: Path) -> None:
    data = module(root, scale=(0.5, 1.0))
    again = ImageNetDataModule(**data.hparams)
    assert again.hparams == data.hparams and again.scale == (0.5, 1.0)
    flat = [v for value in data.hparams.values() for v in (value if isinstance(value, tuple | list) else [value])]
    assert all(value is None or type(value) in (int, float, str, bool) for value in flat)


def test_packed_strings() -> None:
    strings = ["", "n01/ä.JPEG", "x", "\udcff.png", ""]
    assert list(PackedStrings(strings)) == strings and len(PackedStrings([])) == 0


def test_colour_jitter_beside_rand_augment_is_told(root: Path) -> None:
    with pytest.warns(UserWarning, match=r"color_jitter=0\.2 has no effect"):
        module(root, color_jitter=0.2).setup("fit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(root).setup("fit")  # the published pair of settings
        module(root, color_jitter=0.2, auto_augment=None).setup("fit")
