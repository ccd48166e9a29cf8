"""Hostile files at every entry point that takes one: nothing runs, nothing is written elsewhere, and it is told."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from hornet_lit import sharded
from hornet_lit.cli import UNSAFE_LOAD

from .command import ask, empty_folder
from .row import Row

SMALL = ["--model.network", "hornet_pico_32", "--model.img_size", "32"]
SMALL += ["--model.network_options", '{"base_dim": 16, "depths": [1, 1, 1, 1]}', "--trainer.accelerator", "cpu"]
SHORT = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"]
SHORT += ["--model.warmup_epochs", "0", "--trainer.enable_progress_bar", "false", "--model.ema_decay", "0.5"]
FIT = ["fit", "--config", "digits", *SMALL, *SHORT]
DIGITS = ["--config", "digits", *SMALL]
ESCAPE = "\x1b]0;owned\x07\x1b[31m"  # a terminal's title, and red


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def rows(*, thorough: bool) -> Iterator[Row]:
    """Pickles, contents of checkpoints, archives, URLs; class names are in naming.py, sizes in sizes.py."""
    for forced in (False, True) if thorough else (True,):
        with empty_folder() as folder:
            proof = folder / "proof"
            checkpoint, whole = train(folder)
            cases = [*pickled(folder, proof, checkpoint, whole), *contents(folder, proof, checkpoint), *urls()]
            for case, words in cases if thorough else cases[::4]:
                yield asked(case, words, proof, forced=forced)
    with empty_folder():
        yield from archives()


def asked(case: str, words: list[str | Path], proof: Path, *, forced: bool) -> Row:
    """What the command does; `forced` sets the variable by which torch unpickles everything."""
    before = {path: path.stat().st_mtime_ns for path in proof.parent.rglob("*") if "runs" not in path.parts}
    if forced:
        os.environ[UNSAFE_LOAD] = "1"
    try:
        answer = ask(words, train=True)
    finally:
        os.environ.pop(UNSAFE_LOAD, None)
    ran = proof.exists()
    proof.unlink(missing_ok=True)
    lost = [path.name for path in before if not path.exists()]
    steered = any(not (c.isprintable() or c in "\n\t") for c in answer.text)
    right = answer.is_told and not ran and not lost and not steered
    flags = " ".join(word for word, said in (("CODE RAN", ran), ("ESCAPES", steered), (f"LOST {lost}", lost)) if said)
    return Row(case=case + (f", {UNSAFE_LOAD}=1" if forced else ""), outcome=f"{flags} {answer}".strip(), right=right)


def train(folder: Path) -> tuple[Path, Path]:
    """(a checkpoint of one file, a sharded one) of two steps each."""
    before = dict(os.environ)
    sharded_options = ["--config", "fsdp", "--trainer.strategy.init_args.save_distributed_checkpoint", "true"]
    paths = []
    for name, more in (("one", []), ("parts", sharded_options)):
        answer = ask([*FIT, *more, "--trainer.logger.version", name], train=True)
        assert answer.code == 0, answer
        paths.append(folder / "runs/digits" / name / "checkpoints/last.ckpt")
    os.environ.clear()  # Lightning tells itself there what torchrun would
    os.environ.update(before)
    return paths[0], paths[1]


# ---- code


def pickled(folder: Path, proof: Path, checkpoint: Path, whole: Path) -> Iterator[tuple[str, list[str | Path]]]:
    payload = Payload(proof)
    good = torch.load(checkpoint, weights_only=True)
    files: dict[str, Callable[[Path], Any]] = {
        "zip": lambda path: torch.save(good | {"x": payload}, path),
        "zip, in the hyper-parameters": lambda path: torch.save(good | {"hyper_parameters": {"lr": payload}}, path),
        "zip, in the state dict": lambda path: torch.save(good | {"state_dict": {"network.x": payload}}, path),
        "zip, in a callback's state": lambda path: torch.save(good | {"callbacks": {"x": payload}}, path),
        "legacy": lambda path: torch.save(good | {"x": payload}, path, _use_new_zipfile_serialization=False),
        "bare pickle": lambda path: path.write_bytes(pickle.dumps(payload)),
        "bare pickle of protocol 0": lambda path: path.write_bytes(pickle.dumps(payload, protocol=0)),
    }
    for name, write in files.items():
        for suffix in (".ckpt", ".pth", ".safetensors"):
            path = folder / f"{name}{suffix}"
            write(path)
            if suffix == ".ckpt":
                for command in ("fit", "validate", "test", "predict"):
                    yield f"{command} --ckpt_path, {name}", [command, *DIGITS, "--ckpt_path", path]
                yield f"convert, {name}", ["convert", path, folder / "out.safetensors"]
            yield f"fit --model.weights *{suffix}, {name}", [*FIT, "--model.weights", path]
    for where in ("metadata", "meta", "entry"):
        path = folder / f"{where}.ckpt"
        damage_parts(whole, path, where, payload)
        for words in (["fit", *DIGITS, "--config", "fsdp", "--ckpt_path", path], ["convert", path, folder / "o.ckpt"]):
            yield f"{words[0]} a sharded folder, {where}", words
    evil = folder / "evil.pth"
    evil.write_bytes(pickle.dumps(payload))
    for option in ("checkpoint_path", "pretrained_cfg"):
        value = str(evil) if option == "checkpoint_path" else {"file": str(evil)}
        given = ["--model.network_options", json.dumps({option: value, "pretrained": True})]
        yield f"network_options.{option}", [*FIT, *given]
        state = copy.deepcopy(good)
        state["hyper_parameters"]["network_options"] = {option: value}
        torch.save(state, folder / f"{option}.ckpt")
        yield f"network_options.{option} in a checkpoint", ["validate", "--ckpt_path", folder / f"{option}.ckpt"]
    batches = folder / "cifar/cifar-10-batches-py"
    batches.mkdir(parents=True)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (batches / name).write_bytes(pickle.dumps(payload))
    yield "torchvision's CIFAR pickles", ["fit", "--config", "cifar10", *SMALL, "--data.root", folder / "cifar"]


def damage_parts(whole: Path, path: Path, where: str, payload: Payload) -> None:
    """A copy of a sharded checkpoint with the payload in its metadata, its meta.pt or in an entry of a part."""
    import shutil

    shutil.copytree(whole, path)
    if where == "metadata":
        (path / ".metadata").write_bytes(pickle.dumps(payload))
    elif where == "meta":
        torch.save({"hyper_parameters": {}, "x": payload}, path / "meta.pt")
    else:
        state = sharded.read_whole(path)["state_dict"]
        dcp.save({"state_dict": state | {"x": payload}}, storage_writer=dcp.FileSystemWriter(path))
    files = {each.name: each.stat().st_size for each in path.iterdir() if each.name != sharded.MARKER}
    (path / sharded.MARKER).write_text(json.dumps({"version": 1, "processes": 1, "files": files}))


# ---- what a checkpoint may say


def contents(folder: Path, proof: Path, checkpoint: Path) -> Iterator[tuple[str, list[str | Path]]]:
    good = torch.load(checkpoint, weights_only=True)
    victim = folder / "victim.txt"
    victim.write_text("to be kept")
    saver = next(key for key in good["callbacks"] if key.startswith("ModelCheckpoint"))
    outside = f"{checkpoint.parent}/../../../../victim.txt"
    laughs: Any = ["ha"]
    for _ in range(40):
        laughs = [laughs] * 10
    deep: Any = {}
    for _ in range(200):
        deep = {"a": deep}

    def changed(name: str, change: Callable[[dict[str, Any]], Any]) -> Path:
        state = copy.deepcopy(good)
        change(state)
        path = folder / f"{name}.ckpt"
        torch.save(state, path)
        return path

    note = "hornet_lit"
    changes: dict[str, Callable[[dict[str, Any]], Any]] = {
        "a path to remove outside": lambda s: s["callbacks"][saver].update(last_model_path=outside),
        "models to remove outside": lambda s: s["callbacks"][saver].update(best_k_models={outside: 0.0}),
        "settings that never end": lambda s: s["hyper_parameters"].update(network_options={"x": laughs}),
        "settings without bottom": lambda s: s["hyper_parameters"].update(network_options=deep),
        "data settings that never end": lambda s: s[note]["data"]["init_args"].update(mean=laughs),
        "data settings that are a list": lambda s: s[note]["data"].update(init_args=[1]),
        "data of a class that is not ours": lambda s: s[note]["data"].update(class_path="evil.Data"),
        "data in a module below ours": lambda s: s[note]["data"].update(class_path="hornet_lit.data.x.y.Evil"),
        "escapes in a class": lambda s: s[note]["data"].update(class_path=ESCAPE),
        "escapes in the network's name": lambda s: s["hyper_parameters"].update(network=ESCAPE),
        "escapes in an option's name": lambda s: s["hyper_parameters"].update(network_options={ESCAPE: 1}),
        "escapes in a class name": lambda s: s["class_names"].__setitem__(0, ESCAPE),
        "escapes in a tensor's name": lambda s: s["state_dict"].update({f"network.{ESCAPE}": torch.ones(1)}),
        "a class list that is a number": lambda s: s.update(class_names=3),
        "callbacks that are a list": lambda s: s.update(callbacks=[1]),
        "no weights": lambda s: s.pop("state_dict"),
        "weights that are a number": lambda s: s.update(state_dict=3),
        "weights of another shape": lambda s: s["state_dict"].update({"network.head.bias": torch.ones(3)}),
    }
    for name, change in changes.items():
        path = changed(name, change)
        for command in (["validate"], FIT):
            if command[0] == "fit" and "data in a module" in name:
                continue  # the recipe's data is taken
            yield f"{command[0]}: {name}", [*command, "--trainer.accelerator", "cpu", "--ckpt_path", path]
    for key in ("loops", "optimizer_states", "lr_schedulers", "DigitsDataModule"):
        path = changed(key, lambda state, key=key: state.update({key: 3}))
        yield f"fit: {key} are a number", [*FIT, "--ckpt_path", path]


def urls() -> Iterator[tuple[str, list[str | Path]]]:
    for url in ("https://a.b/c", "file:///etc/passwd", "s3://a/b", "hf://a/b"):
        yield f"--ckpt_path {url}", ["fit", *DIGITS, "--ckpt_path", f"{url}.ckpt"]
        yield f"--model.weights {url}", [*FIT, "--model.weights", f"{url}.pth"]
        yield f"--config {url}", ["fit", "--config", f"{url}.yaml"]
        yield f"convert {url}", ["convert", f"{url}.ckpt", "out.safetensors"]


# ---- archives


def archives() -> Iterator[Row]:
    """Tar files whose members lead out of the folder: they are read in memory, and nothing is extracted."""
    folder = Path.cwd()
    inside = folder / "inside"
    inside.mkdir()
    secret = folder / "secret.png"
    secret.write_bytes(b"secret")
    for kind in ("parent", "absolute", "symbolic link", "hard link", "device", "fifo"):
        path = inside / "train.tar"
        with tarfile.open(path, "w") as archive:
            for name in ("train/cat/0.png", "train/dog/0.png", "test/cat/0.png"):
                add(archive, name, kind, folder)
        for case, words in (
            ("CIFAR", ["--config", "cifar10", "--data.root", path]),
            ("ImageNet", ["--config", "finetune_folder", "--data.root", inside, "--model.weights", "null"]),
        ):
            before = sorted(folder.rglob("*"))
            answer = ask(["fit", *words, *SMALL], train=True)
            written = [each.name for each in folder.rglob("*") if each not in before and "runs" not in each.parts]
            outcome = f"WRITTEN {written}" if written else str(answer)
            yield Row(case=f"{case} from a tar with a {kind}", outcome=outcome, right=answer.is_told and not written)


def add(archive: tarfile.TarFile, name: str, kind: str, folder: Path) -> None:
    member = tarfile.TarInfo(name)
    data = b"not an image"
    match kind:
        case "parent":
            member.name = f"../{name}"
        case "absolute":
            member.name = str(folder / "out" / name)
        case "symbolic link" | "hard link":
            member.type = tarfile.SYMTYPE if kind == "symbolic link" else tarfile.LNKTYPE
            member.linkname, data = str(folder / "secret.png"), b""
        case "device" | "fifo":
            member.type, data = tarfile.CHRTYPE if kind == "device" else tarfile.FIFOTYPE, b""
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
