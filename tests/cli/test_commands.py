"""The command itself: names, lists, start-up time, packaging."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

import hornet_lit
from hornet_lit import recipes

from .conftest import Run

ROOT = Path(__file__).parents[2]


def test_version_is_the_one_of_pyproject(run: Run) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert run("--version").out == f"hornet-lit {project['version']}\n"
    assert hornet_lit.__version__ == project["version"]


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["recipes"], ["recipes", "show", "digits"], ["fitt"]])
def test_cheap_commands_import_neither_torch_nor_lightning(words: list[str]) -> None:
    program = (
        f"import sys; sys.argv = ['hornet-lit', *{words!r}]\n"
        "from hornet_lit.cli import main\n"
        "main()\n"
        "heavy = {'torch', 'timm', 'lightning', 'numpy', 'jsonargparse'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 1.0  # measured 0.12 s on an idle core; the bound allows for a busy one


def test_help(run: Run) -> None:
    for words in ([], ["--help"], ["-h"]):
        result = run(*words)
        assert result.code == 0 and "fit" in result.out and "recipes" in result.out
    result = run("fit", "--help")
    assert result.code == 0 and "--model.lr" in result.out and "--trainer.max_epochs" in result.out
    assert "--prediction.top_k" in run("predict", "--help").out


def test_recipes_list_show_and_copy(run: Run) -> None:
    listed = run("recipes").out
    for recipe in recipes.all_recipes():
        assert recipe.name in listed
    assert "82.8 % top-1" in listed
    assert run("recipes", "show", "hornet_t_in1k").out == (ROOT / "recipes/hornet_t_in1k.yaml").read_text("utf-8")
    assert run("recipes", "copy", "overlays/ddp").out == "ddp.yaml\n"
    assert Path("ddp.yaml").read_bytes() == (ROOT / "recipes/overlays/ddp.yaml").read_bytes()
    assert run("recipes", "copy", "slurm.sbatch").out == "slurm.sbatch\n" and "slurm.sbatch  " in listed
    assert Path("slurm.sbatch").read_bytes() == (ROOT / "recipes/slurm.sbatch").read_bytes()
    again = run("recipes", "copy", "ddp")
    assert again.code == 2 and "ddp.yaml: already exists" in again.error[0]
    assert run("recipes", "copy", "digits", "mine.yaml").code == 0
    assert "no such folder" in run("recipes", "copy", "digits", "nowhere/mine.yaml").error[0]


@pytest.mark.parametrize("name", ["digits", "digits.yaml", "recipes/digits.yaml", "./recipes/digits.yaml"])
def test_bare_names_find_the_packaged_recipe(name: str, run: Run) -> None:
    result = run("fit", "--config", name, "--print_config")
    assert result.code == 0 and "hornet_lit.data.DigitsDataModule" in result.out


def test_an_existing_file_wins_over_a_packaged_recipe(run: Run) -> None:
    Path("digits").write_text("model:\n  lr: 0.125\n")
    words = ["--data", "DigitsDataModule", "--print_config"]  # a class's short name
    assert "lr: 0.125" in run("fit", "--config", "digits", *words).out
    assert "lr: 0.125" in run("fit", "--config=digits", *words).out
    assert "lr: 0.125" in run("fit", "-c", "digits", *words).out


def test_the_wheel_holds_the_recipes_and_the_package(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    for recipe in recipes.all_recipes():
        assert f"hornet_lit/_recipes/{recipe.name}.yaml" in names
    assert "hornet_lit/_recipes/slurm.sbatch" in names
    for file in (ROOT / "hornet_lit").rglob("*"):
        if file.suffix in (".py", ".txt"):
            assert file.relative_to(ROOT).as_posix() in names
    assert not any(name.startswith(("tests/", "recipes/")) for name in names)

    program = "import sys; sys.argv = ['hornet-lit']; from hornet_lit import recipes; print(recipes.folder())"
    found = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "installed"), "PATH": ""},
    )
    assert Path(found.stdout.strip()) == (tmp_path / "installed/hornet_lit/_recipes").resolve()


def test_python_m_answers_before_torch_is_imported() -> None:
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    command = [sys.executable, "-m", "hornet_lit", "--version"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert ended.stdout.startswith("hornet-lit ")
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "hornet_lit.cli" in imported and not imported & {"torch", "timm", "lightning"}


def test_a_reader_that_stops_early_is_no_error() -> None:
    command = [sys.executable, "-m", "hornet_lit", "recipes"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait() == -signal.SIGPIPE and process.stderr.read() == b""
    process.stderr.close()
