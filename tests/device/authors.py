"""The authors' hornet.py, read from where the caller has it; it is no part of this repository."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from torch import nn


def authors_network(file: Path, name: str) -> nn.Module:
    """The network that the file's function `name` builds.

    The file registers names with timm that are ours as well, so nothing of it is registered; it imports from timm's
    old places, which warn, and prints as it builds.
    """
    import timm.models

    def unregistered(function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        return function

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        import timm.models.registry

        for module in (timm.models, timm.models.registry, timm.models._registry):
            stack.enter_context(patch.object(module, "register_model", unregistered))
        spec = importlib.util.spec_from_file_location("authors_hornet", file)
        assert spec is not None and spec.loader is not None, f"{file} is no Python file"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, name)()
