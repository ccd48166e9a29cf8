"""Decoding, the published transforms, bad files, and prediction lists."""

from __future__ import annotations

import io
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms as tv

from hornet_lit.data import CIFARDataModule, DigitsDataModule, ImageNetDataModule
from hornet_lit.data.images import UnreadableImageError, read_image
from hornet_lit.data.predict import find_images
from hornet_lit.data.sampling import EvalSampler
from hornet_lit.data.transforms import eval_transform, rand_augment, train_transform

from .recorder import Recorder, make_trainer

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    random_HWC = np.random.RandomState(width * height).randint(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    return Image.fromarray(random_HWC).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


# ---- the published transforms


@pytest.mark.parametrize("size", [(500, 333), (180, 400), (224, 224), (97, 301), (1, 1), (640, 257)])
@pytest.mark.parametrize("img_size", [224, 384])
def test_evaluation_is_the_published_recipe_bit_for_bit(size: tuple[int, int], img_size: int) -> None:
    bicubic = tv.InterpolationMode.BICUBIC
    if img_size >= 384:
        steps = [tv.Resize((img_size, img_size), interpolation=bicubic)]
    else:
        steps = [tv.Resize(256, interpolation=bicubic), tv.CenterCrop(img_size)]
    published = tv.Compose([*steps, tv.ToTensor(), tv.Normalize(**IMAGENET)])
    data = ImageNetDataModule(root="unused", img_size=img_size)
    image = picture(*size)
    assert torch.equal(data.normalise(data.predict_transform()(image)[None])[0], published(image))


def test_crop_pct_overrides_the_rule() -> None:
    image = picture(60, 40)
    crop = eval_transform(img_size=32, crop_pct=1.0)(image)
    want = tv.Compose([tv.Resize(32, interpolation=tv.InterpolationMode.BICUBIC), tv.CenterCrop(32), tv.PILToTensor()])
    assert torch.equal(crop, want(image))
    at_384 = eval_transform(img_size=384, crop_pct=0.9)(image)
    assert not torch.equal(at_384, eval_transform(img_size=384)(image))


def test_settings_that_timm_would_only_assert_are_told() -> None:
    for wrong in ("cubic", ""):
        with pytest.raises(ValueError, match=r"interpolation is .*: choose bicubic, bilinear"):
            eval_transform(img_size=32, interpolation=wrong)
    for wrong in ("rnd-m9", "rand-q9"):
        with pytest.raises(ValueError, match=f"auto_augment is '{wrong}'.* rand-m9-mstd0.5-inc1"):
            train_transform(img_size=32, auto_augment=wrong, mean=IMAGENET["mean"])
        with pytest.raises(ValueError, match=f"auto_augment is '{wrong}'.* rand-m9-mstd0.5-inc1"):
            rand_augment(wrong, {})
    for wrong in (dict(hflip=3.0), dict(reprob=-0.1)):
        for kind in (ImageNetDataModule, CIFARDataModule):
            with pytest.raises(ValueError, match="give a share between 0 and 1"):
                kind(root="unused", **wrong)


def test_random_interpolation_is_for_training_alone() -> None:
    """ImageNetDataModule hands one setting to both transforms."""
    image = picture(60, 40)
    assert torch.equal(eval_transform(img_size=32, interpolation="random")(image), eval_transform(img_size=32)(image))
    assert train_transform(img_size=32, interpolation="random", mean=IMAGENET["mean"])(image).shape == (3, 32, 32)


def test_training_is_timms_published_pipeline() -> None:
    transform = train_transform(img_size=224, mean=IMAGENET["mean"])
    crop, flip, augment, _ = transform.transforms
    kinds = (RandomResizedCropAndInterpolation, tv.RandomHorizontalFlip, RandAugment)
    assert all(map(isinstance, (crop, flip, augment), kinds))
    assert crop.interpolation == tv.InterpolationMode.BICUBIC or str(crop.interpolation) == "bicubic"
    assert (crop.scale, crop.ratio, crop.size, flip.p) == ((0.08, 1.0), (3 / 4, 4 / 3), (224, 224), 0.5)
    op = augment.ops[0]
    assert (op.magnitude, op.magnitude_std, augment.num_layers) == (9, 0.5, 2)
    assert {op.name for op in augment.ops} >= {"PosterizeIncreasing", "SolarizeIncreasing"}
    assert op.kwargs["fillcolor"] == (124, 116, 104)
    plain = train_transform(img_size=32, auto_augment=None, mean=IMAGENET["mean"])
    assert [type(step).__name__ for step in plain.transforms][2] == "ColorJitter"


@pytest.mark.parametrize("augment", ["rand-m9-mstd0.5-inc1", "rand-m15-mstd0.5-inc1", "augmix-m5-w4-d2", "original"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_training_transform_never_fails(augment: str, in_chans: int) -> None:
    mean = (0.4,) * in_chans
    transform = train_transform(img_size=16, in_chans=in_chans, auto_augment=augment, mean=mean)
    random.seed(0)
    for image in [picture(20, 30, "L" if in_chans == 1 else "RGB"), picture(1, 1, "L" if in_chans == 1 else "RGB")]:
        for _ in range(40):
            x_CHW = transform(image)
            assert x_CHW.shape == (in_chans, 16, 16) and x_CHW.dtype == torch.uint8


# ---- decoding


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(dtype: type) -> np.ndarray:
    return np.linspace(0, np.iinfo(dtype).max, 16 * 16).reshape(16, 16).astype(dtype)


def test_every_mode_becomes_rgb_or_grey() -> None:
    colours = picture(12, 9)
    grey_HW = gradient(np.uint8)
    wanted = np.repeat(grey_HW[..., None], 3, 2)
    deep = Image.fromarray(gradient(np.uint16))  # torchvision and timm turn this one white
    for data in (
        saved(deep),
        saved(deep, "TIFF"),
        saved(Image.fromarray(gradient(np.uint16).astype(np.int32)), "TIFF"),
    ):
        assert np.abs(np.asarray(read_image(data, name="x")).astype(int) - wanted).max() <= 1
        assert read_image(data, name="x", in_chans=1).mode == "L"
    assert np.array_equal(np.asarray(read_image(saved(Image.fromarray(grey_HW)), name="x")), wanted)
    palette = colours.quantize(16)
    assert np.array_equal(read_image(saved(palette), name="x"), palette.convert("RGB"))
    clear = saved(palette, transparency=bytes(range(0, 256, 16)))
    assert np.array_equal(read_image(clear, name="x"), palette.convert("RGB"))
    assert np.array_equal(read_image(saved(colours.convert("RGBA")), name="x"), colours)
    cmyk = saved(colours.convert("CMYK"), "JPEG", quality=100)
    assert np.abs(np.asarray(read_image(cmyk, name="x")).astype(int) - np.asarray(colours)).mean() < 6
    bitmap = Image.fromarray(grey_HW).convert("1")
    assert np.array_equal(read_image(saved(bitmap), name="x"), bitmap.convert("RGB"))
    for kind in ("WEBP", "BMP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        assert np.array_equal(read_image(saved(colours, kind, **options), name="x"), colours)
    assert read_image(saved(picture(1, 1)), name="x").size == (1, 1)


BAD: dict[str, Callable[[], bytes]] = {
    "truncated": lambda: saved(picture(64, 64), "JPEG")[:-400],
    "truncated.png": lambda: saved(picture(64, 64))[:-400],
    "empty": lambda: b"",
    "html": lambda: b"<!DOCTYPE html><html>Sign in to download</html>",
    "float": lambda: saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
    "deep": lambda: saved(Image.fromarray(np.full((4, 4), 10**6, np.int32)), "TIFF"),
    "bomb": lambda: saved(Image.new("1", (20000, 20000))),
}


@pytest.mark.parametrize(("kind", "workers"), [*((kind, 0) for kind in BAD), ("truncated", 1)])
def test_bad_image_stops_training_and_validation_by_name(tmp_path: Path, kind: str, workers: int) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            picture(20, 20).save(tmp_path / split / name / "good.png")
    for split in ("train", "val"):
        bad = tmp_path / split / "cat/bad.jpg"
        bad.write_bytes(BAD[kind]())
        data = ImageNetDataModule(
            root=str(tmp_path), batch_size=1, batch_size_per_device=None, num_workers=workers, img_size=16
        )
        data.setup("fit")
        loader = data.train_dataloader() if split == "train" else data.val_dataloader()
        with pytest.raises(ValueError, match=rf"cannot read image .*{split}/cat/bad\.jpg: .*Replace the file"):
            list(loader)
        bad.unlink()


def test_missing_file_and_dangling_link_are_named(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UnreadableImageError, match=r"cannot read image .*link\.png"):
        read_image(tmp_path / "link.png", name=str(tmp_path / "link.png"))


def test_what_is_no_ordinary_file_is_not_read(tmp_path: Path) -> None:
    """A pipe would be waited for without end, and a device, or a file of a terabyte, would fill the memory."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(2**40)
    for name, reason in (("pipe", "no ordinary file"), ("zero", "no ordinary file"), ("large", f"{2**40} bytes, more")):
        with pytest.raises(UnreadableImageError, match=rf"cannot read image {name}\.png: {reason}"):
            read_image(tmp_path / f"{name}.png", name=f"{name}.png")
    with pytest.raises(ValueError, match="neither an image nor a text file"):
        (tmp_path / "large.png").rename(tmp_path / "large.txt")
        find_images(str(tmp_path / "large.txt"))


def test_the_content_decides_the_format_and_only_image_formats_are_tried() -> None:
    """Pillow would hand PostScript under any name to Ghostscript."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(UnreadableImageError, match="none of the image formats BMP, GIF, JPEG"):
        read_image(postscript, name="x.jpg")
    assert read_image(saved(picture(5, 4), "GIF"), name="x.jpg").size == (5, 4)


# ---- prediction


def write_pictures(folder: Path) -> list[str]:
    names = ["a.jpg", "b/c.PNG", "b/d.webp", "e.tif", "z/deep/er/f.bmp"]
    for place, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image = picture(20 + 9 * place, 50 - 8 * place, ("L", "RGB", "RGB", "CMYK", "P")[place])
        image.save(folder / name)
    for hidden in (".hidden.png", ".ipynb_checkpoints/a.png", "notes.txt"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_bytes(b"no image")
    return names


@pytest.mark.parametrize(
    "make",
    [
        lambda **k: ImageNetDataModule(root="unused", img_size=32, num_workers=0, **k),
        lambda **k: CIFARDataModule(root="unused", **k),
        lambda **k: DigitsDataModule(**k),
    ],
    ids=["imagenet", "cifar", "digits"],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_predict_gives_every_image_once_and_in_order(tmp_path: Path, make, workers: int) -> None:
    names = write_pictures(tmp_path)
    data = make(predict_path=str(tmp_path), eval_batch_size=2)
    data.num_workers = workers
    indices = make_trainer().predict(Recorder(), datamodule=data)
    assert list(data.predict_files) == names
    assert torch.cat(indices).tolist() == [0, 1, 2, 3, 4]
    x_BCHW, _ = next(iter(data.predict_dataloader()))
    assert x_BCHW.shape == (2, data.in_chans, 32, 32) and x_BCHW.dtype == torch.uint8


def test_predict_pads_ranks_without_a_batch(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    data = DigitsDataModule(predict_path=str(tmp_path), eval_batch_size=3)
    data.setup("predict")
    for world in (2, 3, 7):
        samplers = [EvalSampler(size=5, batch_size=3, world=world, rank=rank) for rank in range(world)]
        seen = torch.cat([data._predict_set.__getitems__([key])[1] for sampler in samplers for key in sampler])
        assert seen[seen >= 0].tolist() == [0, 1, 2, 3, 4] and (seen < 0).sum() == 2 * (world - 2)


def test_lists_and_single_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = write_pictures(tmp_path / "pictures")
    listing = tmp_path / "pictures/list.txt"
    listing.write_text(f"b/c.PNG\n\n{tmp_path}/pictures/a.jpg\nb/c.PNG\n")

    def files(path: object) -> tuple[list[str], int]:
        data = DigitsDataModule(predict_path=str(path))
        data.setup("predict")
        return list(data.predict_files), sum(len(y_B) for _, y_B in data.predict_dataloader())

    assert files(listing) == (["b/c.PNG", f"{tmp_path}/pictures/a.jpg", "b/c.PNG"], 3)
    monkeypatch.chdir(tmp_path / "pictures")
    (tmp_path / "elsewhere.txt").write_text("\n".join(names))
    assert files(tmp_path / "elsewhere.txt") == (names, 5)
    assert files("a.jpg") == (["a.jpg"], 1)


def test_a_list_of_many_images_takes_little_memory(tmp_path: Path) -> None:
    """Names and paths of a million images as objects would be half a gigabyte, in every loader process."""
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "list.txt").write_text("a.png\n" * 100_000)
    tracemalloc.start()
    try:
        kept = find_images(str(tmp_path / "list.txt"))
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [len(part) for part in kept] == [100_000] * 2
    text = len("a.png") + len(str(tmp_path / "a.png"))
    assert size < 100_000 * (text + 2 * 8) * 1.1  # the text and where each string ends


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """os.walk leaves it out, and with it its images, without a word."""
    write_pictures(tmp_path)
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == "deep":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    message = "cannot list folder .*deep: Permission denied. Make it readable, or take it out"
    with pytest.raises(ValueError, match=message):
        find_images(str(tmp_path))
    for name in ("train/a", "train/deep", "val/a", "val/deep"):
        (tmp_path / name).mkdir(parents=True)
        picture(9, 9).save(tmp_path / name / "x.png")
    with pytest.raises(ValueError, match=message):
        ImageNetDataModule(root=str(tmp_path)).setup("fit")


def test_nothing_to_predict_is_said(tmp_path: Path) -> None:
    def error(message: str, path: Path | None) -> None:
        with pytest.raises(ValueError, match=message):
            DigitsDataModule(predict_path=None if path is None else str(path)).setup("predict")

    error("nothing to predict: give --data.predict_path FOLDER", None)
    error("nowhere does not exist: give data.predict_path a folder", tmp_path / "nowhere")
    error("no images in folder", tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    error("list .*empty.txt is empty", tmp_path / "empty.txt")
    (tmp_path / "list.txt").write_text("one.png\ntwo.png\n")
    error("2 of the 2 images listed in .*list.txt do not exist, the first is one.png", tmp_path / "list.txt")
    (tmp_path / "binary.dat").write_bytes(bytes(range(128, 256)))
    error("neither an image nor a text file", tmp_path / "binary.dat")
    (tmp_path / "broken.png").write_bytes(b"broken")
    data = DigitsDataModule(predict_path=str(tmp_path / "broken.png"))
    data.setup("predict")
    with pytest.raises(ValueError, match=r"cannot read image .*broken\.png"):
        list(data.predict_dataloader())
