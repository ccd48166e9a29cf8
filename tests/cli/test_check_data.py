"""hornet-lit check-data: what it finds is what was put there, and its exit code is that of the fit that follows."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .conftest import Run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two splits of two classes, three images each, all different."""
    noise = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = noise.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pets" / split / name / f"{i}.png")
    return tmp_path / "pets"


def check(run: Run, path: Path, *words: str | Path) -> tuple[int, str, dict]:
    result = run("check-data", path, *words)
    return result.code, result.out + result.err, json.loads(Path("check-data.json").read_text())


def test_good_data(run: Run, root: Path) -> None:
    code, said, report = check(run, root)
    assert code == 0 and said.strip().endswith(f"a fit can read all of {root}")
    assert not report["fails"] and report["findings"] == []
    assert report["splits"]["val"]["classes"] == {"cat": 3, "dog": 3}
    assert report["splits"]["train"]["width"] == [30, 30] and report["splits"]["train"]["height"] == [20, 22]


def test_everything_bad_or_odd_is_found_once_and_by_name(run: Run, root: Path) -> None:
    train, val = root / "train", root / "val"
    (train / "cat/html.jpg").write_bytes(b"<html>")
    (train / "cat/empty.jpg").write_bytes(b"")
    (val / "dog/cut.png").write_bytes((val / "dog/0.png").read_bytes()[:300])
    (val / "dog/gone.png").symlink_to(val / "nothing.png")
    grey_HW = np.arange(400, dtype=np.uint16).reshape(20, 20)
    Image.fromarray(grey_HW * 100).save(train / "dog/deep.png")
    Image.new("CMYK", (9, 9), 3).save(train / "dog/cmyk.jpg")
    Image.new("P", (9, 9), 3).save(train / "dog/palette.png")
    Image.new("RGBA", (9, 9), 3).save(train / "dog/alpha.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (9, 19), 3).save(train / "dog/turned.jpg", exif=turned)
    shutil.copy(train / "cat/0.png", val / "cat/leak.png")
    shutil.copy(train / "cat/1.png", train / "dog/torn.png")
    shutil.copy(train / "cat/2.png", train / "cat/copy.png")
    hidden = train / ".ipynb_checkpoints"
    hidden.mkdir()
    (hidden / "x.png").write_bytes(b"")
    wanted = {
        ("unreadable", "train", "cat", "cat/html.jpg"),
        ("unreadable", "train", "cat", "cat/empty.jpg"),
        ("unreadable", "val", "dog", "dog/cut.png"),
        ("unreadable", "val", "dog", "dog/gone.png"),
        ("16-bit", "train", "dog", "dog/deep.png"),
        ("CMYK", "train", "dog", "dog/cmyk.jpg"),
        ("palette", "train", "dog", "dog/palette.png"),
        ("alpha", "train", "dog", "dog/alpha.png"),
        ("EXIF-rotated", "train", "dog", "dog/turned.jpg"),
        ("same bytes in two splits", "train", "cat", "cat/0.png"),
        ("same bytes in two splits", "val", "cat", "cat/leak.png"),
        ("same bytes in two classes", "train", "cat", "cat/1.png"),
        ("same bytes in two classes", "train", "dog", "dog/torn.png"),
        ("same bytes", "train", "cat", "cat/2.png"),
        ("same bytes", "train", "cat", "cat/copy.png"),
    }
    code, said, report = check(run, root)
    found = [(row["kind"], row["split"], row["class"], row["file"]) for row in report["findings"]]
    assert set(found) == {(kind, split, name, f"{split}/{file}") for kind, split, name, file in wanted}
    assert max(Counter(found).values()) == 1 and code == 1
    assert f"a fit would fail on {root}" in said and "train/cat/0.png = val/cat/leak.png" in said
    assert all(row["detail"] for row in report["findings"] if row["kind"] == "unreadable")
    result = run("check-data", root, "--output", "rows.csv", "--workers", "0")
    with open("rows.csv", newline="") as file:
        assert [tuple(row.values())[:4] for row in csv.DictReader(file)] == found
    assert result.code == 1


def test_what_keeps_a_fit_from_beginning_is_wrong_here_too(run: Run, root: Path, tmp_path: Path) -> None:
    (root / "val/dog").rename(tmp_path / "dog")
    code, said, report = check(run, root)
    assert code == 1 and "val has no images of 1 of the 2 classes, such as 'dog'" in said
    (tmp_path / "names").write_text("cat\ndog\n")
    code, said, _ = check(run, root, "--class_map", tmp_path / "names")
    assert code == 0 and "to know: " in said and "such as 'dog'" in said
    (root / "train/empty").mkdir()
    code, said, report = check(run, root)
    assert code == 1 and "train/empty holds no images" in said and report["splits"]["val"]["images"] == 3
    shutil.rmtree(root / "train")
    code, said, _ = check(run, root)
    assert code == 1 and f"no train/ in {root}" in said


def test_other_shapes_of_data(run: Run, root: Path, tmp_path: Path) -> None:
    code, said, report = check(run, root / "train")
    assert code == 0 and "predict can read all of" in said and "a fit needs train/ and val/" in said
    assert report["splits"]["all"]["classes"] == {"cat": 3, "dog": 3}
    (root / "list.txt").write_text("train/cat/0.png\nval/dog/1.png\n")
    assert check(run, root / "list.txt")[2]["splits"]["all"]["images"] == 2
    tars, shards = tmp_path / "tars", tmp_path / "shards"
    tars.mkdir()
    shards.mkdir()
    (root / "val/cat/1.png").write_bytes(b"")
    for split in ("train", "val"):
        with tarfile.open(tars / f"{split}.tar", "w") as archive:
            archive.add(root / split, split)
        with tarfile.open(shards / f"x-{split}-0.tar", "w") as archive:
            for label, name in enumerate(("cat", "dog")):
                (tmp_path / "label").write_text(str(label))
                for i in range(3):
                    archive.add(root / split / name / f"{i}.png", f"{name}{i}.png")
                    archive.add(tmp_path / "label", f"{name}{i}.cls")
    for folder, classes in ((tars, {"cat": 3, "dog": 3}), (shards, {"0": 3, "1": 3})):
        code, said, report = check(run, folder)
        assert code == 1 and report["splits"]["train"]["classes"] == classes, said
        bad = [row["file"] for row in report["findings"]]
        assert len(bad) == 1 and "1.png in " in bad[0] and bad[0].endswith(".tar")


def test_usage_mistakes(run: Run, root: Path, tmp_path: Path) -> None:
    for words, said in (
        ([tmp_path / "nowhere"], "nowhere does not exist"),
        ([], "required: PATH"),
        ([root, "--output", "report.txt"], "must end in .json or .csv"),
        ([root, "--output", "no/where.json"], "a folder that exists"),
        ([root, "--workers", "-1"], "--workers -1"),
        ([root, "--class_map", "none"], "--class_map none: no such file"),
        ([root, "--val_fraction", "2"], "--val_fraction 2"),
        ([root, "--sort"], "--sort"),
    ):
        result = run("check-data", *words)
        assert result.code == 2 and said in " ".join(result.error), words
    assert list(Path().iterdir()) == []


def test_names_of_files_do_not_reach_the_terminal_raw(run: Run, root: Path) -> None:
    (root / "train/cat" / "\x1b[31m\n\udcff.png").write_bytes(b"")
    code, said, _ = check(run, root)
    assert code == 1 and "\x1b" not in said and "\N{REPLACEMENT CHARACTER}[31m" in said


def test_a_mistake_is_told_without_importing_torch() -> None:
    source = (
        "import sys; sys.argv = ['hornet-lit']  # what the package's own __init__ goes by\n"
        "from hornet_lit.cli import main\n"
        "assert main(['check-data', 'nowhere']) == 2 and main(['check-data', '--help']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", source], check=True, timeout=60)
