"""Recipes and options that name what a recipe must not: modules that are not installed, functions, other classes.

`evil.py` lies in the current folder, which is on Python's path; imported, it leaves a file behind.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from hornet_lit import recipes

from .command import ask, empty_folder
from .row import Row

EVIL = """\
from pathlib import Path
import lightning.pytorch as pl
Path({proof!r}).touch()
class Thing(pl.Callback):
    def __init__(self, *args, **kwargs):
        Path({proof!r}).touch()
class Data(pl.LightningDataModule):
    pass
def function(*args):
    Path({proof!r}).touch()
"""
CALLBACKS = "lightning.pytorch.callbacks"
THING: dict[str, Any] = {"class_path": "evil.Thing"}
NAMES = ("evil.Thing", "evil.function", "os.system", "subprocess.Popen", "builtins.eval", "builtins.exec", "evil")
NAMES += ("hornet_lit.__main__.main", "pathlib.Path", "lightning.pytorch.Trainer", "torch.hub.load", "pip.main")
PLACES = ("callbacks", "logger", "strategy", "profiler", "plugins", "accelerator")


def rows(*, thorough: bool) -> Iterator[Row]:
    """In a recipe and as an option; every seventh in the fast subset."""
    with empty_folder():
        yield from _rows(thorough=thorough)


def _rows(*, thorough: bool) -> Iterator[Row]:
    folder, proof = Path.cwd(), Path.cwd() / "proof"
    (folder / "evil.py").write_text(EVIL.format(proof=str(proof)))
    (folder / "runs_code").mkdir()
    (folder / "runs_code" / "__init__.py").write_text(EVIL.format(proof=str(proof)))
    sys.path.insert(0, str(folder))
    try:
        for where, cases in (("recipe", list(in_recipes())), ("option", list(as_options()))):
            right = []
            for case, words in cases if thorough else cases[::7]:
                answer = ask(["fit", "--config", "digits", "--trainer.accelerator", "cpu", *words])
                ran = proof.exists() or "evil" in sys.modules or "runs_code" in sys.modules
                right.append(answer.is_told and not ran)
                if not right[-1]:
                    yield Row(case=f"{where}: {case}", outcome=f"{'CODE RAN' if ran else ''} {answer}", right=False)
                forget(proof)
            yield Row(
                case=f"{where}s that name a class they must not",
                outcome=f"{sum(right)} of {len(right)} refused",
                right=all(right),
            )
        yield from environment(proof)
    finally:
        sys.path.remove(str(folder))


def forget(proof: Path) -> None:
    proof.unlink(missing_ok=True)
    for name in ("evil", "runs_code"):
        sys.modules.pop(name, None)


def in_recipes() -> Iterator[tuple[str, list[str]]]:
    digits = yaml.safe_load(recipes.find("digits").path.read_text(encoding="utf-8"))  # type: ignore[union-attr]
    for number, (case, values) in enumerate(damages()):
        whole = digits | {room: digits.get(room, {}) | part for room, part in values.items()}
        path = Path(f"{number}.yaml")
        path.write_text(yaml.safe_dump(whole), encoding="utf-8")
        yield case, ["--config", str(path)]


def damages() -> Iterator[tuple[str, dict[str, Any]]]:
    """(what, values that a recipe has in its rooms)."""
    for place in PLACES:
        for name in NAMES:
            yield f"{place}: {name}", {"trainer": {place: {"class_path": name, "init_args": {}}}}
        for name in ("evil.Thing", "os.system", "runs_code.Thing"):
            yield f"{place}: text {name}", {"trainer": {place: name}}
            yield f"{place}: list of {name}", {"trainer": {place: [{"class_path": name}]}}
    for name in NAMES:
        yield f"data: {name}", {"data": {"class_path": name, "init_args": {}}}
    for name in ("evil.function", "os.system", "builtins.exec", "torch.hub.load"):
        function = {"class_path": f"{CALLBACKS}.LambdaCallback", "init_args": {"on_fit_start": name}}
        yield f"a callback's function: {name}", {"trainer": {"callbacks": [function]}}
        as_class = function | {"init_args": {"on_fit_start": {"class_path": name}}}
        yield f"a callback's function as a class: {name}", {"trainer": {"callbacks": [as_class]}}
    nested = {"class_path": "hornet_lit.strategy.FullyShardedStrategy", "init_args": {"cluster_environment": THING}}
    yield "an argument of the strategy", {"trainer": {"strategy": nested}}
    yield (
        "an argument by dict_kwargs",
        {"trainer": {"strategy": {"class_path": "ddp", "dict_kwargs": {"ddp_comm_hook": "evil.function"}}}},
    )
    yield "network_options", {"model": {"network": "hornet_pico_32", "network_options": {"mixers": THING}}}
    yield "weights", {"model": {"weights": THING}}
    yield "an argument of the data", {"data": {"class_path": "DigitsDataModule", "init_args": {"batch_size": THING}}}


def as_options() -> Iterator[tuple[str, list[str]]]:
    for place in PLACES:
        for name in ("evil.Thing", "os.system", "subprocess.Popen"):
            yield f"{place}={name}", [f"--trainer.{place}={name}"]
            yield f"{place} {name}", [f"--trainer.{place}", name]
            yield f"{place}.class_path {name}", [f"--trainer.{place}.class_path", name]
            yield f"{place} as JSON", [f"--trainer.{place}", json.dumps({"class_path": name})]
            yield f"{place} as YAML", [f"--trainer.{place}", f"class_path: {name}"]
            yield f"{place} as a list", [f"--trainer.{place}", json.dumps([{"class_path": name}])]
            yield f"{place}.help {name}", [f"--trainer.{place}.help", name]
    for option in ("--trainer.callbacks+", "--trainer.logger+", "--trainer.plugins+"):
        yield option, [option, "evil.Thing"]
        yield f"{option}=", [f"{option}=evil.Thing"]
        yield f"{option} as JSON", [option, json.dumps(THING)]
    for words in (["--data", "evil.Data"], ["--data=evil.Data"], ["--data.class_path", "evil.Data"]):
        yield words[0], words
    yield "data's help", ["--data.help", "evil.Data"]
    yield "data as JSON", ["--data", json.dumps({"class_path": "evil.Data"})]
    yield "a config in text", ["--config", json.dumps({"trainer": {"callbacks": [THING]}})]
    yield "with --print_config", ["--trainer.callbacks", "evil.Thing", "--print_config"]
    yield "network_options", ["--model.network_options", json.dumps({"mixers": THING})]


def environment(proof: Path) -> Iterator[Row]:
    """jsonargparse can read variables; here it must not."""
    names = {f"PL_{command}TRAINER__CALLBACKS": json.dumps([THING]) for command in ("", "FIT__")}
    os.environ.update(names)
    try:
        answer = ask(["fit", "--config", "digits", "--trainer.accelerator", "cpu"])
    finally:
        for name in names:
            del os.environ[name]
    ran = proof.exists() or "evil" in sys.modules
    forget(proof)
    yield Row(case="variables PL_TRAINER__CALLBACKS", outcome="ignored" if not ran else str(answer), right=not ran)
