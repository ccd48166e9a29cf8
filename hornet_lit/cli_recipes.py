"""`--config`: which file is meant, and what it holds.

A recipe may come from anyone. It is read as plain YAML (no tags that make objects), from a file of bounded size, and
refused where aliases would make more of it than a recipe can be: everything that walks it later would walk all of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hornet_lit.cli import resolve_recipe
from hornet_lit.cli_errors import UserError

MAX_BYTES = 2**18
MAX_NODES = 20_000  # of the YAML, every alias counted as what it stands for
MAX_DEPTH = 50


@dataclass(frozen=True, kw_only=True)
class Config:
    """One `--config`: where it came from (for messages) and what it holds."""

    source: str
    values: dict[str, Any]


def with_recipes(words: Sequence[str]) -> tuple[list[str], list[Config]]:
    """The words with every --config value turned into a path, and what those files hold."""
    words = list(words)
    configs = []
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name not in ("-c", "--config"):
            continue
        if not equals:
            if i + 1 == len(words) or words[i + 1].startswith("-"):
                raise UserError(f"{name} needs the name of a recipe, or a file\n`hornet-lit recipes` lists the recipes")
            value = words[i + 1]
        path = _config_path(value)
        configs.append(load_config(path))
        words[i if equals else i + 1] = f"{name}={path}" if equals else str(path)
    return words, configs


def load_config(path: Path) -> Config:
    """Reads a recipe. UserError where it is not YAML, not a mapping, or too large to be one."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise UserError(f"{path} is not a recipe: it is larger than {MAX_BYTES // 1024} kB")
        values = _load(text.decode("utf-8"), path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path} is not valid YAML{place}: {error.problem}") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UserError:
        raise
    except Exception as error:  # PyYAML raises all kinds on numbers and dates that are none
        raise UserError(f"{path} is not valid YAML: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path} is not a recipe: expected keys such as trainer, model and data at the top")
    return Config(source=path.name, values=values)


def _load(text: str, path: Path) -> Any:
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        if _size(root, path, {}) > MAX_NODES:
            raise UserError(f"{path} is not a recipe: its aliases stand for more than {MAX_NODES} values")
        return loader.construct_document(root)
    finally:
        loader.dispose()


def _size(node: yaml.Node, path: Path, known: dict[int, int], depth: int = 0) -> int:
    """Number of nodes, every alias counted as what it stands for."""
    if depth > MAX_DEPTH:  # also where a node contains itself
        raise UserError(f"{path} is not a recipe: it is nested more than {MAX_DEPTH} deep")
    if id(node) not in known:
        value = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [each for pair in value for each in pair] if isinstance(node, yaml.MappingNode) else value
        known[id(node)] = 1 + sum(_size(part, path, known, depth + 1) for part in parts)
    return known[id(node)]


def _config_path(value: str) -> Path:
    if "://" in value:
        raise UserError(f"--config {value}: URLs are refused, a recipe must be a local file")
    path = Path(value)
    if path.is_file():
        return path
    return resolve_recipe(value).path


def run_folder(configs: Sequence[Config]) -> Path | None:
    """Where a recipe's runs go by its logger; None where it does not say."""
    for config in reversed(configs):
        trainer = config.values.get("trainer")
        logger = trainer.get("logger") if isinstance(trainer, dict) else None
        given = logger.get("init_args") if isinstance(logger, dict) else None
        if isinstance(given, dict) and given.get("save_dir"):
            return Path(str(given["save_dir"]), str(given.get("name") or ""))
    return None
