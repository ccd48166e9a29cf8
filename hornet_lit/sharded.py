"""Sharded checkpoints: a folder with a part per process, either whole or not there, and read without running code.

A folder holds what torch.distributed.checkpoint writes (`.metadata` and `__RANK_N.distcp`: weights and optimizer
states), `meta.pt` (everything else: loops, callbacks, hyper-parameters, the gathered averaged weights) and, written
last, `complete.json`, which lists the files with their sizes. Overwriting in place would not do: killed in between,
torch loads a mixture of two steps without a word (measured). So a folder is written under another name, then renamed.

torch unpickles `.metadata` and every entry that is no tensor with the full pickle, whatever weights_only says. Here the
former may only name the classes it consists of, and the latter are read by torch.load(weights_only=True).
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

from hornet_lit.durable import flush_folder, system_error

MARKER = "complete.json"
META = "meta.pt"  # the name that Lightning tells sharded checkpoints by
VERSION = 1
WRITING, PREVIOUS = ".writing", ".previous"

StateDict = dict[str, Any]


def is_sharded(path: Path) -> bool:
    """Whether ``path`` is a folder with parts of a sharded checkpoint, whole or not."""
    return path.is_dir() and any((path / name).exists() for name in (MARKER, META, ".metadata"))


# ---- writing


def write(
    path: Path, *, tensors: StateDict, rest: StateDict, rank: int, world: int, barrier: Callable[[], None]
) -> None:
    """Write a sharded checkpoint to the folder ``path``; every process calls it.

    A checkpoint that is there already is moved aside and removed when the new one has its name. Killed between these
    two renames, both are left whole, under ``path`` + ".writing" and + ".previous".

    Args:
        path: where to; all processes must see the same file system.
        tensors: weights and optimizer states, as DTensors.
        rest: everything else; rank 0's is saved.
        rank, world: of this process.
        barrier: waits for all processes.
    """
    writing = path.with_name(path.name + WRITING)
    if rank == 0:
        _remove(writing)
        writing.mkdir(parents=True)
    barrier()
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(writing))  # fsyncs its files
        if rank == 0:
            _complete(writing, rest=rest, world=world)
    except (CheckpointException, OSError, RuntimeError) as error:
        if rank == 0:
            _remove(writing)
        if cause := _system_error(error):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise
    if rank == 0:
        previous = path.with_name(path.name + PREVIOUS)
        if path.exists():
            _remove(previous)
            path.rename(previous)
        writing.rename(path)
        flush_folder(path.parent)
        _remove(previous)
    barrier()


def _complete(writing: Path, *, rest: StateDict, world: int) -> None:
    """Add to the processes' parts what makes a checkpoint of them, and the marker last."""
    with (writing / META).open("wb") as file:
        torch.save(rest, file)
        _flush(file)
    sizes = {name: _size(writing, name) for name in sorted({*_parts(_read_metadata(writing)), ".metadata", META})}
    if None in sizes.values():
        raise ValueError(
            f"{writing} lacks the parts of other nodes: sharded checkpoints need a file system that all nodes "
            "share. Use one, or set save_distributed_checkpoint: false"
        )
    marker = {"version": VERSION, "processes": world, "files": sizes}
    with (writing / MARKER).open("w", encoding="utf-8") as file:
        json.dump(marker, file, indent=1)
        _flush(file)
    flush_folder(writing)


def _system_error(error: BaseException) -> OSError | None:
    failures = [each for each, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    return next((found for each in failures if (found := system_error(each))), None)


def _flush(file: io.IOBase) -> None:
    file.flush()
    os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- reading


def check(path: Path) -> None:
    """Refuse a folder that is not exactly what was written.

    Raises:
        ValueError: without a marker, or with files that are missing or of another size than it says; names them.
    """
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is a sharded checkpoint without {MARKER}: its writing was interrupted, and its parts may be of "
            "different steps. Use another checkpoint of the run"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path / MARKER} is damaged: use another checkpoint of the run") from error
    if not isinstance(marker, dict) or marker.get("version") != VERSION or not isinstance(marker.get("files"), dict):
        raise ValueError(f"{path / MARKER} is not of version {VERSION}, which this hornet-lit reads")
    wrong = [name for name, size in marker["files"].items() if _size(path, name) != size]
    wrong += sorted({*_parts(_read_metadata(path)), META} - marker["files"].keys()) if not wrong else []
    if wrong:
        raise ValueError(
            f"{path} is not whole: {', '.join(wrong[:5])} missing, or not as {MARKER} says. "
            "Copy it again, or use another checkpoint of the run"
        )


def _size(path: Path, name: str) -> int | None:
    plain = Path(name).name == name  # nothing outside the folder is read
    return (path / name).stat().st_size if plain and (path / name).is_file() else None


def read_meta(path: Path) -> StateDict:
    """Everything but weights and optimizer states."""
    return torch.load(path / META, map_location="cpu", weights_only=True)


def read_into(path: Path, state: StateDict) -> None:
    """Fill the tensors of ``state`` (nested dictionaries) from ``path``, on any number of processes; all call it.

    Raises:
        ValueError: an entry of ``state`` is missing there, of another shape, or not readable without running code.
    """
    _load(state, path, _Planner())


def read_whole(path: Path) -> StateDict:
    """The checkpoint in ``path`` as the single file that one device would have written.

    Raises:
        ValueError: not a whole sharded checkpoint, see `check`; or an entry that cannot be read without running code.
    """
    check(path)
    contents = _read_metadata(path)
    flat = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, metadata.TensorStorageMetadata)
        else None
        for name, entry in contents.state_dict_metadata.items()
    }
    _load(flat, path, _Planner(flatten_state_dict=False, flatten_sharded_tensors=False))  # either would fill a copy
    nested: StateDict = {}
    for name, value in flat.items():
        _put(nested, contents.planner_data[name], value)
    optimizers = [nested[key] for key in sorted(nested) if key.startswith("optimizer_")]
    states = {"optimizer_states": [_numbered(state) for state in optimizers]} if optimizers else {}
    return read_meta(path) | {"state_dict": nested["state_dict"]} | states


def _put(nested: StateDict, keys: tuple[str | int, ...], value: Any) -> None:
    """Lists come as dictionaries with their indices; `_numbered` makes the one that there is a list again."""
    for key in keys[:-1]:
        nested = nested.setdefault(key, {})
    nested[keys[-1]] = value


def _numbered(state: StateDict) -> StateDict:
    """An optimizer's state under numbers, as `Optimizer.state_dict` has it, in place of the parameters' names."""
    groups = [group for _, group in sorted(state["param_groups"].items())]
    numbers = {name: i for i, name in enumerate(name for group in groups for name in group["params"])}
    return {
        "state": {numbers[name]: values for name, values in state.get("state", {}).items()},
        "param_groups": [group | {"params": [numbers[name] for name in group["params"]]} for group in groups],
    }


class _Unpickler(pickle.Unpickler):
    """Names nothing but what `.metadata` consists of: the classes below, torch's dtypes, and paths."""

    ALLOWED = frozenset(
        {(metadata.__name__, name) for name in (*metadata.__all__, "_MEM_FORMAT_ENCODING")}
        | {(filesystem.__name__, "_StorageInfo"), ("torch", "Size"), ("torch.serialization", "_get_layout")}
        | {(module, "PosixPath") for module in ("pathlib", "pathlib._local")}
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if (module, name) in self.ALLOWED or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _read_metadata(path: Path) -> metadata.Metadata:
    try:
        with (path / ".metadata").open("rb") as file:
            contents = _Unpickler(file).load()
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(
            f"{path / '.metadata'} is damaged or not of a checkpoint ({str(error)[:100]}): it was not loaded, since "
            "such files can run code"
        ) from error
    if not isinstance(contents, metadata.Metadata) or not isinstance(contents.storage_data, dict):
        raise ValueError(f"{path / '.metadata'} is not of a checkpoint: name another")
    return contents


def _parts(contents: metadata.Metadata) -> set[str]:
    return {entry.relative_path for entry in contents.storage_data.values()}


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        contents = _read_metadata(Path(self.path))
        contents.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return contents


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name, entry = read_item.dest_index.fqn, torch.load(value, map_location="cpu", weights_only=True)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], entry)
        else:
            self.state_dict[name] = entry


def _load(state: StateDict, path: Path, planner: _Planner) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, storage_reader=_Reader(path), planner=planner)
    except CheckpointException as error:  # a BaseException, with the traceback of each process in its text
        reasons = [str(exception) for exception, _ in error.failures.values()]
        raise ValueError(f"{path} cannot be read: {(reasons or [str(error)])[0].splitlines()[0]}") from error
