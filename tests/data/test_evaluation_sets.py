"""ImageNet-V2, -A, -R, -Sketch and ReaL in their own layouts: which label every image gets, and what is refused."""

from __future__ import annotations

import json
import pkgutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hornet_lit.data import DigitsDataModule, ImageNetDataModule

REAL_LABELS = json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json") or b"")


def listed(name: str) -> list[str]:
    return (pkgutil.get_data("timm.data", f"_info/{name}.txt") or b"").decode().split()


WNIDS = listed("imagenet_synsets")


def write(path: Path, number: int) -> None:
    """An image that shows a number below 65536."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (number // 256, number % 256, 0)).save(path, "PNG")


def module(root: Path, name: str, **options: object) -> ImageNetDataModule:
    sizes = {"eval_batch_size": 64, "num_workers": 0, "img_size": 16, "reprob": 0.0}
    return ImageNetDataModule(root=str(root), evaluation_set=name, **(sizes | options))


def labels_shown(data: ImageNetDataModule) -> dict[int, object]:
    """The number that an image shows → its label, or labels."""
    data.setup("test")
    batches = list(data.test_dataloader())
    x_NCHW, y_N = (torch.cat(parts) for parts in zip(*batches, strict=True))
    numbers = x_NCHW[:, 0, 8, 8].int() * 256 + x_NCHW[:, 1, 8, 8]
    assert len(set(numbers.tolist())) == len(numbers)
    return dict(zip(numbers.tolist(), y_N.tolist(), strict=True))


def test_v2_folders_are_numbers_and_not_words(tmp_path: Path) -> None:
    for label in range(1000):
        write(tmp_path / str(label) / "0123abcd.jpeg", label)
    data = module(tmp_path, "imagenet_v2")
    assert labels_shown(data) == {label: label for label in range(1000)}
    assert data.class_names == WNIDS and data.scored_classes is None


@pytest.mark.parametrize("name,classes", [("imagenet_a", 200), ("imagenet_r", 200), ("imagenet_sketch", 1000)])
def test_class_folders_by_wnid(tmp_path: Path, name: str, classes: int) -> None:
    wnids = WNIDS if classes == 1000 else listed(f"{name}_synsets")
    assert len(wnids) == classes
    expected = {sorted(WNIDS).index(wnid): sorted(WNIDS).index(wnid) for wnid in wnids}
    for label in expected:
        write(tmp_path / "set" / WNIDS[label] / "0.123_x.jpg", label)
    (tmp_path / "set" / "README.txt").write_text("as it is unpacked")
    data = module(tmp_path / "set", name)
    assert labels_shown(data) == expected
    assert data.scored_classes == (None if classes == 1000 else sorted(expected)) and data.class_names == WNIDS
    if name == "imagenet_a":
        with tarfile.open(tmp_path / "imagenet-a.tar", "w") as archive:
            archive.add(tmp_path / "set", "imagenet-a")
        assert labels_shown(module(tmp_path / "imagenet-a.tar", name)) == expected


@pytest.mark.parametrize("layout", ["flat", "val", "class folders"])
def test_real_gives_every_label_and_leaves_images_without_any_out(tmp_path: Path, layout: str) -> None:
    shown = [*range(1, 60), 50_000]
    for number in shown:
        folder = {"flat": "", "val": "val/", "class folders": f"val/{WNIDS[number % 7]}/"}[layout]
        write(tmp_path / f"{folder}ILSVRC2012_val_{number:08d}.JPEG", number)
    data = module(tmp_path, "imagenet_real")
    with pytest.warns(UserWarning, match="has 60 of ImageNet's 50000 validation images"):
        found = labels_shown(data)
    expected = {number: sorted(REAL_LABELS[number - 1]) for number in shown if REAL_LABELS[number - 1]}
    assert 0 < len(expected) < len(shown) and max(map(len, expected.values())) > 1
    assert {number: [label for label in labels if label != -1] for number, labels in found.items()} == expected
    padding = data.test_set[(0, len(expected))][1]
    assert padding.shape == (len(next(iter(found.values()))),) and (padding == -1).all()


def test_what_is_refused(tmp_path: Path) -> None:
    def error(message: str, root: Path, name: str, stage: str = "test", **options: object) -> None:
        with pytest.raises(ValueError, match=message):
            module(root, name, **options).setup(stage)

    error("evaluation_set is 'imagenet_b': choose imagenet_v2, ", tmp_path, "imagenet_b")
    for wnid in listed("imagenet_r_synsets"):
        write(tmp_path / "imagenet-r" / wnid / "art_0.jpg", 1)
    error(r"nowhere does not exist: set data\.root to where imagenet_r is", tmp_path / "nowhere", "imagenet_r")
    error(r"has the folder 'imagenet-r', which is no class of imagenet_r", tmp_path, "imagenet_r")
    error(
        r"has the folder 'n\d{8}', which is no class of imagenet_a .*of 200 are none",
        tmp_path / "imagenet-r",
        "imagenet_a",
    )
    error(r"lacks 800 of imagenet_sketch's classes, such as 'n01440764'", tmp_path / "imagenet-r", "imagenet_sketch")
    error(r"lacks 800 of imagenet_v2's classes, such as '0'", tmp_path / "imagenet-r", "imagenet_v2")
    error(r"art_0\.jpg has no ReaL label: .* ILSVRC2012_val_XXXXXXXX\.JPEG", tmp_path / "imagenet-r", "imagenet_real")
    error(r"is for `hornet-lit test`: leave it out of validate", tmp_path / "imagenet-r", "imagenet_r", "validate")
    for folder in ("val", "val/n01440764"):
        write(tmp_path / folder / "ILSVRC2012_val_00000001.JPEG", 1)
    error("has ILSVRC2012_val_00000001.JPEG more than once", tmp_path, "imagenet_real")

    data = module(tmp_path / "imagenet-r", "imagenet_r")
    data.setup("test")
    data.match_classes(WNIDS)
    with pytest.raises(ValueError, match=r"trained on 2 others \(cat, …\): test a classifier of ImageNet-1k$"):
        data.match_classes(["cat", "dog"])
    with pytest.raises(ValueError, match=r"trained on 1000 others \(0, …\): .* give the file as --model\.weights"):
        data.match_classes([str(label) for label in range(1000)])


def test_views(tmp_path: Path) -> None:
    """Which pixels each view begins with: five crops from the middle on, then their mirror images."""
    noise_HW = np.random.default_rng(0).permutation(1024).reshape(32, 32).astype(np.uint16)
    pixels_HWC = np.stack([noise_HW // 256, noise_HW % 256, 0 * noise_HW], axis=2).astype(np.uint8)
    Image.fromarray(pixels_HWC).save(tmp_path / "a.png")
    corners = [(2, 2), (0, 0), (0, 4), (4, 0), (4, 4)]
    expected = {"center": corners[:1], "five_crop": corners, "flip": corners[:1], "ten_crop": corners}
    for views, places in expected.items():
        # 28 / 0.875 = 32: nothing is resized
        data = ImageNetDataModule(predict_path=str(tmp_path), img_size=28, views=views, num_workers=0)
        data.setup("predict")
        data.trainer = type(
            "Predicting", (), {"testing": False, "predicting": True, "training": False, "precision": 32}
        )
        x, _ = data.on_after_batch_transfer(data._predict_set.__getitems__([(0, 0)]), 0)
        crops = [pixels_HWC[r : r + 28, c : c + 28] for r, c in places]
        crops += [crop[:, ::-1] for crop in crops] if views in ("flip", "ten_crop") else []
        x_VCHW = x if views == "center" else x[0]
        assert x.shape == ((1, 3, 28, 28) if views == "center" else (1, len(crops), 3, 28, 28))
        for x_CHW, crop_HWC in zip(data.denormalise(x_VCHW), crops, strict=True):
            assert (x_CHW.permute(1, 2, 0).numpy() == crop_HWC).all()


def test_views_that_do_not_exist_or_do_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="views is 'five_crop': DigitsDataModule knows center, flip"):
        DigitsDataModule(views="five_crop")  # type: ignore[arg-type]
    data = ImageNetDataModule(predict_path=str(tmp_path), img_size=384, views="ten_crop")
    write(tmp_path / "a.png", 1)
    with pytest.raises(ValueError, match=r"at 384 pixels .* no five crops: set data\.crop_pct"):
        data.setup("predict")
    with pytest.warns(UserWarning, match=r"data\.views flip has no effect in validate"):
        DigitsDataModule(views="flip").setup("validate")
