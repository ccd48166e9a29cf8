"""Whether a checkpoint holds what a run of hornet-lit writes, where it could do harm otherwise.

Its tensors are torch's and Lightning's to judge. The rest is data that we walk, print and hand on: settings nested or
shared so that walking them never ends, paths that lead out of the run's folder (ModelCheckpoint removes the files that
its state names), a list of classes that is none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hornet_lit.cli_errors import UserError

MAX_VALUES = 100_000  # of all settings together; a class_subset of 22k classes is the largest there is
MAX_DEPTH = 20
PLAIN = (str, int, float, bool, type(None))
PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")


def check_contents(checkpoint: dict[str, Any], name: str) -> None:
    """UserError where settings, class names or callback states are not what a run writes.

    Args:
        checkpoint: as read.
        name: of it, for the message.
    """
    settings = [checkpoint.get(key) for key in ("hyper_parameters", "datamodule_hyper_parameters", "hornet_lit")]
    budget = [MAX_VALUES]
    if not all(_is_plain(each, budget) for each in settings):
        raise _refused(name, "its settings are not plain, or far more than a run has")
    classes = checkpoint.get("class_names")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(each, str) for each in classes)):
        raise _refused(name, "its class_names are not a list of names")
    callbacks = checkpoint.get("callbacks") or {}
    if not isinstance(callbacks, dict):
        raise _refused(name, "its callbacks are not a mapping")
    for state in callbacks.values():
        for path in _paths(state):
            if not isinstance(path, str) or _leads_out(path, folder=str(state.get("dirpath") or "")):
                raise _refused(name, f"its callbacks name {path!r}, which leads out of the run's folder")


def _paths(state: Any) -> list[Any]:
    """The files that a ModelCheckpoint's state names."""
    if not isinstance(state, dict):
        return []
    models = state.get("best_k_models")
    return [state[key] for key in PATHS if state.get(key)] + (list(models) if isinstance(models, dict) else [])


def _leads_out(path: str, *, folder: str) -> bool:
    """Whether Lightning would take `path` for one in `folder`, which goes by the names, and it is none."""
    start, whole = Path(folder).absolute(), Path(path).absolute()
    return start in whole.parents and ".." in whole.relative_to(start).parts


def _is_plain(value: Any, budget: list[int], depth: int = 0) -> bool:
    """Whether it is plain values in lists and mappings; ``budget`` counts down, shared parts as often as they occur."""
    budget[0] -= 1
    if budget[0] < 0 or depth > MAX_DEPTH:
        return False
    if isinstance(value, dict):
        return all(type(k) in PLAIN and _is_plain(v, budget, depth + 1) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(each, budget, depth + 1) for each in value)
    return type(value) in PLAIN


def _refused(name: str, reason: str) -> UserError:
    return UserError(f"{name} is refused: {reason}\nit is damaged, or was not written by hornet-lit")
