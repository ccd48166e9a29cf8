"""hornet-lit bench: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from hornet_lit import bench
from hornet_lit.bench import PRODUCT_SIZES, BestProduct, Setting, measure
from hornet_lit.cli_errors import MAX_LINES

from .conftest import Run


@pytest.fixture
def blank_pictures() -> None:
    """In place of the one for all commands: here the picture is drawn."""


def test_a_sweep_of_two_networks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRODUCT_SIZES, "cpu", (64, 128))  # the large ones, for the machine's best, take longest
    words = "bench hornet_pico_32 --against convnext_atto --size 32 64 --batch 2 --repeats 2 --threads 1 --output out"
    result = run(*shlex.split(words))
    assert result.code == 0, result.err[-2000:]
    written = json.loads(Path("out/bench.json").read_text())
    found = {tuple(r["setting"][key] for key in ("network", "step", "size")): r for r in written["results"]}
    assert len(found) == 8 and all(len(r["times"]) == 2 and r["images_per_second"] > 0 for r in found.values())
    for network in ("hornet_pico_32", "convnext_atto"):
        infer, train = found[network, "infer", 64], found[network, "train", 64]
        # A training step is the forward and two products as large, but for the gradient of the images.
        assert 2.8 < train["gflops"] / infer["gflops"] <= 3
        assert 3.5 < infer["gflops"] / found[network, "infer", 32]["gflops"] < 4.5
        assert train["saved_bytes"] > 3.5 * found[network, "train", 32]["saved_bytes"] > 0
        assert train["peak_bytes"] > infer["peak_bytes"] and infer["saved_bytes"] is None
    assert "hornet_pico_32" in result.out and "of product" in result.out and "saved MiB/img" in result.out
    assert "GFLOP/s in fp32" in result.out
    assert Image.open("out/bench.png").width > 500


def test_operations_are_those_of_the_paper() -> None:
    """4.0 and 3.9 · 10⁹ multiplications and additions of HorNet-T (7×7 and GF) at 224² (table 1 of the paper)."""
    import torch

    settings = [
        Setting(network=name, step="infer", size=224, batch=1, precision="32", channels_last=True, compile="none")
        for name in ("hornet_tiny_7x7", "hornet_tiny_gf")
    ]
    plain, gf = measure(settings, device=torch.device("cpu"), repeats=1)
    assert plain.gflops / 2 == pytest.approx(4.0, abs=0.05)
    assert gf.gflops / 2 == pytest.approx(3.9, abs=0.05)


@pytest.mark.parametrize(
    ("faster", "precision", "told"), [(2.0, "bf16", "bf16"), (0.5, "bf16", "fp32"), (2.0, "32", "fp32")]
)
def test_the_product_is_in_the_type_that_the_processor_multiplies(
    faster: float, precision: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def seconds(device: torch.device, product: Callable[[], torch.Tensor]) -> float:
        return 1.0 / (faster if product().dtype == torch.bfloat16 else 1.0)

    monkeypatch.setattr(bench, "timed", seconds)
    monkeypatch.setitem(PRODUCT_SIZES, "cpu", (8, 16))
    product = BestProduct(torch.device("cpu"), precision)
    assert product.type == told
    assert product.rate() == 2 * 16**3 / 1e9 * (faster if told == "bf16" else 1.0)


def test_networks_run_beside_the_product_for_their_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    asked: list[str] = []

    class Product:
        type, rate = "bf16", staticmethod(lambda: 7.0)

        def __init__(self, device: torch.device, precision: str) -> None:
            asked.append(precision)

    monkeypatch.setattr(bench, "BestProduct", Product)
    plain = {"network": "hornet_femto_32", "step": "infer", "size": 32, "batch": 1, "compile": "none"}
    for precision in ("32", "bf16-mixed"):
        setting = Setting(**plain, precision=precision, channels_last=True)
        (result,) = measure([setting], device=torch.device("cpu"), repeats=1)
        assert (result.product_rate, result.product_type) == (7.0, "bf16")
    assert asked == ["32", "bf16-mixed"]


def test_what_the_figures_hold_for() -> None:
    import torch

    about = bench.machine(torch.device("cpu"))
    assert torch.backends.cpu.get_cpu_capability() in about["device"] and about["torch"] == torch.__version__
    assert about["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("words", "first"),
    [
        ("", "the following arguments are required: NETWORK"),
        ("hornet_tny_7x7", "no network named 'hornet_tny_7x7': did you mean hornet_tiny_7x7"),
        ("hornet_pico_32 --size 0", "--size must be positive, got 0"),
        ("hornet_pico_32 --repeats 0", "--repeats must be positive, got 0"),
        ("hornet_pico_32 --precision 8", "argument --precision: invalid choice: '8'"),
        ("hornet_pico_32 --device cuda", "--device cuda: torch sees no CUDA device here"),
    ],
)
def test_wrong_options(words: str, first: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("bench", *shlex.split(words))
    assert result.code == 2 and first in result.error[0] and len(result.error) <= MAX_LINES
    assert not Path("bench").exists()


def test_a_folder_that_cannot_be_written_to(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access  # who runs the tests may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != Path.cwd() and access(path, mode))
    for words in (["bench", "hornet_pico_32", "--output", "a/b"], ["check-data", ".", "--output", "report.csv"]):
        result = run(*words)
        assert result.code == 2 and "cannot be written to" in result.error[0]
    assert list(Path().iterdir()) == []
