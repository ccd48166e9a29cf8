"""The script that waits for a GPU, at small size: every part runs, writes what it found, and judges its bars."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

from hornet_lit.bench import PRODUCT_SIZES
from hornet_lit.network.hornet import HorNet
from tests.device import cifar, kernels, speed, steps
from tests.device.__main__ import PARTS, main
from tests.device.report import Bar, Job, Report, read, summary

# As the authors' file does: timm's old import places, a name of ours registered, and a print.
STAND_IN = """
from timm.models.registry import register_model
from timm.models.layers import DropPath
import torch

@register_model
def hornet_pico_32(pretrained=False, **kwargs):
    print("[gnconv]")
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(7200, 1000))

@register_model
def hornet_nano_gf_32(pretrained=False, **kwargs):
    raise RuntimeError("a network that does not build")
"""


def job(output: Path, **given: Path) -> Job:
    return Job(
        **{"output": output, "authors": None, "images": None, "small": True, **given}, deadline=time.time() + 600
    )


def test_speed_beside_the_authors_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRODUCT_SIZES, "cpu", (64, 128))  # the large ones, for the machine's best, take longest
    file = tmp_path / "authors.py"
    file.write_text(STAND_IN)
    report = speed.run(job(tmp_path, authors=file))
    assert isinstance(timm.create_model("hornet_pico_32"), HorNet), "the authors' took its place"
    assert "[gnconv]" not in capfd.readouterr().out
    assert sorted(note.split(" failed")[0] for note in report.notes) == sorted(
        f"{side} GF ({step}, {precision}, eager)"
        for step in ("train", "infer")
        for side, precision in ((speed.PUBLISHED, "32"), (speed.TODAY, "bf16-mixed"))
    ), report.notes
    trained, inferred = report.tables.values()
    assert [len(trained), len(inferred)] == [8, 12]
    assert sum(row[""] == "best of ours" for row in trained + inferred) == 4
    measured = {bar.name for bar in speed.bars()} & set(report.found)
    assert measured == {bar.name for bar in speed.bars() if bar.name.startswith("7×7") or "convnext" in bar.name}
    assert all(value > 0 for value in report.found.values())
    saved = json.loads((tmp_path / "speed.json").read_text())
    assert saved["found"] == report.found and "threads" in saved["machine"]


def test_kernels(tmp_path: Path) -> None:
    report = kernels.run(job(tmp_path))
    assert [len(rows) for rows in report.tables.values()] == [10, 4, 8, 12]
    errors = {row["form"]: row["relative error"] for row in report.tables[kernels.GLOBAL_TABLE]}
    for form in ("dense", "separable"):
        assert errors[f"{form} fp32"] < 1e-5 and errors[f"{form} bf16"] < 2e-2, "not the same filter"
    assert set(report.found) == {bar.name for bar in kernels.bars()}


def test_kernels_are_taken_where_they_were_faster_and_right(tmp_path: Path) -> None:
    def found(
        *, forward: float = 1.5, error: float = 1e-3, dft: float = 3.0, dft_error: float = 1e-3
    ) -> frozenset[str]:
        row = {"blocks": 2, "relative error": 1e-3, "forward, Triton ms": forward, "forward, library ms": 2.0}
        row |= {"weight_grad, Triton ms": 1.0, "weight_grad, library ms": 2.0}
        products = [
            {"form": form, "blocks": 1, "forward ms": ms, "gradients ms": ms, "relative error": wrong}
            for form, ms, wrong in (("FFT", 2.0, 0.0), ("separable bf16", dft, dft_error), ("dense bf16", 0.1, 0.0))
        ]
        tables = {
            kernels.TRITON_TABLE: [row, row | {"relative error": error}, row, row],
            kernels.GLOBAL_TABLE: products * 2,
        }
        Report(part="kernels", tables=tables).save(tmp_path)
        return kernels.faster_kernels(tmp_path)

    assert kernels.faster_kernels(tmp_path) == frozenset()
    assert found(forward=3.0) == {"weight_grad"}
    assert found(dft=1.0) == {"forward", "weight_grad", "dft"}
    assert found(error=1.0, dft=1.0) == found(error=math.nan, dft=1.0) == {"dft"}
    assert found(dft=1.0, dft_error=math.nan) == {"forward", "weight_grad"}


def test_steps_in_both_precisions(tmp_path: Path) -> None:
    report = steps.run(job(tmp_path))
    (rows,) = report.tables.values()
    assert [(row["network"], row["precision"], row["steps"], row["not finite"], row[""]) for row in rows] == [
        (network, precision, 4, 0, "") for network in steps.NETWORKS.values() for precision in steps.PRECISIONS
    ], report.notes
    assert set(report.found) == {bar.name for bar in steps.bars()}
    assert np.asarray(Image.open(tmp_path / "steps.png").convert("L")).std() > 5


def test_images_are_the_same_each_time(tmp_path: Path) -> None:
    first, second = (steps.make_images(tmp_path / name, per_class=1) for name in "ab")
    files = sorted(file.relative_to(first) for file in first.rglob("*.png"))
    assert len(files) == 10 + 20
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)
    assert len({(first / file).read_bytes() for file in files}) == len(files)


def test_the_command_and_a_part_that_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images.tar"
    images.write_text("no tar file")
    assert main(["cifar", "--small", "--images", str(images), "--output", str(tmp_path / "out")]) == 0
    out = capfd.readouterr().out
    assert "cannot read" in out and out.count("not measured") == len(cifar.bars())
    assert read("cifar", tmp_path / "out").notes and (tmp_path / "out" / "summary.md").exists()
    with pytest.raises(SystemExit, match="2"):
        main(["cifra", "--output", str(tmp_path)])
    assert list(PARTS)[-1] == "cifar", "the part that takes all that is left"


def test_bars_are_judged() -> None:
    bars = [
        Bar(name="a", at_least=6.0),
        Bar(name="b", at_most=0.6),
        Bar(name="c", at_least=1.0),
        Bar(name="d", at_most=0),
    ]
    rows = summary(bars, {"a": 6.0, "b": 0.61, "d": math.nan})
    assert [row[""] for row in rows] == ["met", "NOT MET", "not measured", "NOT MET"]
    assert [row["wanted"] for row in rows] == ["≥ 6", "≤ 0.6", "≥ 1", "≤ 0"]
