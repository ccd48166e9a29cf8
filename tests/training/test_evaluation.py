"""What `test` logs, against a plain computation from a table of logits that images point into by their pixels."""

from __future__ import annotations

import json
import pkgutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import nn

from hornet_lit.data import ImageNetDataModule
from hornet_lit.evaluation import new_metrics
from hornet_lit.module import ImageClassifier
from hornet_lit.optim import Ema
from hornet_lit.writers import PredictionSheet

SIDE, CROP = 32, 28  # 28 / 0.875: nothing is resized
MIDDLE, CORNERS = (2, 2), [(0, 0), (0, 4), (4, 0), (4, 4)]  # where crops begin
MIRRORED = [(row, column + CROP - 1) for row, column in [MIDDLE, *CORNERS]]
VIEWS = {
    "center": [MIDDLE],
    "flip": [MIDDLE, MIRRORED[0]],
    "five_crop": [MIDDLE, *CORNERS],
    "ten_crop": [MIDDLE, *CORNERS, *MIRRORED],
}


class Table(nn.Module):
    """Gives row v of a table where v is the grey level of an image's first pixel."""

    def __init__(self, logits_VK: np.ndarray) -> None:
        super().__init__()
        self.logits_VK = nn.Parameter(torch.from_numpy(logits_VK).float())

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        value_B = ((x_BCHW[:, 0, 0, 0] * 0.5 + 0.25) * 255).round().long()
        return self.logits_VK[value_B]


def probabilities(pixels_NHW: np.ndarray, logits_VK: np.ndarray, views: str) -> list[np.ndarray]:
    """Of each image (K,): the mean over its views."""
    e_VK = np.exp(logits_VK.astype(np.float64))
    p_VK = e_VK / e_VK.sum(axis=1, keepdims=True)
    return [np.mean([p_VK[pixels_HW[place]] for place in VIEWS[views]], axis=0) for pixels_HW in pixels_NHW]


def plain(
    pixels_NHW: np.ndarray, labels: list[list[int]], logits_VK: np.ndarray, views: str, scored: list[int]
) -> dict[str, float]:
    """Accuracy, mean negative logarithm of the (nearest) label's probability, and calibration error; image by image."""
    found = []
    for p_S, right in zip(probabilities(pixels_NHW, logits_VK[:, scored], views), labels, strict=True):
        p = dict(zip(scored, p_S, strict=True))
        ranked = sorted(scored, key=lambda label: -p[label])
        hits = [label in right for label in ranked[:5]]
        found.append((hits[0], any(hits), -np.log(max(p[label] for label in right)), p[ranked[0]]))
    acc1, acc5, loss, confidence = np.array(found, dtype=np.float64).T
    bins = np.ceil(confidence * 15)
    gaps = [abs(acc1[bins == b].sum() - confidence[bins == b].sum()) for b in range(1, 16)]
    return {"acc1": acc1.mean(), "acc5": acc5.mean(), "loss": loss.mean(), "ece": sum(gaps) / len(found)}


def write(path: Path, pixels_HW: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels_HW).save(path, "PNG")


def images_and_tables(labels: list[list[int]]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Noise whose first pixel of the middle crop counts the images, and two tables that are right for some of them."""
    random = np.random.default_rng(5)
    pixels_NHW = random.integers(0, 256, (len(labels), SIDE, SIDE), dtype=np.uint8)
    pixels_NHW[:, *MIDDLE] = np.arange(len(labels))
    tables = []
    for share in (0.5, 0.8):
        logits_VK = random.normal(0, 2, (256, 1000)).astype(np.float32)
        for value, right in enumerate(labels):
            logits_VK[value, right[-1]] += 7 * (random.random() < share)
        tables.append(logits_VK)
    return pixels_NHW, tables


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_real"])
def test_what_is_logged_is_what_a_plain_computation_gives(tmp_path: Path, name: str, views: str) -> None:
    def listed(file: str) -> str:
        return (pkgutil.get_data("timm.data", f"_info/{file}") or b"").decode()

    wnids = listed("imagenet_synsets.txt").split()
    if name == "imagenet_a":
        scored = [wnids.index(wnid) for wnid in listed("imagenet_a_synsets.txt").split()]
        files = [f"{wnids[scored[i % 200]]}/{i:03d}.jpg" for i in range(250)]
        labels = [[scored[i % 200]] for i in range(250)]
    else:
        scored, real = list(range(1000)), json.loads(listed("imagenet_real_labels.json"))
        numbers = [i + 1 for i in range(60) if real[i]]
        files, labels = [f"ILSVRC2012_val_{n:08d}.JPEG" for n in numbers], [real[n - 1] for n in numbers]
    pixels_NHW, tables = images_and_tables(labels)
    for file, pixels_HW in zip(files, pixels_NHW, strict=True):
        write(tmp_path / "set" / file, pixels_HW)

    module = ImageClassifier(num_classes=1000)
    module.metrics = new_metrics(1000)
    module.ema = Ema(Table(tables[1]), decay=0.9)
    module.network = Table(tables[0])
    sizes = {"img_size": CROP, "eval_batch_size": 32, "num_workers": 0, "mean": (0.25,) * 3, "std": (0.5,) * 3}
    data = ImageNetDataModule(root=str(tmp_path / "set"), evaluation_set=name, views=views, **sizes)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path / "run",
        callbacks=[PredictionSheet()] if views == "ten_crop" else [],
    )
    (found,) = trainer.test(module, datamodule=data, verbose=False)

    data.predict_path, rows = str(tmp_path / "set"), []
    for batch in trainer.predict(module, datamodule=data):
        rows += batch["probability"]
    order = np.argsort(files)  # predict goes by file name
    np.testing.assert_allclose(rows, probabilities(pixels_NHW[order], tables[1], views), atol=1e-6)

    for suffix, logits_VK in zip(("", "_ema"), tables, strict=True):
        expected = plain(pixels_NHW, labels, logits_VK, views, scored)
        assert 0 < expected["acc1"] < expected["acc5"] <= 1, "a telling case"
        for metric, value in expected.items():
            assert found[f"test/{metric}{suffix}"] == pytest.approx(value, abs=2e-6), metric + suffix
    assert (tmp_path / "run" / "predictions.png").is_file() == (views == "ten_crop")
    if views == "center":  # the other classes' and the other labels' part in it
        everything = plain(pixels_NHW, [right[:1] for right in labels], tables[0], views, list(range(1000)))
        assert abs(found["test/acc1"] - everything["acc1"]) > 0.01
