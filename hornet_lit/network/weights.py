"""Weight files: the authors' .pth, mmpretrain's .pth, our .ckpt and safetensors, loaded strictly and as data only.

Formats: `{"model" | "model_ema": …, "args": Namespace}` (authors), `{"state_dict": {"backbone.…"}}` (mmpretrain),
Lightning checkpoints of `hornet_lit.module`, flat state dicts. Names on our side are the authors'.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import nn

from hornet_lit.network.files import check_digest, check_file, check_tensors
from hornet_lit.network.spectrum import resize_spectrum

StateDict = dict[str, torch.Tensor]
IN22K_CLASSES = 10_459
IN1K_CLASSES = 1_000
MMPRETRAIN_NAMES = (
    (r"^backbone\.", ""),
    (r"\.gnconv\.projs\.", ".gnconv.pws."),
    (r"\.(gamma[12])\.weight$", r".\1"),
    (r"^norm3\.", "norm."),
    (r"^head\.fc\.", "head."),
)


@dataclass
class WeightsReport:
    """What `load_weights` did: the file's format, the set of weights, the keys that did not come over as stored."""

    path: str
    format: str
    weights: str
    class_names: list[str] | None = None  # that the file's classifier was trained on, where it says so
    loaded: int = 0
    renamed: int = 0
    resized: list[str] = field(default_factory=list)
    reheaded: list[str] = field(default_factory=list)
    matched: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.format}, {self.weights} weights, {self.loaded} tensors loaded"]
        if self.renamed:
            lines.append(f"  {self.renamed} renamed to the authors' names")
        for what, keys in (
            ("resized to this network", self.resized),
            ("IN-22k rows taken for the IN-1k classes", self.reheaded),
            ("rows taken by the names of the classes", self.matched),
            ("NOT in the file, or of other classes: newly initialised", self.initialised),
        ):
            if keys:
                lines.append(f"  {what}: {_some(keys)}")
        return "\n".join(lines)


def load_weights(
    network: nn.Module,
    path: str | Path,
    *,
    ema: bool | None = None,
    class_names: Sequence[str] | None = None,
    verbose: bool = True,
) -> WeightsReport:
    """Load a weight file into ``network``, strictly, and say what was done.

    Global filters of another resolution are resized bilinearly (align_corners); a stem for another number of input
    channels is adapted as timm does; a 10 459-class IN-22k head gives its IN-1k rows to a 1000-class network; a head of
    any other number of classes is left newly initialised, and reported. Anything else that does not fit is an error.

    Args:
        network: `HorNet` or any module whose names the file has.
        path: a local file; see the module's docstring for formats, and `check_digest` for a digest beside it.
        ema: take the averaged weights (True: they must be there; None: if they are there) or the raw ones (False).
        class_names: of the network's classes. Where the file names its own (hornet-lit's do), the classifier's rows are
            taken by name; if it lacks one of them, the head is left newly initialised.
        verbose: print the report.

    Returns:
        The report; its text names every key that was not simply copied.

    Raises:
        ValueError: if the file is missing, not a weight file, holds pickled code, or does not fit; names the keys.
    """
    source, report = read_weights(path, ema=ema)
    target = network.state_dict()
    state = _fit(_match_classes(source, class_names, report), target, report)
    missing = [k for k in target if k not in state and k not in report.initialised]
    unexpected = [k for k in state if k not in target]
    wrong = [
        f"{k} {tuple(v.shape)} in the file, {tuple(target[k].shape)} in the network"
        for k, v in state.items()
        if k in target and v.shape != target[k].shape
    ]
    problems = [
        f"{what}: {_some(keys)}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if keys
    ]
    if problems:
        raise ValueError(
            f"{path} does not fit this network: name the one that it was trained with (--model.network)\n"
            + "\n".join(problems)
        )
    network.load_state_dict(state, strict=False)
    report.loaded = len(state)
    if verbose:
        print(report)
    return report


def read_weights(path: str | Path, *, ema: bool | None = None) -> tuple[StateDict, WeightsReport]:
    """Read a weight file into a state dict with the authors' names (see `load_weights` for arguments and errors)."""
    contents = _read(path)
    kind, name, state = select(contents, ema, path)
    names = contents.get("class_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) != len(set(names)):
        names = None
    prefix = re.compile(r"^(?:module\.|_orig_mod\.)+")
    state = {prefix.sub("", k): v for k, v in state.items()}
    report = WeightsReport(path=str(path), format=kind, weights=name, class_names=names)
    if kind == "mmpretrain":
        renamed = {k: _rename(k) for k in state}
        report.renamed = sum(k != new for k, new in renamed.items())
        state = {renamed[k]: v for k, v in state.items()}
    return state, report


def _read(path: str | Path) -> dict[str, Any]:
    if "://" in str(path):
        raise ValueError(f"{path} is a URL: download the file, check its sha256, and give its local path")
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: `hornet-lit convert` makes one file of a sharded checkpoint")
    if not Path(path).is_file():
        raise ValueError(f"no weight file at {path}: give yours as --model.weights FILE")
    check_digest(Path(path))
    try:
        if Path(path).suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                names = (file.metadata() or {}).get("class_names", "null")
            return {"state_dict": load_file(path), "class_names": json.loads(names)}
        check_file(Path(path))
        # The authors' files keep their training options in a Namespace; nothing else but tensors and primitives.
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can raise anything
        code = re.search(r"(?:Unsupported global: GLOBAL|Unsupported class|call reduce for) (\S+)", str(error))
        if code:
            raise ValueError(
                f"{path} holds objects other than weights ({code.group(1)}) and was not loaded, since they could run "
                "code: save its state dict alone, best as safetensors"
            ) from error
        # torch's own words for an unpickling error advise to switch the protection off.
        unpickling = isinstance(error, pickle.UnpicklingError)
        reason = "not tensors alone" if unpickling else (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged or no weight file: {reason[:200]}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds a {type(contents).__name__}, not a dictionary of weights")
    return contents


def select(contents: dict[str, Any], ema: bool | None, path: str | Path) -> tuple[str, str, StateDict]:
    """Find (format, "EMA" or "raw", state dict) in what the file at ``path`` holds; ``ema`` as in `load_weights`.

    Raises:
        ValueError: it has not these weights, or something else in their place, or larger ones than the file has bytes.
    """
    try:
        kind, name, state = _select(contents, ema, path)
        known = bool(state) and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items())
    except (AttributeError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(f"{path} holds no weights that hornet-lit knows: keys {_some(list(contents))}")
    check_tensors(state, Path(path))
    return kind, name, state


def _select(contents: dict[str, Any], ema: bool | None, path: str | Path) -> tuple[str, str, StateDict]:
    if "pytorch-lightning_version" in contents:
        kind, averaged = "hornet-lit checkpoint", (contents.get("ema") or {}).get("state_dict")
        raw = {k.removeprefix("network."): v for k, v in contents["state_dict"].items() if k.startswith("network.")}
    elif "model" in contents or "model_ema" in contents:
        kind, raw, averaged = "authors' checkpoint", contents.get("model"), contents.get("model_ema")
    elif isinstance(contents.get("state_dict"), dict):
        raw, averaged = contents["state_dict"], None
        kind = "mmpretrain" if any(k.startswith("backbone.") for k in raw) else "state dict"
    else:
        kind, raw, averaged = "state dict", contents, None
    use_ema = averaged is not None if ema is None else ema
    if (averaged if use_ema else raw) is None:
        have, lack = ("raw", "EMA") if use_ema else ("EMA", "raw")
        raise ValueError(f"{path} has no {lack} weights: load its {have} weights with ema={not use_ema}")
    return kind, "EMA" if use_ema else "raw", averaged if use_ema else raw


def _fit(source: StateDict, target: StateDict, report: WeightsReport) -> StateDict:
    """Make the tensors fit that may differ by design: global filters, stem, head."""
    state = {}
    for key, value in source.items():
        like = target.get(key)
        if like is None or like.shape == value.shape:
            state[key] = value
        elif key.endswith("complex_weight") and value.shape[0] == like.shape[0]:
            state[key] = resize_spectrum(value, (like.shape[1], like.shape[2])).to(value.dtype)
            report.resized.append(key)
        elif value.ndim == 4 and key == next(iter(target)) and value.shape[2:] == like.shape[2:]:
            state[key] = adapt_input_conv(like.shape[1], value)
            report.resized.append(key)
        elif key.startswith("head.") and value.shape[0] == IN22K_CLASSES and like.shape[0] == IN1K_CLASSES:
            state[key] = value[in1k_rows()]
            report.reheaded.append(key)
        elif key.startswith("head.") and value.shape[1:] == like.shape[1:]:
            report.initialised.append(key)
        else:
            state[key] = value
    return state


def _match_classes(source: StateDict, class_names: Sequence[str] | None, report: WeightsReport) -> StateDict:
    """The classifier's rows in the order of ``class_names``; without the classifier if the file lacks one of them.

    A head of as many but other classes would load without a word, and start a fine-tuning below chance (measured).
    """
    trained = report.class_names
    if trained is None or class_names is None or trained == list(class_names):
        return source
    head = [k for k in source if k.startswith("head.") and source[k].shape[0] == len(trained)]
    place = {name: i for i, name in enumerate(trained)}
    if all(name in place for name in class_names):
        report.matched = head
        return source | {k: source[k][[place[name] for name in class_names]] for k in head}
    if len(trained) == IN22K_CLASSES and len(class_names) == IN1K_CLASSES:
        return source  # whose rows are known by their numbers
    report.initialised += head
    return {k: v for k, v in source.items() if k not in head}


def in1k_rows() -> torch.Tensor:
    """Row of the 10 459-class IN-22k head for each of the 1000 ImageNet-1k classes (1000,) int64."""
    text = (Path(__file__).parent / "in1k_to_in22k.txt").read_text()
    return torch.tensor([int(line) for line in text.split()])


def _rename(key: str) -> str:
    for pattern, name in MMPRETRAIN_NAMES:
        key = re.sub(pattern, name, key)
    return key


def _some(keys: list[str], most: int = 6) -> str:
    rest = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(str(key)[:80].encode("unicode_escape").decode() for key in keys[:most]) + rest
