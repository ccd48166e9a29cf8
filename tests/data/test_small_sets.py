"""Digits and CIFAR: contents, splits, formats, and augmentation of whole batches."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from hornet_lit.data import CIFARDataModule, DigitsDataModule
from hornet_lit.data.cifar_names import NAMES
from hornet_lit.data.digits import load_digits, save_images
from hornet_lit.data.tensors import CropFlip, Cutout, PerImage, RandomAffine, TensorImages
from hornet_lit.data.transforms import rand_augment


def test_digits_split_is_fixed_stratified_and_disjoint() -> None:
    (train_x, train_y), (test_x, test_y) = load_digits(split="train", img_size=8), load_digits(split="test", img_size=8)
    assert (len(train_y), len(test_y)) == (1437, 360)
    assert test_y.bincount().min() >= 35 and test_y.bincount().max() <= 37
    assert int(train_x.max()) == 255
    train = {x.numpy().tobytes() for x in train_x}
    assert sum(x.numpy().tobytes() in train for x in test_x) == 0
    assert test_y[:10].tolist() == [1, 4, 8, 6, 5, 9, 9, 1, 3, 2], "the held-out images must stay the same for ever"


def test_digits_saved_and_predicted_are_the_held_out_ones(tmp_path: Path) -> None:
    paths = save_images(tmp_path, 12)
    data = DigitsDataModule(predict_path=str(tmp_path), eval_batch_size=5)
    data.setup("predict")
    data.setup("validate")
    assert list(data.predict_files) == [path.name for path in paths]
    x_BCHW = torch.cat([x for x, _ in data.predict_dataloader()])
    assert torch.equal(x_BCHW, data.val_set.x_NCHW[:12])  # type: ignore[union-attr]
    assert torch.cat([index for _, index in data.predict_dataloader()]).tolist() == list(range(12))
    with pytest.raises(ValueError, match="ask for 1 to 360"):
        save_images(tmp_path, 361)


def make_images(count: int, *, side: int = 32, channels: int = 3) -> Tensor:
    return torch.randint(0, 256, (count, channels, side, side), generator=torch.Generator().manual_seed(0)).byte()


def test_crop_and_flip_equal_padding_cropping_and_flipping_one_by_one() -> None:
    x_NCHW, index = make_images(40), torch.arange(40)
    step = CropFlip(size=40, seed=0, padding=4)
    drawn = step.of(3, index)
    padded = torch.nn.functional.pad(x_NCHW.float(), (4,) * 4, mode="reflect").byte()
    for got, big, shift, flip in zip(step(x_NCHW, 3, index), padded, drawn["shift"], drawn["flip"], strict=True):
        top, left = (shift + 4).tolist()
        want = big[:, top : top + 32, left : left + 32]
        assert torch.equal(got, want.flip(2) if flip else want)
    assert 8 < int(drawn["flip"].sum()) < 32
    assert set(drawn["shift"].flatten().tolist()) == set(range(-4, 5))


def test_affine_without_any_movement_is_the_identity() -> None:
    x_NCHW = make_images(5)
    still = RandomAffine(size=5, seed=0, degrees=0, shift=0, zoom=0)
    assert (still(x_NCHW, 0, torch.arange(5)).int() - x_NCHW.int()).abs().max() <= 1
    shifted = RandomAffine(size=5, seed=0, degrees=0, shift=0.25, zoom=0)
    theta = shifted.of(0, torch.arange(5))["theta"]
    assert theta[:, :, 2].abs().max() <= 0.5 and torch.equal(theta[0, :, :2], torch.eye(2))


def test_cutout_fills_one_box() -> None:
    x_NCHW = torch.full((30, 3, 32, 32), 7, dtype=torch.uint8)
    step = Cutout(size=30, seed=0, side=8, colour=(1, 2, 3), image_size=(32, 32))
    x_NCHW = step(x_NCHW, 0, torch.arange(30))
    changed_N = (x_NCHW[:, 0] == 1).sum((1, 2))
    assert int(changed_N.min()) >= 16 and int(changed_N.max()) == 64
    assert torch.equal(x_NCHW[:, 2] == 3, x_NCHW[:, 0] == 1)


@pytest.mark.parametrize("kind", ["affine", "crop", "cutout", "rand"])
def test_augmentation_depends_on_seed_epoch_and_index_only(kind: str) -> None:
    """However the images are put into batches, and whichever epochs came before."""

    def make(seed: int):
        if kind == "affine":
            return RandomAffine(size=20, seed=seed, degrees=10, shift=0.1, zoom=0.1)
        if kind == "crop":
            return CropFlip(size=20, seed=seed)
        if kind == "cutout":
            return Cutout(size=20, seed=seed, side=8, colour=(0, 0, 0), image_size=(32, 32))
        return PerImage(
            rand_augment("rand-m15-mstd0.5-inc1", {"translate_const": 14, "img_mean": (0, 0, 0)}), seed=seed
        )

    x_NCHW, everything = make_images(20), torch.arange(20)
    whole = make(0)(x_NCHW, 4, everything)
    step = make(0)
    step(x_NCHW, 9, everything)
    some = torch.tensor([17, 3, 8])
    assert torch.equal(step(x_NCHW[some], 4, some), whole[some])
    assert not torch.equal(step(x_NCHW, 5, everything), whole)
    assert not torch.equal(make(1)(x_NCHW, 4, everything), whole)


def test_every_published_rand_augment_runs() -> None:
    """Its posterize asks Pillow for 0 bits at the published magnitudes, which Pillow 13 refuses."""
    for magnitude in (9, 12, 15):
        for channels in (1, 3):
            step = PerImage(
                rand_augment(
                    f"rand-m{magnitude}-n6-mstd0.5-inc1", {"translate_const": 14, "img_mean": (9,) * channels}
                ),
                seed=0,
            )
            x_NCHW = make_images(150, side=16, channels=channels)
            assert step(x_NCHW, 0, torch.arange(150)).shape == x_NCHW.shape
    with pytest.raises(ValueError, match="give a RandAugment string"):
        rand_augment("augmix-m5", {})


# ---- CIFAR's formats


def write_folders(root: Path, *, per_class: int = 2, names: list[str] = NAMES[10]) -> None:
    for split in ("train", "test"):
        for label, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            for number in range(per_class):
                pixels = np.full((32, 32, 3), 10 * label + number + (100 if split == "test" else 0), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number:04d}.png")


def write_pickles(root: Path, archive: type[CIFAR10], monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR's own format, with the checksums that torchvision expects replaced by those of these few images."""
    folder = root / archive.base_folder
    folder.mkdir(parents=True)
    is_100 = archive is CIFAR100
    key, names = ("fine_labels", NAMES[100]) if is_100 else ("labels", NAMES[10])

    def write(name: str, content: dict) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def batch(start: int) -> dict:
        labels = [(start + i) % len(names) for i in range(20)]
        return {"data": np.repeat(np.array(labels, np.uint8), 3072).reshape(20, 3072), key: labels}

    train = [write(name, batch(20 * i)) for i, (name, _) in enumerate(archive.train_list)]
    monkeypatch.setattr(archive, "train_list", train)
    monkeypatch.setattr(archive, "test_list", [write(archive.test_list[0][0], batch(5))])
    meta = write(archive.meta["filename"], {archive.meta["key"]: names})
    monkeypatch.setattr(archive, "meta", archive.meta | {"md5": meta[1]})


@pytest.mark.parametrize("num_classes", [10, 100])
def test_torchvisions_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_classes: int) -> None:
    archive = CIFAR10 if num_classes == 10 else CIFAR100
    write_pickles(tmp_path, archive, monkeypatch)
    data = CIFARDataModule(num_classes=num_classes, root=str(tmp_path), batch_size=10)
    data.setup("fit")
    assert data.class_names == NAMES[num_classes] and len(data.train_set) == 20 * len(archive.train_list)
    for images in (data.train_set, data.val_set):
        assert torch.equal(images.x_NCHW[:, 1, 5, 5].long(), images.y_N)
    (tmp_path / archive.base_folder / archive.train_list[0][0]).write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"incomplete or damaged.*delete it"):
        CIFARDataModule(num_classes=num_classes, root=str(tmp_path)).setup("fit")


def test_packed_archive_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pickles(tmp_path / "made", CIFAR10, monkeypatch)
    (tmp_path / "root").mkdir()
    with tarfile.open(tmp_path / "root" / CIFAR10.filename, "w:gz") as archive:
        archive.add(tmp_path / "made" / CIFAR10.base_folder, CIFAR10.base_folder)
    data = (tmp_path / "root" / CIFAR10.filename).read_bytes()
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(data).hexdigest())
    module = CIFARDataModule(root=str(tmp_path / "root"), batch_size=10)
    module.setup("fit")
    assert len(module.train_set) == 100 and len(module.val_set) == 20


@pytest.mark.parametrize("kind", ["folder", ".tar", ".tar.gz", ".tar.xz"])
def test_folders_and_tar_files(tmp_path: Path, kind: str) -> None:
    write_folders(tmp_path / "c")
    (tmp_path / "c/train/.ipynb_checkpoints").mkdir()
    root = tmp_path / "c"
    if kind != "folder":
        root = tmp_path / f"images{kind}"
        with tarfile.open(root, f"w:{kind.rpartition('.tar')[2].lstrip('.')}") as archive:
            archive.add(tmp_path / "c", "anything/cifar")
    data = CIFARDataModule(root=str(root), batch_size=4)
    data.setup("fit")
    expected = torch.tensor([10 * label + number for label in range(10) for number in range(2)])
    assert torch.equal(data.train_set.x_NCHW[:, 0, 0, 0].long(), expected)
    assert torch.equal(data.val_set.x_NCHW[:, 2, 9, 9].long(), expected + 100)
    assert data.train_set.y_N.tolist() == data.val_set.y_N.tolist() == [label for label in range(10) for _ in "ab"]
    alone = CIFARDataModule(root=str(root))
    alone.setup("validate")
    assert alone.train_set is None and torch.equal(alone.val_set.x_NCHW, data.val_set.x_NCHW)


def test_some_classes_and_another_size(tmp_path: Path) -> None:
    write_folders(tmp_path)
    data = CIFARDataModule(root=str(tmp_path), class_subset=[7, 2], batch_size=2, img_size=48)
    data.setup("fit")
    assert data.class_names == ["horse", "bird"]
    assert sorted(zip(data.train_set.y_N.tolist(), data.train_set.x_NCHW[:, 0, 0, 0].tolist(), strict=True)) == [
        (0, 70), (0, 71), (1, 20), (1, 21),
    ]  # fmt: skip
    x_BCHW, _ = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert x_BCHW.shape == (4, 3, 48, 48)
    assert torch.equal(data.denormalise(x_BCHW)[:, 0, 7, 7], data.val_set.x_NCHW[:, 0, 0, 0])


def test_everything_on_is_reproducible(tmp_path: Path) -> None:
    write_folders(tmp_path)

    def batches() -> list[Tensor]:
        options = dict(auto_augment="rand-m9-mstd0.5-inc1", cutout=8)
        data = CIFARDataModule(root=str(tmp_path), batch_size=5, **options)
        data.setup("fit")
        return [x for x, _ in data.train_dataloader()]

    first, second = batches(), batches()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and len(first) == 4


def unreachable(*_) -> None:
    raise URLError("Name or service not known")


def test_cifar_mistakes_name_path_and_mend(tmp_path: Path) -> None:
    def fit(root: Path, **options) -> None:
        CIFARDataModule(root=str(root), **options).setup("fit")

    with pytest.raises(ValueError, match=r"no CIFAR-10 in .*nowhere.*data\.download true"):
        fit(tmp_path / "nowhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.datasets.CIFAR10.download", unreachable)
        with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz cannot be fetched .*leave data\.download"):
            CIFARDataModule(root=str(tmp_path / "nowhere"), download=True).prepare_data()
    write_folders(tmp_path / "a", per_class=1)
    with pytest.raises(ValueError, match=r"'airplane' is not a class of CIFAR-100.*ImageNetDataModule"):
        fit(tmp_path / "a", num_classes=100)
    image = tmp_path / "a/train/cat/0000.png"
    good = image.read_bytes()
    image.write_bytes(good[:60])
    with pytest.raises(ValueError, match=r"cannot read image .*train/cat/0000\.png.*Replace the file"):
        fit(tmp_path / "a")
    Image.new("RGB", (40, 32)).save(image)
    with pytest.raises(ValueError, match=r"0000\.png has 40×32 pixels"):
        fit(tmp_path / "a")
    image.unlink()
    with pytest.raises(ValueError, match="train/cat holds no images"):
        fit(tmp_path / "a")
    image.parent.rmdir()
    with pytest.raises(ValueError, match=r"train: no images of class 'cat' \(1 of 10"):
        fit(tmp_path / "a")
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"cannot read .*bad\.tar as a tar file"):
        fit(tmp_path / "bad.tar")
    with tarfile.open(tmp_path / "one.tar", "w") as archive:
        for split in ("train", "test"):
            archive.add(tmp_path / "a" / split / "dog", f"{split}/dog")
    with pytest.raises(ValueError, match=r"one\.tar, train/: no images of class 'airplane' \(9 of 10"):
        fit(tmp_path / "one.tar")
    with tarfile.open(tmp_path / "big.tar", "w") as archive:
        member = tarfile.TarInfo("train/cat/huge.png")
        member.size = 5 * 2**20
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    with pytest.raises(ValueError, match="too many for a 32×32 image"):
        fit(tmp_path / "big.tar")


def test_tensor_images_pad_with_the_first() -> None:
    data = TensorImages(make_images(3), torch.tensor([5, 6, 7]))
    x_BCHW, y_B = data.__getitems__([(0, 2), (0, 3), (0, 9)])
    assert y_B.tolist() == [7, -1, -1]
    assert torch.equal(x_BCHW, data.x_NCHW[[2, 0, 0]])
