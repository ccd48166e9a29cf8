"""The script for a CPU's bars, at small size: every part runs and judges its bars."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hornet_lit.bench import Setting
from tests.device.test_device import STAND_IN
from tests.processor import __main__ as processor
from tests.processor import rest, speed
from tests.processor.turns import Measured, Variant, take_turns


def setting(**given: object) -> Setting:
    plain = {"network": "hornet_femto_32", "step": "infer", "size": 32, "batch": 1, "precision": "32"}
    return Setting(**{**plain, "channels_last": True, "compile": "none"} | given)


def test_networks_take_turns_in_processes_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "authors.py"
    file.write_text(STAND_IN)
    theirs = Variant(side="authors", setting=setting(network="hornet_pico_32"), authors=file, keeps_memory=False)
    found, rates = take_turns([theirs], turns=2)
    assert list(found) == [theirs] and len(rates) == 2 and min(rates) > 0
    assert len(found[theirs].times) == 2 and min(found[theirs].times) > 0 and found[theirs].peak_bytes > 0
    assert theirs.told() == "authors' hornet_pico_32, 32, eager, plain Python"
    with pytest.raises(RuntimeError, match="hornet_nano_gf_32"):
        take_turns([Variant(side="authors", setting=setting(network="hornet_nano_gf_32"), authors=file)], turns=1)


def test_each_bar_compares_what_it_names() -> None:
    def measured(seconds: float) -> Measured:
        return Measured(times=[seconds] * 3, gflops=8.0, peak_bytes=1, saved_bytes=100 * seconds)

    base, compiled = setting(batch=8), setting(batch=8, compile="default")
    low = setting(batch=8, precision="bf16")
    found = {
        Variant(side="ours", setting=base): measured(1.0),
        Variant(side="ours", setting=compiled): measured(0.8),
        Variant(side="ours", setting=low): measured(0.5),
        Variant(side="rival", setting=base): measured(1.6),
        Variant(side="rival", setting=low): measured(1.5),
        Variant(side="authors", setting=base): measured(2.0),
        Variant(side="authors", setting=compiled): measured(1.2),
        Variant(side="authors", setting=base, keeps_memory=False): measured(9.0),
    }
    judged = speed._judged("infer", "GF", found, 100.0)
    assert judged == pytest.approx(
        {
            "GF, inference fp32 eager, times as fast as the authors' eager": 2.0,
            "GF, inference fp32 best mode, times as fast as the authors' eager": 2.5,
            "GF, inference fp32 best mode, times as fast as the authors' compiled": 1.5,
            "GF, inference bf16 best mode, times as fast as the authors' fp32 eager": 4.0,
            "GF, inference fp32 best mode, times as fast as convnext_tiny": 2.0,
            "GF, inference bf16 best mode, times as fast as convnext_tiny": 3.0,
            "GF, inference fp32, share of the best matrix product": 0.8,
        }
    )
    assert judged.keys() | speed._judged("train", "GF", found, 1.0).keys() <= {bar.name for bar in speed.bars()}
    assert speed._judged("train", "GF", found, 1.0)["GF, kept for the backward pass over the authors'"] == 0.5


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "_start", lambda job, report: None)  # whole processes, which other tests start too
    assert processor.main(["rest", "--small", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "rest.json").read_text())["found"]
    assert found.keys() <= {bar.name for bar in rest.bars()} and len(found) == 6
    assert "not measured" in (tmp_path / "summary.md").read_text() and "met" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        processor.main(["speeed", "--output", str(tmp_path)])
