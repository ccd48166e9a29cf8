"""The script for a CPU's bars, at small size: what it measures and how it judges."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hornet_lit.bench import PRODUCT_SIZES, Setting
from tests.device.test_device import STAND_IN
from tests.processor import __main__ as processor
from tests.processor import rest, speed, turns
from tests.processor.turns import Measured, Variant, take_turns


def setting(**given: object) -> Setting:
    plain = {"network": "hornet_femto_32", "step": "infer", "size": 32, "batch": 1, "precision": "32"}
    return Setting(**{**plain, "channels_last": True, "compile": "none"} | given)


def test_networks_take_turns_in_processes_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "authors.py"
    file.write_text(STAND_IN)
    theirs = Variant(side="authors", setting=setting(network="hornet_pico_32"), authors=file, keeps_memory=False)
    broken = replace(theirs, setting=setting(network="hornet_nano_gf_32"))
    notes: list[str] = []
    found, rates = take_turns([broken, theirs], turns=2, failed=notes.append)
    assert list(found) == [theirs] and len(rates) == 2 and min(rates) > 0
    assert len(found[theirs].times) == 2 and min(found[theirs].times) > 0 and found[theirs].peak_bytes > 0
    assert theirs.told() == "authors' hornet_pico_32, 32, eager, plain Python"
    assert len(notes) == 1 and "hornet_nano_gf_32" in notes[0] and "a network that does not build" in notes[0]


def test_a_process_that_is_killed_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, killed = Variant(side="ours", setting=setting()), Variant(side="ours", setting=setting(batch=2))
    started = turns._Peer.started

    def one_killed(name: str, variant: Variant | None) -> turns._Peer:
        peer = started(name, variant)
        if variant is None:  # the last to start: the others are ready
            peers[killed].process.kill()
            peers[killed].process.join()
        peers[variant] = peer
        return peer

    peers: dict[Variant | None, turns._Peer] = {}
    monkeypatch.setattr(turns._Peer, "started", one_killed)
    notes: list[str] = []
    found, _ = take_turns([killed, kept], turns=1, failed=notes.append)
    assert list(found) == [kept] and len(found[kept].times) == 1
    assert len(notes) == 1 and "ended with -9" in notes[0]


def measured(*seconds: float) -> Measured:
    return Measured(
        setting=setting(batch=8),
        times=[*seconds],
        gflops=8.0,
        product_rate=100.0,
        product_type="fp32",
        peak_bytes=1,
        resident_bytes=0,
        saved_bytes=100 * seconds[0],
    )


def test_each_bar_compares_what_it_names() -> None:
    base, compiled = setting(batch=8), setting(batch=8, compile="default")
    low, low_compiled = replace(base, precision="bf16"), replace(compiled, precision="bf16")
    found = {
        Variant(side="ours", setting=base): measured(1.0, 1.0, 1.0),
        Variant(side="ours", setting=compiled): measured(0.8, 0.8, 0.8),
        Variant(side="ours", setting=low): measured(0.5, 0.5, 0.5),
        Variant(side="ours", setting=low_compiled): measured(0.4, 0.4, 0.4),
        Variant(side="rival", setting=base): measured(1.6, 1.6, 1.6),
        Variant(side="rival", setting=low): measured(1.5, 1.5, 1.5),
        Variant(side="rival", setting=low_compiled): measured(0.6, 0.6, 0.6),
        Variant(side="authors", setting=base): measured(2.0, 2.0, 2.0),
        Variant(side="authors", setting=compiled): measured(1.2, 1.2, 1.2),
        Variant(side="authors", setting=base, keeps_memory=False): measured(9.0, 9.0, 9.0),
    }
    judged = speed.judged("infer", "GF", found)
    assert judged == pytest.approx(
        {
            "GF, inference fp32 eager, times as fast as the authors' eager": 2.0,
            "GF, inference fp32 best mode, times as fast as the authors' eager": 2.5,
            "GF, inference fp32 best mode, times as fast as the authors' compiled": 1.5,
            "GF, inference bf16 best mode, times as fast as the authors' eager in fp32": 5.0,
            "GF, inference fp32 best mode, times as fast as convnext_tiny's": 2.0,
            "GF, inference bf16 best mode, times as fast as convnext_tiny's": 1.5,
            "GF, inference fp32 best mode, share of the best matrix product": 0.8,
        }
    )
    trained = speed.judged("train", "GF", found)
    assert judged.keys() | trained.keys() <= {bar.name for bar in speed.bars()}
    assert trained["GF, kept for the backward pass over the authors'"] == 0.5
    only_fp32 = {v: m for v, m in found.items() if v.side != "rival" or not v.low}
    name = "GF, inference bf16 best mode, times as fast as convnext_tiny's"
    assert speed.judged("infer", "GF", only_fp32)[name] == 4.0
    assert speed.judged("infer", "GF", {}) == {}


def test_ratios_are_taken_turn_by_turn() -> None:
    assert speed.ratio(measured(1.0, 2.0, 9.0), measured(2.0, 6.0, 9.0)) == 2.0  # of medians it would be 3


def test_all_modes_of_both_sides_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = processor.Job(output=tmp_path, authors=tmp_path, images=None, small=False, deadline=0.0)
    for multiplies, of_rival in ((True, 4), (False, 2)):
        monkeypatch.setattr(speed, "MULTIPLIES_BFLOAT16", multiplies)
        racing = speed.variants("infer", "hornet_tiny_7x7", job)
        assert [sum(v.side == side for v in racing) for side in ("ours", "rival", "authors")] == [4, of_rival, 3]
        assert len(set(racing)) == len(racing)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRODUCT_SIZES, "cpu", (64,))
    monkeypatch.setattr(rest, "_command", lambda: [sys.executable, "-c", ""])  # other tests run them
    monkeypatch.setattr(rest, "IMPORTS", "")
    monkeypatch.setattr(rest, "_growth", lambda *_: 1 / 0)  # and the others go on
    photo = Image.fromarray(np.random.RandomState(0).randint(0, 256, (60, 80, 3), dtype=np.uint8))
    (tmp_path / "images/a").mkdir(parents=True)
    photo.save(tmp_path / "images/a/photo.jpg")
    words = ["--small", "--images", str(tmp_path / "images"), "--output", str(tmp_path / "out")]
    assert processor.main(["rest", *words]) == 0
    saved = json.loads((tmp_path / "out/rest.json").read_text())
    assert saved["found"].keys() == {bar.name for bar in rest.bars() if "per pixel" not in bar.name}
    assert saved["notes"] == ["failed: ZeroDivisionError: division by zero"] * 2
    assert saved["machine"]["commit"] and saved["machine"]["priority"] == "ordinary"
    text = (tmp_path / "out/summary.md").read_text()
    assert text.count("| not measured |") == 8 and "hornet-lit --version, seconds | ≤ 0.3 | " in text
    assert "no figure above means anything" in capsys.readouterr().out
    for wrong in (["speeed"], ["--images", str(tmp_path / "nowhere")]):
        with pytest.raises(SystemExit, match="2"):
            processor.main([*wrong, "--output", str(tmp_path)])


def test_speed_and_growth_at_small_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "authors.py"
    file.write_text(STAND_IN)
    monkeypatch.setattr(speed, "STEPS", ("train",))
    monkeypatch.setattr(speed, "SMALL_RIVAL", "hornet_femto_32")
    job = processor.Job(output=tmp_path, authors=file, images=None, small=True, deadline=0.0)
    report = processor.Report(part="speed")
    for section in speed.sections(job, report):
        section()
    (rows,) = report.tables.values()
    assert {"network and mode", "img/s", "kept MiB/img", "times authors, eager"} <= rows[0].keys()
    assert set(report.found) <= {bar.name for bar in speed.bars()} and len(report.found) >= 4
    assert 0 < report.found["7×7, inference bf16, relative error"] < 2e-2
    rest._growth("7×7", "hornet_femto_32", "infer", job, report)
    assert 0.5 < report.found["7×7, inference, most memory per pixel over 224²"] < 1.5
    assert all(len(times) == speed.SMALL_TURNS for times in report.times.values())
