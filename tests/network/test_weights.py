"""Weight files in the formats met in the wild, and those that must be refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from hornet_lit import load_weights
from hornet_lit.network.build import build_network
from hornet_lit.network.weights import IN22K_CLASSES, in1k_rows
from tests.conftest import filled_by_rule, images

SEVEN, GF = "hornet_pico_32", "hornet_nano_gf_32"


def logits(network: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return network.eval()(images(0, 2, 3, 32, 32))


def reference(name: str, **kwargs) -> torch.nn.Module:
    network = timm.create_model(name, **kwargs)
    network.load_state_dict(filled_by_rule(network))
    return network


@pytest.mark.parametrize("name", [SEVEN, GF])
def test_authors_file(name: str, official_file, capsys) -> None:
    network = timm.create_model(name)
    report = load_weights(network, official_file(network))
    torch.testing.assert_close(logits(network), logits(reference(name)), rtol=0, atol=0)
    assert report.loaded == len(network.state_dict()) and not report.initialised
    assert "authors' checkpoint, raw weights" in capsys.readouterr().out


def test_authors_averages_are_taken_unless_refused(official_file) -> None:
    network = timm.create_model(SEVEN)
    raw = {k: v.clone() for k, v in network.state_dict().items()}
    path = official_file(network, key="model_ema", model=raw)
    assert load_weights(network, path).weights == "EMA"
    torch.testing.assert_close(logits(network), logits(reference(SEVEN)), rtol=0, atol=0)
    assert load_weights(network, path, ema=False).weights == "raw"
    torch.testing.assert_close(network.head.weight, raw["head.weight"], rtol=0, atol=0)


@pytest.mark.parametrize("name", [SEVEN, GF])
def test_mmpretrain_file(name: str, tmp_path: Path) -> None:
    names = [
        (r"\.pws\.", ".projs."),
        (r"(gamma[12])$", r"\1.weight"),
        (r"^norm\.", "norm3."),
        (r"^head\.", "head.fc."),
    ]
    state = {}
    for key, value in filled_by_rule(timm.create_model(name)).items():
        for ours, theirs in names:
            key = re.sub(ours, theirs, key)
        state[key if key.startswith("head") else f"backbone.{key}"] = value
    torch.save({"meta": {"epoch": 300}, "state_dict": state}, tmp_path / "mm.pth")
    network = timm.create_model(name)
    assert load_weights(network, tmp_path / "mm.pth").renamed == len(state)
    torch.testing.assert_close(logits(network), logits(reference(name)), rtol=0, atol=0)


def test_safetensors_and_prefixes(tmp_path: Path) -> None:
    state = {f"module.{k}": v for k, v in filled_by_rule(timm.create_model(SEVEN)).items()}
    save_file(state, tmp_path / "w.safetensors")
    network = timm.create_model(SEVEN)
    load_weights(network, tmp_path / "w.safetensors")
    torch.testing.assert_close(logits(network), logits(reference(SEVEN)), rtol=0, atol=0)


def test_global_filters_are_resized_bilinearly(official_file) -> None:
    path = official_file(timm.create_model(GF))
    network = timm.create_model(GF, img_size=48)
    report = load_weights(network, path)
    assert len(report.resized) == sum(k.endswith("complex_weight") for k in network.state_dict())
    # Resized at load or at run time, the network computes the same.
    x_BCHW = images(0, 1, 3, 48, 48)
    torch.testing.assert_close(network.eval()(x_BCHW), reference(GF).eval()(x_BCHW), rtol=1e-4, atol=1e-5)


def test_in22k_head_gives_its_rows(official_file) -> None:
    network = timm.create_model(SEVEN, num_classes=IN22K_CLASSES)
    path = official_file(network)
    target = timm.create_model(SEVEN, num_classes=1000)
    assert load_weights(target, path).reheaded == ["head.weight", "head.bias"]
    rows = in1k_rows()
    assert len(rows) == len(set(rows.tolist())) == 1000 and rows.max() < IN22K_CLASSES
    torch.testing.assert_close(logits(target), logits(reference(SEVEN, num_classes=IN22K_CLASSES))[:, rows])


def test_another_head_is_left_and_said(official_file) -> None:
    network = timm.create_model(SEVEN, num_classes=3)
    before = network.head.weight.clone()
    report = load_weights(network, official_file(timm.create_model(SEVEN)))
    assert report.initialised == ["head.weight", "head.bias"] and "newly initialised: head.weight" in str(report)
    torch.testing.assert_close(network.head.weight, before, rtol=0, atol=0)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_the_head_goes_by_the_names_of_the_classes(suffix: str, tmp_path: Path) -> None:
    """A head of as many but other classes would fit, and be wrong."""
    state, path = filled_by_rule(timm.create_model(SEVEN, num_classes=3)), tmp_path / f"three{suffix}"
    names = ["cat", "dog", "ant"]
    if suffix == ".ckpt":
        torch.save({"state_dict": state, "class_names": names}, path)
    else:
        save_file(state, path, metadata={"class_names": json.dumps(names)})

    network = timm.create_model(SEVEN, num_classes=3)
    assert load_weights(network, path).class_names == names
    torch.testing.assert_close(network.head.weight, state["head.weight"], rtol=0, atol=0)
    report = load_weights(network, path, class_names=["ant", "cat", "dog"])
    assert sorted(report.matched) == ["head.bias", "head.weight"] and not report.initialised
    torch.testing.assert_close(network.head.weight, state["head.weight"][[2, 0, 1]], rtol=0, atol=0)
    two = timm.create_model(SEVEN, num_classes=2)
    load_weights(two, path, class_names=["dog", "ant"])
    torch.testing.assert_close(two.head.bias, state["head.bias"][[1, 2]], rtol=0, atol=0)

    network = timm.create_model(SEVEN, num_classes=3)
    before = network.head.weight.clone()
    report = load_weights(network, path, class_names=["cat", "dog", "bee"])
    assert sorted(report.initialised) == ["head.bias", "head.weight"] and "newly initialised: head." in str(report)
    torch.testing.assert_close(network.head.weight, before, rtol=0, atol=0)


def test_stem_is_adapted_to_grey_images(official_file) -> None:
    network = timm.create_model(SEVEN, in_chans=1)
    assert load_weights(network, official_file(timm.create_model(SEVEN))).resized == ["downsample_layers.0.0.weight"]


def test_what_does_not_fit_is_named(official_file) -> None:
    path = official_file(timm.create_model(SEVEN))
    with pytest.raises(ValueError, match=r"of another shape: .*dwconv\.weight \(48, 1, 7, 7\)"):
        load_weights(timm.create_model(SEVEN, kernel_size=5), path)
    with pytest.raises(ValueError, match=r"missing: stages\.2\.3"):
        load_weights(timm.create_model(SEVEN, depths=(1, 1, 5, 1)), path)
    with pytest.raises(ValueError, match=r"unexpected: stages\.2\.2"):
        load_weights(timm.create_model(SEVEN, depths=(1, 1, 2, 1)), path)


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_files_with_code_are_refused_and_not_run(tmp_path: Path, official_file) -> None:
    marker = tmp_path / "ran"
    path = official_file(timm.create_model(SEVEN), payload=Payload(marker))
    with pytest.raises(ValueError, match="could run code"):
        load_weights(timm.create_model(SEVEN), path)
    plain = tmp_path / "plain.pth"
    plain.write_bytes(pickle.dumps({"model": Payload(marker)}))
    with pytest.raises(ValueError, match="not tensors alone"):
        load_weights(timm.create_model(SEVEN), plain)
    assert not marker.exists()


def test_other_files_are_refused_with_their_path(tmp_path: Path, official_file) -> None:
    network = timm.create_model(SEVEN)
    with pytest.raises(ValueError, match=r"no weight file at .*nowhere"):
        load_weights(network, tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="is a URL"):
        load_weights(network, "https://example.org/w.pth")
    whole = official_file(network).read_bytes()
    damaged = {
        "cut.pth": whole[: len(whole) // 2],
        "empty.pth": b"",
        "text.safetensors": b"hello",
        "text.pth": b"hello",
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{re.escape(name)} is damaged or no weight file: \w"):
            load_weights(network, tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        load_weights(network, tmp_path / "none.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        load_weights(network, tmp_path / "list.pth")
    with pytest.raises(ValueError, match="has no EMA weights"):
        load_weights(network, official_file(network), ema=True)


def test_the_published_digest_is_checked(tmp_path: Path, official_file) -> None:
    """Beside the file as sha256sum writes it, or begun in its name as torch.hub has it."""
    network = timm.create_model(SEVEN)
    path = tmp_path / "weights.pth"
    path.write_bytes(official_file(network).read_bytes())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    beside = tmp_path / "weights.pth.sha256"
    beside.write_text(f"{digest}  weights.pth\n")
    load_weights(network, path)
    named = path.rename(tmp_path / f"weights-{digest[:8]}.pth")
    load_weights(network, named)
    dated = tmp_path / "weights-20260101.pth"  # no digest
    dated.write_bytes(named.read_bytes())
    load_weights(network, dated)

    wrong = "0123abcd" * 8
    beside.with_name(f"{dated.name}.sha256").write_text(f"{wrong} *{dated.name}\n")
    with pytest.raises(ValueError, match=rf"its sha256 is {digest}.*says {wrong}\nfetch it again"):
        load_weights(network, dated)
    other = named.rename(tmp_path / "weights-0123abcd.pth")
    with pytest.raises(ValueError, match=rf"its sha256 is {digest[:16]}…, and its name says 0123abcd"):
        load_weights(network, other)
    other.with_name(f"{other.name}.sha256").write_text("nothing")
    with pytest.raises(ValueError, match="holds no sha256 digest"):
        load_weights(network, other)


def test_tensors_larger_than_the_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"model": {"head.bias": torch.zeros(1).expand(10**12)}}, path)
    with pytest.raises(ValueError, match=r"'head.bias' \(1000000000000,\) claims more values than the file holds"):
        load_weights(timm.create_model(SEVEN), path)


@pytest.mark.parametrize("option", ["checkpoint_path", "pretrained", "pretrained_cfg"])
def test_timms_own_ways_to_load_files_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=rf"network_options.{option} is refused: weights are given as model.weights"):
        build_network(SEVEN, num_classes=10, options={option: "evil.pth"})
