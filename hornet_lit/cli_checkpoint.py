"""What a checkpoint says about the run that wrote it, and what a command may change about it.

Every read is torch.load(weights_only=True): a checkpoint never runs code. The settings:

- the model's hyper-parameters are the checkpoint's. Validate, test and predict: options and recipes may change them,
  except those that decide which weights exist (ARCHITECTURE). Fit, which resumes: nothing that training depends on may
  change; how it is executed (EXECUTION) may.
- the data module's settings are the checkpoint's where no config or option names a data module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch

from hornet_lit import sharded
from hornet_lit.cli_contents import check_contents
from hornet_lit.cli_errors import UserError
from hornet_lit.cli_keys import options
from hornet_lit.network.files import check_file

KEY = "hornet_lit"  # where our CLI keeps its note in a Lightning checkpoint
ARCHITECTURE = ("network", "num_classes", "in_chans", "img_size", "network_options")
EXECUTION = ("compile", "channels_last", "grad_checkpointing", "predict_weights", "skip_nonfinite")
DATA_ROOM = "hornet_lit.data"
# After a kill between two renames a sharded one is whole under last.ckpt.writing or last.ckpt.previous alone.
PATTERN = "*.ckpt*"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The model's hyper-parameters and, if the checkpoint has them, the data module's {class_path, init_args}."""

    path: Path
    model: dict[str, Any]
    data: dict[str, Any] | None


def read_settings(path: Path) -> Settings:
    """Reads a checkpoint's settings without its tensors (memory-mapped).

    Raises:
        UserError: missing, unreadable, or not a checkpoint of hornet-lit.
    """
    checkpoint = read_checkpoint(path, name=f"--ckpt_path {path}")
    note = checkpoint.get(KEY)
    data = note.get("data") if isinstance(note, dict) else None
    return Settings(path=path, model=dict(checkpoint["hyper_parameters"]), data=_checked(data, path))


def read_checkpoint(path: Path, *, name: str) -> dict[str, Any]:
    """Reads a checkpoint; of a sharded one (a folder) everything but its weights and optimizer states.

    Args:
        path: the file or folder.
        name: of it in errors.

    Raises:
        UserError: missing, unreadable, not whole, or not a checkpoint of hornet-lit.
    """
    if not path.exists():
        raise UserError(f"{name}: no such file")
    file = path / sharded.META if path.is_dir() else path
    if path.is_dir():
        if not sharded.is_sharded(path):
            raise UserError(f"{name} is a folder, not a checkpoint: name one of the files in its checkpoints/")
        try:
            sharded.check(path)
        except ValueError as error:
            raise UserError(str(error)) from error
    if not is_zipfile(file):
        raise _unreadable(name, "not a file of torch.save, or cut short")
    try:
        check_file(file)
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:  # torch's own words advise to switch the protection off
        raise _unreadable(name, "it holds other things than tensors and plain settings") from error
    except Exception as error:  # torch raises RuntimeError, EOFError, …: none of them is readable
        raise _unreadable(name, next(iter(str(error).splitlines()), "") or type(error).__name__) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("hyper_parameters"), dict):
        raise UserError(
            f"{name} was not written by hornet-lit (it has no hyper_parameters)\n"
            "give weights of others as --model.weights FILE, with --config RECIPE for the network"
        )
    check_contents(checkpoint, name)
    return checkpoint


def _unreadable(name: str, reason: str) -> UserError:
    return UserError(
        f"{name} cannot be read: {reason[:200]}\n"
        "it is damaged, or not written by hornet-lit: weights of others go with --model.weights FILE --config RECIPE"
    )


def _checked(data: Any, path: Path) -> dict[str, Any] | None:
    """The data settings, refused where they name a class that is not ours: a file must not choose what is imported."""
    if not isinstance(data, dict):
        return None
    class_path = data.get("class_path")
    if not isinstance(class_path, str) or not class_path.startswith(f"{DATA_ROOM}."):
        raise UserError(
            f"--ckpt_path {path} was trained with data {class_path!r}, which is not one of hornet-lit's\n"
            "name the data yourself: --config RECIPE, or --data CLASS"
        )
    given = data.get("init_args") or {}
    if not isinstance(given, dict):
        raise UserError(f"--ckpt_path {path} is refused: its data settings are no mapping\nit is damaged")
    # Nor may it choose what is predicted, or a folder to download to.
    kept = {k: v for k, v in given.items() if k not in ("predict_path", "download")}
    return {"class_path": class_path, "init_args": kept}


def merge_model(
    settings: Settings, explicit: dict[str, Any], *, command: str, valid: set[str], words: Sequence[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """The model's options to run with, and the keys where the checkpoint's value stands against an explicit null.

    Args:
        explicit: the model options that recipes and the command line state.
        valid: the names that the module of this version takes; others in the checkpoint are dropped.
        words: the command line; a --model.weights there beside --ckpt_path is refused, but not for fit: a run that
            began with it is resumed by the same command. (A recipe's gives way.)

    Raises:
        UserError: an explicit value conflicts with the checkpoint's; names key, both values and the mend.
    """
    stored = {key: value for key, value in settings.model.items() if key in valid}
    resuming = command == "fit"
    yielded = []
    for key, value in explicit.items():
        fixed = key not in EXECUTION if resuming else key in ARCHITECTURE
        if key == "weights" or key not in stored or value == stored[key]:
            continue
        if value is None and key in ARCHITECTURE:
            yielded.append(key)
        elif fixed:
            raise _conflict(settings.path, key, given=value, stored=stored[key], resuming=resuming)
    if not resuming and (given := dict(options(words)).get("model.weights")) not in (None, "null"):
        raise UserError(
            f"--model.weights {given} and --ckpt_path {settings.path} both give weights\n"
            "keep one: --ckpt_path for a run of hornet-lit, --model.weights for other weights"
        )
    # The checkpoint has the weights; the file that a fine-tuning began from is not read again, and may be gone.
    return stored | {"weights": None}, [*yielded, "weights"]


def _conflict(path: Path, key: str, *, given: Any, stored: Any, resuming: bool) -> UserError:
    why = "a resumed run keeps its settings" if resuming else "its weights fit no other network"
    start = "; to train anew from its weights: --model.weights instead of --ckpt_path" if resuming else ""
    return UserError(
        f"model.{key} is {given!r} by your options, {stored!r} in --ckpt_path {path}\n"
        f"{why}: drop it from the options, or set --model.{key} {_word(stored)}{start}"
    )


def _word(value: Any) -> str:
    return "null" if value is None else str(value)


def resolve_path(text: str, *, runs: Path, say: Callable[[str], None]) -> Path:
    """`last` and `best` of the newest run below `runs`, or `text` itself. URLs are refused.

    last is its newest checkpoint that can be read; best the one that its ModelCheckpoint noted as best in that.

    Args:
        say: gets a line for each newer one that cannot be read.
    """
    if "://" in text:
        raise UserError(f"--ckpt_path {text}: URLs are refused, a checkpoint must be a local file\ndownload it first")
    if text not in ("last", "best"):
        return Path(text)
    found = _newest_first(runs.rglob(PATTERN))
    if not found:
        raise UserError(f"--ckpt_path {text}: no checkpoint below {runs}/\nname the file: --ckpt_path FILE.ckpt")
    last = newest(found[0].parent, say=say)
    assert last is not None
    return last.path if text == "last" else _best(last.path)


def run_folder(logger: Any) -> Path:
    """The folder of a run whose `trainer.logger` is fixed to it, as ModelCheckpoint makes it of the first logger.

    Args:
        logger: the setting: a mapping with class_path and init_args, a list of them, a bool or None.
    """
    first = logger[0] if isinstance(logger, list) and logger else logger
    given = {} if first in (None, True, False, []) else first.get("init_args") or {}
    save_dir, version = given.get("save_dir"), given.get("version")
    if save_dir is None or version is None:
        raise UserError(
            "--ckpt_path auto needs a run folder that is the same at every start\n"
            "add --trainer.logger.version NAME: with a recipe, the folder is runs/RECIPE/NAME"
        )
    return Path(save_dir, given.get("name") or "", version if isinstance(version, str) else f"version_{version}")


def newest(folder: Path, *, say: Callable[[str], None]) -> Settings | None:
    """The newest checkpoint in `folder` that can be read; None where there is none yet.

    Args:
        folder: a run's `checkpoints`.
        say: gets a line for each newer one that cannot be read.

    Raises:
        UserError: there are checkpoints, and none can be read: beginning anew would overwrite what is left.
    """
    found = _newest_first(folder.glob(PATTERN))
    for path in found:
        try:
            return read_settings(path)
        except UserError as error:
            say(f"skipped: {str(error).splitlines()[0]}")
    if found:
        raise UserError(f"none of the {len(found)} checkpoints in {folder} can be read\nmove it away to begin anew")
    return None


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    """Without hidden files: those that are being written, or were when their process was killed."""
    visible = [path for path in paths if not path.name.startswith(".")]
    return sorted(visible, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _best(last: Path) -> Path:
    callbacks = read_checkpoint(last, name=f"--ckpt_path {last}").get("callbacks", {})
    for state in callbacks.values():
        if isinstance(state, dict) and (best := state.get("best_model_path")):
            beside = last.parent / Path(best).name  # the run's folder may have moved since
            if beside.exists():
                return beside
    raise UserError(
        f"--ckpt_path best: {last} names no best checkpoint that still exists beside it\nuse --ckpt_path last"
    )
