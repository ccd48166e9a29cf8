"""Data through the command line: mistakes in folders, settings that model and data share, official weights."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision import transforms as tv

from hornet_lit.cli_errors import MAX_LINES
from tests.conftest import filled_by_rule

from .conftest import ON_CPU, SHORT, SMALL_NETWORK, Run

FOLDER = [*SMALL_NETWORK, *SHORT, "--data.img_size", "32", "--data.num_workers", "0", "--data.batch_size", "4"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


MISTAKES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no folder": (shutil.rmtree, "data folder {root} does not exist", "set data.root"),
    "no train": (lambda root: shutil.rmtree(root / "train"), "no train/ in {root}", "put its class folders"),
    "no val": (lambda root: shutil.rmtree(root / "val"), "no val/ or validation/ in {root}", "data.val_fraction"),
    "empty class": (lambda root: empty(root / "train/cat"), "{root}/train/cat holds no images", "fill it or remove it"),
    "other class": (lambda root: (root / "val/cat").rename(root / "val/kitten"), "{root}/val has the class", "remove"),
    "cut in train": (lambda root: cut(root / "train/cat/0000.png"), "{root}/train/cat/0000.png", "Replace the file"),
    "cut in val": (lambda root: cut(root / "val/cat/0000.png"), "{root}/val/cat/0000.png", "Replace the file"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_folder_is_told_with_path_and_mend(
    mistake: str, run: Run, images: Path, weights: Path, tmp_path: Path
) -> None:
    damage, said, mend = MISTAKES[mistake]
    root = tmp_path / "mine"
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            shutil.copytree(images / split / name, root / split / name)
    damage(root)
    result = run("fit", "--config", "finetune_folder", "--model.weights", weights, "--data.root", root, *FOLDER)
    assert result.code == 2 and len(result.error) <= MAX_LINES
    text = " ".join(result.error)
    assert said.format(root=root) in text and mend in text
    assert "Traceback" not in result.err


def test_a_truncated_image_to_predict_is_told(run: Run, checkpoint: Path) -> None:
    Path("photos").mkdir()
    Image.new("L", (40, 40), 7).save("photos/a.png")
    Image.new("L", (40, 40), 7).save("photos/b.png")
    Path("photos/b.png").write_bytes(Path("photos/b.png").read_bytes()[:60])
    result = run("predict", "--ckpt_path", checkpoint, "--data.predict_path", "photos", *ON_CPU)
    assert result.code == 2 and "cannot read image photos/b.png" in result.error[0]
    assert not Path("predictions.csv").exists()


def test_an_official_file_given_as_a_checkpoint(run: Run, official_file: Callable[..., Path]) -> None:
    path = official_file(timm.create_model("hornet_pico_32"))
    result = run("validate", "--config", "digits", "--ckpt_path", path)
    assert result.code == 2 and str(path) in result.error[0]
    assert "--model.weights FILE --config RECIPE" in result.error[1]
    assert "trust" not in result.err, "torch's own words advise to load it unsafely"


# ---- settings that model and data share


def test_some_of_the_classes(run: Run, images: Path) -> None:
    """The data's num_classes is 10 and the model's 2: Lightning's loggers refuse one name with two values."""
    words = ["--data.class_subset", "[0, 3]", "--model.num_classes", "2", "--data.batch_size", "4"]
    result = run("fit", "--config", "cifar10_quick", "--data.root", images, *words, *SMALL_NETWORK, *SHORT)
    assert result.code == 0, result.err[-2000:]


def test_another_size_of_the_images_is_a_warning(run: Run, images: Path, weights: Path) -> None:
    words = ["fit", "--config", "finetune_folder", "--model.weights", weights, "--data.root", images, *FOLDER]
    with pytest.warns(UserWarning, match=r"model\.img_size is 32 but the images have 48 pixels"):
        result = run(*words, "--data.img_size", "48")
    assert result.code == 0, result.err[-2000:]


# ---- official weights


def test_official_weights_predict_the_networks_own_softmax(
    run: Run, official_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Images of any size and mode, in file order, by the published evaluation: resize to 256, crop 224."""
    network = timm.create_model("hornet_tiny_7x7")
    weights = official_file(network)
    noise = np.random.default_rng(0)
    for name, size, mode in (("b/1.png", (300, 260), "RGB"), ("a.JPEG", (90, 500), "L"), ("c.webp", (400, 256), "RGB")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(noise.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).save(path)
    words = ["--model.weights", weights, "--data.predict_path", tmp_path / "photos", "--prediction.top_k", "1000"]
    result = run("predict", "--config", "hornet_t_in1k", *words, "--data.num_workers", "0", *ON_CPU)
    assert result.code == 0, result.err[-2000:]
    assert [path.name for path in Path().iterdir()] == ["predictions.csv"], "no empty run folder"

    steps = [tv.Resize(256, interpolation=tv.InterpolationMode.BICUBIC), tv.CenterCrop(224), tv.ToTensor()]
    published = tv.Compose([*steps, tv.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    network.load_state_dict(filled_by_rule(network))
    files = ["a.JPEG", "b/1.png", "c.webp"]
    x_BCHW = torch.stack([published(Image.open(tmp_path / "photos" / file).convert("RGB")) for file in files])
    with torch.inference_mode():
        expected_BK = network.eval()(x_BCHW).softmax(dim=1)
    with open("predictions.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == files
    for row, expected_K in zip(rows, expected_BK, strict=True):
        said_K = torch.zeros(1000)
        for i in range(1, 1001):
            said_K[int(row[f"class_{i}"])] = float(row[f"probability_{i}"])
        torch.testing.assert_close(said_K, expected_K, rtol=1e-4, atol=1e-7)
        names = {row[f"class_{i}"]: row[f"name_{i}"] for i in range(1, 1001)}
        assert names["0"] == "tench, Tinca tinca" and names["999"] == "toilet tissue, toilet paper, bathroom tissue"
