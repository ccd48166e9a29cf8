"""Which classes a recipe may name: installed ones. Importing a module runs it, so this is decided before any import.

Installed means: in a site-packages folder of this Python, or in a package that was installed as editable
(`pip install -e`), or hornet_lit. Neither the current folder nor PYTHONPATH counts, though Python itself imports from
them: a recipe that came with a module beside it would run that module. Of what a program has imported already (one that
calls `hornet_lit.cli.main` itself) classes may be named too, since that runs nothing. The standard library has no class
that any option takes, and its functions are what a hostile recipe would like to call.

jsonargparse is told to import nothing else (`allow`), so that a name which no check here has seen is refused as well.
Whether the class is of the type that its place expects, `cli_keys` and jsonargparse decide.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import jsonargparse

from hornet_lit.cli_errors import PACKAGE, UserError

DOTTED = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+")
OURS = ("hornet_lit", "lightning")  # what defaults and bare class names stand for


def check_installed(class_path: str, *, where: str) -> None:
    """UserError where importing `class_path` would import something that is not installed; imports nothing itself.

    Args:
        class_path: dotted, module and class.
        where: the key and its file, for the message.
    """
    if not DOTTED.fullmatch(class_path):
        raise UserError(f"{where}: {class_path!r} is not the name of a class: expected package.module.Class")
    top = class_path.partition(".")[0]
    if top in sys.stdlib_module_names:
        raise UserError(f"{where}: {class_path!r} is refused: it is of Python's own library, and no class for this key")
    place = _origin(top)
    if place is not None and not is_installed(class_path):
        raise UserError(
            f"{where}: {class_path!r} is refused: {place} is not an installed package\n"
            "a recipe may name installed classes only: importing others would run whatever lies beside it\n"
            "if it is yours, make a package of it and install it: pip install -e FOLDER"
        )


def is_installed(class_path: str) -> bool:
    """Whether the module of `class_path` is in an installed package, or imported already."""
    module, _, _ = class_path.rpartition(".")
    top = class_path.partition(".")[0]
    if top in sys.stdlib_module_names or not DOTTED.fullmatch(class_path):
        return False
    if module in sys.modules:
        return True
    if (spec := _spec(top)) is None:
        return False
    places = list(spec.submodule_search_locations or ()) or [spec.origin or ""]
    return all(_is_installed_place(Path(place).resolve(), top) for place in places)


def allow(values: Iterable[Any]) -> None:
    """Lets jsonargparse import hornet_lit, Lightning and the installed packages that `values` name, nothing else.

    Args:
        values: what recipes and options hold, in any depth.
    """
    named = {text.partition(".")[0] for value in values for text in _texts(value) if is_installed(text)}
    jsonargparse.set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=sorted({*OURS, *named}),
        instantiate_subclass_spec_in_any=False,  # where anything is accepted, a class_path is text like any other
    )


def refuse_functions(config: Any, *, path: str = "") -> None:
    """UserError on a function in a parsed configuration: jsonargparse takes its name where a callable is expected."""
    if isinstance(config, dict):
        for key, value in config.items():
            refuse_functions(value, path=f"{path}.{key}" if path else key)
    elif isinstance(config, list | tuple):
        for i, value in enumerate(config):
            refuse_functions(value, path=f"{path}[{i}]")
    elif callable(config) and not isinstance(config, type) and hasattr(config, "__name__"):
        raise UserError(f"{path}: the function {config.__name__} is refused: a recipe may name classes only")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):  # an option's value may be a mapping or list in text
        yield from (found[0] for found in DOTTED.finditer(value))
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _spec(top: str) -> ModuleSpec | None:
    """What Python would import as `top`; None where it would find nothing."""
    try:
        return importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None


def _origin(top: str) -> str | None:
    """Where Python would import `top` from; None where it would not find it, and another message is better."""
    if (spec := _spec(top)) is None:
        return None
    return spec.origin or next(iter(spec.submodule_search_locations or ()), top)


def _is_installed_place(place: Path, top: str) -> bool:
    folders = (*_site_folders(), *_editable_folders(top))
    return place == PACKAGE or any(folder in place.parents for folder in folders)


@cache
def _site_folders() -> tuple[Path, ...]:
    names = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        names.append(site.getusersitepackages())
    return tuple({Path(name).resolve() for name in names})


@cache
def _editable_folders(top: str) -> tuple[Path, ...]:
    """Source folders of editable installs that bring the module `top`: a folder may hold other modules as well."""
    found = []
    for distribution in importlib.metadata.distributions(path=[str(folder) for folder in _site_folders()]):
        text = distribution.read_text("direct_url.json")
        if text is None or not (url := json.loads(text)).get("dir_info", {}).get("editable"):
            continue
        modules = (distribution.read_text("top_level.txt") or "").split()
        if top in modules or re.sub(r"[-_.]+", "_", distribution.name).lower() == top.lower():
            found.append(Path(unquote(urlparse(url["url"]).path)).resolve())
    return tuple(found)
