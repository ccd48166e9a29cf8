"""hornet-lit: train, fine-tune, evaluate, use and ship HorNet. Importing it registers the networks with timm."""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath
from typing import Any

try:
    __version__ = version("hornet-lit")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = ["__version__", "load_weights"]


def __getattr__(name: str) -> Any:
    if name == "load_weights":
        from hornet_lit.network import load_weights

        return load_weights
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# The console script imports this package before it knows whether the command needs torch and timm, whose import takes
# seconds; `hornet-lit --version` and `recipes` do not. Everyone else gets the networks registered at once.
_is_command = PurePath(sys.argv[0] if sys.argv else "").stem == "hornet-lit"
if not _is_command and sys.orig_argv[1:3] != ["-m", "hornet_lit"]:
    import hornet_lit.network  # noqa: F401
