"""PredictionWriter: the table's content, every image once for any number of processes, and what it says when not."""

import csv
import os
from pathlib import Path

import pytest
import torch
from writer_doubles import NAMES, Images, TinyData, TinyModule, quiet_trainer

from hornet_lit.writers import PredictionWriter
from hornet_lit.writers.predictions import merge_parts, top_classes
from tests.distributed.processes import run_processes

COUNTS = (1, 7, 37)


def run_predict(data: TinyData, module: TinyModule | None = None, *, output: Path, top_k: int = 5, **settings: object):
    trainer = quiet_trainer(callbacks=[PredictionWriter(output=str(output), top_k=top_k)], **settings)
    return trainer.predict(module or TinyModule(), datamodule=data)


def read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def start(folder: Path, *, world: int) -> str:
    """Predict sets of COUNTS images, then fit, in `world` processes; return what they printed."""
    folder.mkdir(exist_ok=True)
    words = [str(folder), "--world", str(world), "--counts", *map(str, COUNTS)]
    out = run_processes("writer_doubles", words, world)
    for count in COUNTS:
        said = f"predictions: {count} rows in {(folder / f'{count}.csv').resolve()}"
        assert out.count(said) == 1, out
    return out


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    for count in COUNTS:
        run_predict(TinyData(count=count), output=folder / f"{count}.csv", top_k=3)
    return folder


def test_table_holds_the_networks_own_probabilities(tmp_path: Path) -> None:
    output = tmp_path / "new" / "folder" / "predictions.csv"
    data, module = TinyData(count=6), TinyModule()
    assert run_predict(data, module, output=output, top_k=3) is None  # nothing is kept in memory
    rows = read(output)
    logits_BK = module.logits(Images(count=6, labelled=False).x_NCHW).detach()
    expected_BK = logits_BK.softmax(dim=1).sort(dim=1, descending=True)
    assert [row["file"] for row in rows] == data.predict_files
    assert list(rows[0]) == ["file"] + [f"{part}_{i}" for i in (1, 2, 3) for part in ("class", "name", "probability")]
    for b, row in enumerate(rows):
        for i in range(3):
            number = int(expected_BK.indices[b, i])
            assert int(row[f"class_{i + 1}"]) == number
            assert row[f"name_{i + 1}"] == NAMES[number]  # commas, quotes and line breaks come back whole
            assert float(row[f"probability_{i + 1}"]) == pytest.approx(expected_BK.values[b, i].item(), rel=1e-6)
    assert os.listdir(output.parent) == ["predictions.csv"]


def test_fewer_classes_than_top_k_and_names_from_the_checkpoint(tmp_path: Path) -> None:
    data, module = TinyData(count=2), TinyModule(classes=2)
    module.class_names = ["cat", "dog"]  # as restored from a checkpoint; the datamodule says something else
    run_predict(data, module, output=tmp_path / "p.csv")
    rows = read(tmp_path / "p.csv")
    assert list(rows[0])[-1] == "probability_2"
    assert {row["name_1"] for row in rows} <= {"cat", "dog"}


def test_names_that_the_module_settles_as_prediction_starts(tmp_path: Path) -> None:
    """Lightning calls the callbacks' on_predict_start first."""

    class Late(TinyModule):
        def on_predict_start(self) -> None:
            self.class_names = ["late " + name for name in "abcdefg"]

    run_predict(TinyData(count=3), Late(), output=tmp_path / "p.csv")
    assert all(row["name_1"].startswith("late ") for row in read(tmp_path / "p.csv"))


def test_equal_probabilities_come_in_class_order() -> None:
    probability_BK = torch.full((2, 1000), 1e-3)
    probability_BK[1, [700, 300]] = 2e-3
    class_Bk, _ = top_classes(probability_BK=probability_BK, k=4)
    assert class_Bk.tolist() == [[0, 1, 2, 3], [300, 700, 0, 1]]


def test_files_of_two_processes_are_those_of_one(tmp_path: Path, single: Path) -> None:
    """More processes and other sizes: tests/distributed/test_exactness.py."""
    # a crashed run of more processes, and one whose rows look right, left these behind
    (tmp_path / "7.csv.rank0.part").write_text("0,1,1\n1,1,1\n")
    (tmp_path / "7.csv.rank5.part").write_text("3,1,1\n")
    out = start(tmp_path, world=2)
    for count in COUNTS:
        assert (tmp_path / f"{count}.csv").read_bytes() == (single / f"{count}.csv").read_bytes()
        assert len(read(tmp_path / f"{count}.csv")) == count
    # every rank raises what rank 0 found, none waits for ever, and no table appears
    for rank in range(2):
        said = (tmp_path / f"broken.{rank}.txt").read_text()
        assert "1 of 7 images missing: index 2;" in said and "predicted twice: index 5." in said
    assert not (tmp_path / "broken.csv").exists()
    left = sorted(path.name for path in tmp_path.glob("*.part"))
    assert left == [f"broken.csv.rank{rank}.part" for rank in range(2)]
    assert not list(tmp_path.glob("*.tmp"))
    # and a fit on as many processes drew its pictures, once
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"metrics.csv", "curves.png", "predictions.png"}
    for picture in ("learning curves", "prediction sheet"):
        assert out.count(f"{picture}: {(tmp_path / 'run').resolve()}") == 1, out


def test_an_earlier_table_survives_until_the_new_one_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "p.csv"
    output.write_text("earlier")
    with pytest.raises(ValueError, match="2 of 4 images missing: index 1, 2"):
        run_predict(TinyData(count=4, order=[0, 3]), output=output)
    assert output.read_text() == "earlier"
    run_predict(TinyData(count=4), output=output)
    assert len(read(output)) == 4 and os.listdir(tmp_path) == ["p.csv"]


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ([0, 2, 1, 3], "must not shuffle"),
        ([0, 1, 2, 3, 9], "do not exist: index 9"),
        ([0, 1, 1, 2, 3], "twice: index 1"),
    ],
)
def test_an_order_that_breaks_the_table(tmp_path: Path, order: list[int], said: str) -> None:
    data = TinyData(count=10, order=order)
    data.predict_files = data.predict_files[:4]
    with pytest.raises(ValueError, match=said):
        run_predict(data, output=tmp_path / "p.csv")


def test_a_limited_run_says_that_it_is_partial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_predict(TinyData(count=10), output=tmp_path / "p.csv", limit_predict_batches=1)
    assert len(read(tmp_path / "p.csv")) == 4
    assert "predictions: 4 rows of 10 (limit_predict_batches=1) in " in capsys.readouterr().out


def test_parts_of_another_run_or_out_of_sight_are_refused(tmp_path: Path) -> None:
    parts = [tmp_path / "p.csv.rank0.part", tmp_path / "p.csv.rank1.part"]
    parts[0].write_text("ours\n0,1,0.5\n")
    settings = {"token": "ours", "files": ["a", "b"], "names": None, "output": tmp_path / "p.csv", "whole": True}
    with pytest.raises(ValueError, match=r"does not see p\.csv\.rank1\.part .* storage that all nodes share"):
        merge_parts(parts=parts, **settings)
    parts[1].write_text("theirs\n1,1,0.5\n")
    with pytest.raises(ValueError, match="not written by this run"):
        merge_parts(parts=parts, **settings)
    parts[1].write_text("ours\n1,0,0.25\n")
    assert merge_parts(parts=parts, **settings) == 2
    assert (tmp_path / "p.csv").read_text() == "file,class_1,name_1,probability_1\na,1,1,0.5\nb,0,0,0.25\n"


@pytest.mark.parametrize("output", ["", "sub/", "."])
def test_an_output_that_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = quiet_trainer(callbacks=[PredictionWriter(output=output)])
    with pytest.raises(ValueError, match=r"is a folder: name a file in it, such as .*predictions\.csv"):
        trainer.predict(TinyModule(), datamodule=TinyData(count=2))


def test_bad_input_names_the_mend(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1 class"):
        PredictionWriter(top_k=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, not a folder"):
        run_predict(TinyData(count=2), output=tmp_path / "file" / "p.csv")
    data = TinyData(count=2)
    data.class_names = ["one", "two"]
    with pytest.raises(ValueError, match="7 classes but there are 2 class names"):
        run_predict(data, output=tmp_path / "p.csv")
    broken = TinyModule()
    torch.nn.init.constant_(broken.head.bias, float("nan"))
    with pytest.raises(ValueError, match=r"folder/image 0, \.png: the network's output is not a number"):
        run_predict(TinyData(count=2), broken, output=tmp_path / "p.csv")
