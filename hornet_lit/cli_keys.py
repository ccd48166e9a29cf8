"""Checks the names in options and recipes before jsonargparse does, so that a typo is told by its whole path.

jsonargparse says "Option 'monnitor' is not accepted" or dumps every type of a union; these checks say
"unknown key 'trainer.callbacks[0].init_args.monnitor' in digits.yaml, did you mean …". Values are left to jsonargparse;
`value_error` makes five lines of what it says about them. Imports of torch and lightning stay out of this file: the
parser and the base classes are handed in.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hornet_lit import cli_classes
from hornet_lit.cli_errors import UserError, unknown
from hornet_lit.cli_recipes import Config

CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
CLASS_LISTS = ("trainer.callbacks", "trainer.logger")  # whose texts are names of classes; others have words as well
MAX_DEVICES = 100_000
NOT_KEYS = {"help", "h", "config", "c", "print_config"}  # options that a recipe cannot hold


class KeyChecker:
    """Knows every name that one command accepts.

    Args:
        names: dotted names of the command's own options.
        data_class: the data module's class, None where no config names one.
        bases: the options that take classes, and the base of theirs; subclasses may be named without their module.
        rooms: the classes whose arguments stand in a room of the recipe: trainer, model.
        command: for the hint at the end of a message.
    """

    def __init__(
        self,
        *,
        names: Iterable[str],
        data_class: type | None,
        bases: Mapping[str, type],
        rooms: Mapping[str, type],
        command: str,
    ) -> None:
        self.rooms = rooms
        self.names = {name for name in names if not name.endswith(".help")}
        self.data_class = data_class
        self.bases = bases
        self.mend = f"`hornet-lit {command} --help` lists the options"

    def check_config(self, config: Config) -> None:
        """UserError on the first name in `config` that the command does not accept."""
        self._check_mapping(config.values, parent="", source=config.source)

    def _check_mapping(self, values: dict[str, Any], *, parent: str, source: str) -> None:
        for key, value in values.items():
            name = f"{parent}{str(key).removesuffix('+')}"
            if name == "data":
                if not isinstance(value, dict):
                    raise UserError(
                        f"data in {source}: expected a mapping with class_path and init_args, got {value!r}"
                    )
                self._check_class(value, path=name, source=source, known=self.data_class)
            elif self._children(name):
                if not isinstance(value, dict):
                    raise UserError(f"{name} in {source}: expected a mapping of options, got {value!r}\n{self.mend}")
                self._check_mapping(value, parent=f"{name}.", source=source)
            elif name in self.names - NOT_KEYS:
                if value is None:
                    self._refuse_null(self.rooms.get(parent.removesuffix(".")), str(key), where=f"{name} in {source}")
                self._check_value(value, path=name, source=source)
            else:
                raise unknown("key", name, sorted(self.names - NOT_KEYS), where=source, mend=self.mend)

    def _check_value(self, value: Any, *, path: str, source: str) -> None:
        if isinstance(value, list):
            for i, item in enumerate(value):
                self._check_value(item, path=f"{path}[{i}]", source=source)
        elif isinstance(value, dict) and ("class_path" in value or _option(path) in self.bases):
            self._check_class(value, path=path, source=source, known=None)
        elif isinstance(value, str):
            self._check_text(value, path=path, source=source)

    def _check_text(self, value: str, *, path: str, source: str) -> None:
        """A text in the place of a class: its name."""
        if (option := _option(path)) in self.bases and ("." in value or option in CLASS_LISTS):
            self.find_class(value, path=path, source=source)

    def _check_class(self, value: dict[str, Any], *, path: str, source: str, known: type | None) -> None:
        for key in value:
            if key not in CLASS_KEYS:
                near = f"{path}.init_args.{key}" if known and key in (parameters(known) or ()) else str(key)
                raise unknown("key", f"{path}.{key}", [near, *(f"{path}.{k}" for k in CLASS_KEYS)], where=source)
        if "class_path" in value:
            known = self.find_class(value["class_path"], path=path, source=source)
        init_args = value.get("init_args", {})
        valid = None if known is None else parameters(known)
        if not isinstance(init_args, dict):
            raise UserError(f"{path}.init_args in {source}: expected a mapping, got {init_args!r}")
        for key, item in init_args.items():
            name = f"{path}.init_args.{str(key).removesuffix('+')}"
            if valid is not None and str(key).removesuffix("+") not in valid:
                raise unknown("key", name, [f"{path}.init_args.{v}" for v in valid], where=source)
            if item is None:
                self._refuse_null(known, str(key), where=f"{name} in {source}")
            self._check_value(item, path=name, source=source)

    def _refuse_null(self, kind: type | None, key: str, *, where: str) -> None:
        """jsonargparse takes null for everything; the class would fail on it without naming the key."""
        parameter = None if kind is None else inspect.signature(kind.__init__).parameters.get(key)  # type: ignore[misc]
        if parameter is None or parameter.default is None or re.search(r"None|Optional|Any", str(parameter.annotation)):
            return
        default = "" if parameter.default is parameter.empty else f"; leave it out for {parameter.default!r}"
        expected = re.sub(r"<class '(\w+)'>", r"\1", str(parameter.annotation)).replace("typing.", "")
        raise UserError(f"{where}: expected {expected}, got null{default}")

    def find_class(self, class_path: Any, *, path: str, source: str) -> type:
        """The class called `class_path`: a dotted import path, or the bare name of a known class."""
        if not isinstance(class_path, str) or not class_path:
            raise UserError(f"{path}.class_path in {source}: expected the name of a class, got {class_path!r}")
        expected = self.bases.get(_option(path))
        bases = self.bases.values() if expected is None else (expected,)
        known = {kind.__name__: kind for base in bases for kind in _subclasses(base)}
        module_name, dot, name = class_path.rpartition(".")
        if not dot:
            if name in known:
                return known[name]
            raise unknown("class", class_path, known, where=f"{path}.class_path of {source}")
        cli_classes.check_installed(class_path, where=f"{path}.class_path of {source}")
        names = [f"{kind.__module__}.{kind.__name__}" for kind in known.values()]
        try:
            found = getattr(importlib.import_module(module_name), name, None)
            names += [f"{module_name}.{kind}" for kind in known]  # most are offered by their package as well
        except ImportError:
            found = None
        except Exception as error:  # an installed module may do anything on import
            reason = f"its module cannot be imported: {type(error).__name__}: {str(error)[:200]}"
            raise UserError(f"{path}.class_path of {source}: {class_path!r}: {reason}") from error
        if isinstance(found, type) and expected is not None and not issubclass(found, expected):
            raise UserError(f"{path}.class_path of {source}: {class_path!r} is no {expected.__name__}")
        if isinstance(found, type):
            return found
        raise unknown("class", class_path, names, where=f"{path}.class_path of {source}")

    def check_options(self, words: Sequence[str]) -> None:
        """UserError on the first `--name` among `words` that the command does not accept."""
        for option, value in options(words):
            name = option.removesuffix("+")
            is_word = value is not None and re.fullmatch(r"[A-Za-z_][\w.]*", value)
            if is_word and value not in ("true", "false", "null"):
                self._check_text(value, path=name.removesuffix(".class_path"), source="the command line")
            room, _, last = name.replace(".init_args.", ".").partition(".")
            if value == "null":
                kind = self.data_class if room == "data" else self.rooms.get(room)
                self._refuse_null(kind, last, where=f"--{option}")
            if name in self.names:
                continue
            parent = self._parent(name)
            if parent == "data":
                self._check_data_option(option)
            elif parent is None or self._children(parent):
                raise unknown("option", f"--{option}", [f"--{v}" for v in sorted(self.names)], mend=self.mend)
            # else --trainer.logger.save_dir, --model.network_options.depths: jsonargparse knows the class

    def _check_data_option(self, option: str) -> None:
        if self.data_class is None:
            raise UserError(
                f"--{option} needs a data module to belong to\n"
                "add --config RECIPE, --data CLASS before it, or a --ckpt_path that was trained with one"
            )
        valid = parameters(self.data_class)
        last = option.removeprefix("data.").removeprefix("init_args.").removesuffix("+").partition(".")[0]
        if valid is not None and last not in valid and last not in CLASS_KEYS:
            raise unknown("option", f"--{option}", [f"--data.{v}" for v in valid], mend=self.mend)

    def _parent(self, name: str) -> str | None:
        while "." in name:
            name = name.rpartition(".")[0]
            if name in self.names:
                return name
        return None

    def _children(self, name: str) -> bool:
        return any(valid.startswith(f"{name}.") for valid in self.names)


def check_ranges(values: Mapping[str, Any]) -> None:
    """UserError for what Lightning takes without a word (a negative clip value would train uphill), or without the key.

    Args:
        values: all that a command was given.
    """
    seed, trainer = values.get("seed_everything"), values["trainer"]
    if seed is not None and not 0 <= seed < 2**32:
        raise UserError(f"seed_everything is {seed}: it must lie in 0 … 2^32 - 1")
    for key, least in (("gradient_clip_val", 0), ("log_every_n_steps", 0), ("check_val_every_n_epoch", 1)):
        value = trainer.get(key)
        if value is not None and not least <= value < math.inf:
            raise UserError(f"trainer.{key} is {value}: it must be at least {least}")
    for key in ("devices", "num_nodes"):  # Lightning makes a list of them
        value = trainer.get(key)
        if str(value).isdecimal() and int(value) > MAX_DEVICES:
            raise UserError(f"trainer.{key} is {value}: it must be at most {MAX_DEVICES}")


def options(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """The options among `words`: (name without its dashes, value); None where the value is missing or a flag's."""
    for i, word in enumerate(words):
        if word == "-c" or (word.startswith("--") and len(word) > 2):
            name, equals, value = word.partition("=")
            following = words[i + 1] if i + 1 < len(words) else None
            if following is not None and following.startswith("--"):
                following = None
            yield ("config" if name == "-c" else name[2:]), value if equals else following


def parameters(kind: type) -> set[str] | None:
    """Names that `kind(...)` takes; None where it takes any (``**kwargs``)."""
    signature = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    if any(p.kind is p.VAR_KEYWORD for p in signature.values()):
        return None
    return set(signature) - {"self"}


def _option(path: str) -> str:
    """trainer.callbacks[0] → trainer.callbacks"""
    return re.sub(r"\[\d+\]$", "", path)


def _subclasses(kind: type) -> set[type]:
    found = {kind}
    for child in kind.__subclasses__():
        found |= _subclasses(child)
    return found


def value_error(message: str, configs: Sequence[Config], words: Sequence[str]) -> str:
    """Five lines at most of what jsonargparse said about a value: the whole key, what was given, what is expected."""
    message = re.sub(
        r"Importing '([^']+)' is not allowed, denied by .*? to allow it\.",
        r"'\1' is refused: a recipe or option may name installed classes of the expected type only",
        message,
    )
    found = list(re.finditer(r'Parser key "(?P<key>[^"]+)"[^:\n]*:\s*', message))
    if not found:
        return re.sub(r"^unrecognized arguments: ", "not an option, and no option takes it: ", message)
    key, rest = found[-1]["key"], message[found[-1].end() :]  # the innermost
    given = re.findall(r"(?:Given value|Got value): (.*)", rest)[:1]
    rest = re.split(r"(?:Given value|Got value)", rest)[0].rstrip(" .\n")  # what follows is about the outer keys
    place = _locate(key, given[0] if given else None, configs, words)
    if problem := re.search(r"Problem with given class_path '([^']+)':\s*\n?\s*Option '([^']+)' is not accepted", rest):
        return _not_accepted(problem[2], class_path=problem[1], key=key, configs=configs)
    if problem := re.search(r"Problem with given class_path '([^']+)':\s*\n?\s*(.+)", rest):
        return f"{place}: cannot use class {problem[1]!r}\n{problem[2].strip()}"
    expected = dict.fromkeys(_type_names(rest))
    if not expected or not given:
        return f"{place}: {rest}"
    return f"{place}: expected {' or '.join(expected)}, got {given[0]!r}"


def _not_accepted(name: str, *, class_path: str, key: str, configs: Sequence[Config]) -> str:
    """For a class that hands **kwargs on, where only jsonargparse finds out what it takes."""
    for config in reversed(configs):
        for path, _ in _leaves(config.values):
            if path.startswith(f"{key}.") and path.rpartition(".")[2] == name:
                module, _, kind = class_path.rpartition(".")
                known = getattr(sys.modules.get(module), kind, object)
                valid = {each for base in inspect.getmro(known) for each in inspect.signature(base.__init__).parameters}
                parent = path.removesuffix(name)
                return str(unknown("key", path, [f"{parent}{each}" for each in sorted(valid)], where=config.source))
    return f"{key}: {class_path} takes no option {name!r}"


def blame(message: str, configs: Sequence[Config], words: Sequence[str]) -> str:
    """Puts the whole key, and where it was set, before what a class said about one of its arguments."""
    given = [(f"--{name}", "", value) for name, value in reversed(list(options(words)))]
    for config in reversed(configs):
        given += [(path, f" in {config.source}", value) for path, value in _leaves(config.values)]
    for path, place, value in given:
        name = re.escape(path.lstrip("-").rpartition(".")[2])
        quoted = re.search(rf"[`'\"]{name}[`'\"=]", message)
        stated = re.search(rf"(?<!\w){name}(?: is |[ =])['\"]?{re.escape(str(value))}(?!\w)", message)
        if (quoted or stated) and f"{path.lstrip('-')} " not in message:
            return f"{path}{place} is {value!r}: {message}"
    return message


def _type_names(text: str) -> Iterator[str]:
    """What the value may be, in words, from the types that jsonargparse lists."""
    names = {"NoneType": "null", "str": "text", "dict": "a mapping", "Iterable": "a list", "list": "a list"}
    for name in re.findall(r"Expected an? <class '(?:\w+\.)*(\w+)'>", text):
        if name != "NoneType" or "Literal[" not in text:
            yield names.get(name, name)
    if choices := re.findall(r"Literal\[([^\]]*)\]", text):
        values = dict.fromkeys(v.strip(" '\"") for choice in choices for v in choice.split(","))
        yield f"one of {', '.join(values)}"


def _locate(key: str, given: str | None, configs: Sequence[Config], words: Sequence[str]) -> str:
    """The whole path of `key` and the file it was read from; jsonargparse names only the last part of nested ones."""
    for name, value in options(words):
        if name.removesuffix("+") == key or (name.rpartition(".")[2] == key and value == given):
            return f"--{name}"
    for config in reversed(configs):
        for path, value in _leaves(config.values):
            same = path == key or (path.rpartition(".")[2] == key and (given is None or _same(value, given)))
            if same:
                return f"{path} in {config.source}"
    return key


def _same(value: Any, text: str) -> bool:
    if str(value) == text:
        return True
    try:
        return bool(ast.literal_eval(text) == value)
    except (ValueError, SyntaxError):
        return False


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if path:
        yield path, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key).removesuffix("+"))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}[{i}]")
