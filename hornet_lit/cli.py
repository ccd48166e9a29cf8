"""The command `hornet-lit`: which command was meant, its exit code, and how an error is printed.

Nothing here imports torch or lightning before a command needs them (they take seconds): `--version`, `--help` and
`recipes` answer at once. fit, validate, test and predict are `hornet_lit.cli_lightning`.

Exit codes: 0 done; 2 the user's mistake, told in at most five lines; 1 anything else: a training that stopped at a loss
that is not finite, which says so, and errors of ours, with their traceback; 143 and 130 after a signal (cli_process).
HORNET_LIT_DEBUG=1 shows the traceback of a user's mistake too.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hornet_lit import __version__, recipes
from hornet_lit.cli_errors import UserError, shorten, telling, unknown
from hornet_lit.cli_process import SIGNAL_CODES, Process, end_python, keep_freed_memory

# Since torch 2.6 this variable turns every weights_only=True into False: a checkpoint could then run code.
UNSAFE_LOAD = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
LIGHTNING = ("fit", "validate", "test", "predict")

USAGE = """\
usage: hornet-lit COMMAND [options]

commands:
  fit       train:     hornet-lit fit --config RECIPE [--config OVERLAY] [--model.lr 1e-3 …]
  validate  evaluate:  hornet-lit validate --ckpt_path FILE.ckpt
  test      evaluate:  hornet-lit test --ckpt_path FILE.ckpt
  predict   predict:   hornet-lit predict --ckpt_path FILE.ckpt --data.predict_path FOLDER
  check-data  read every image of a data set, report what is bad or odd: hornet-lit check-data FOLDER
  convert   one file of a sharded checkpoint, or weights alone: hornet-lit convert CHECKPOINT OUTPUT
  bench     speed and memory of networks here: hornet-lit bench hornet_tiny_7x7 --against convnext_tiny
  recipes   list the packaged recipes; `recipes show NAME`, `recipes copy NAME [FILE]`

options:
  --help     this text; `hornet-lit fit --help` lists every option of fit
  --version  the version"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        argv: the words after `hornet-lit`; None takes them from sys.argv.
    """
    if argv is None and "".join(sys.argv[1:2]) not in LIGHTNING and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `hornet-lit recipes | head` ends without a word
    code = _code_of(list(sys.argv[1:] if argv is None else argv))
    if argv is None and code in SIGNAL_CODES:
        end_python(code)
    return code


def _code_of(words: list[str]) -> int:
    try:
        with telling():
            _run(words)
    except UserError as error:
        if os.environ.get("HORNET_LIT_DEBUG") == "1":
            raise
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        prefix = "hornet-lit: error: " if rank == 0 else f"hornet-lit (local rank {rank}): error: "
        print(prefix + shorten(str(error)).replace("\n", "\n  "), file=sys.stderr)
        return error.exit_code
    except SystemExit as error:  # argparse after --help; cli_process after a signal
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    return 0


def _run(words: list[str]) -> None:
    match words:
        case [] | ["-h" | "--help", *_] | ["help"]:
            print(USAGE)
        case ["--version"]:
            print(f"hornet-lit {__version__}")
        case [command, *rest] if command in COMMANDS:
            COMMANDS[command](command, rest)
        case [option, *_] if option.startswith("-"):
            raise UserError(
                f"option {option!r} given before the command\n"
                f"the command comes first: hornet-lit {{{','.join(COMMANDS)}}} [options]"
            )
        case [command, *_]:
            raise unknown("command", command, COMMANDS, mend=f"commands: {', '.join(COMMANDS)}")


def _load_safely() -> None:
    if os.environ.pop(UNSAFE_LOAD, None):
        print(f"hornet-lit: {UNSAFE_LOAD} ignored: checkpoints are never unpickled", file=sys.stderr)


def _lightning(command: str, words: list[str]) -> None:
    _load_safely()
    keep_freed_memory()
    process = Process()
    with process.signals():
        from hornet_lit.cli_lightning import run

        run(command, words, process=process)


def _convert(_: str, words: list[str]) -> None:
    _load_safely()
    from hornet_lit import cli_convert

    cli_convert.run(words)


def _check_data(_: str, words: list[str]) -> None:
    from hornet_lit import cli_check

    cli_check.run(words)


def _bench(_: str, words: list[str]) -> None:
    keep_freed_memory()
    from hornet_lit import cli_bench

    cli_bench.run(words)


def _recipes(_: str, words: list[str]) -> None:
    match words:
        case [] | ["list"]:
            print(recipes.listing())
        case ["show", name]:
            print(resolve_file(name).path.read_text(encoding="utf-8"), end="")
        case ["copy", name, *destination] if len(destination) <= 1:
            try:
                target = recipes.copy(resolve_file(name), Path(*destination))
            except OSError as error:
                raise UserError(f"{error.filename}: {error.strerror}") from error
            except ValueError as error:  # a name that no file can have
                raise UserError(f"{destination[0]!r}: {error}") from error
            print(target)
        case ["-h" | "--help", *_]:
            print("usage: hornet-lit recipes [show NAME | copy NAME [FILE or FOLDER]]")
        case _:
            raise UserError(
                f"cannot read `recipes {' '.join(words)}`\n"
                "expected: recipes | recipes show NAME | recipes copy NAME [FILE]"
            )


def resolve_recipe(name: str) -> recipes.Recipe:
    """The packaged recipe called `name`; a UserError with the nearest names where there is none."""
    if (recipe := recipes.find(name)) is not None:
        return recipe
    near = recipes.nearest(name)
    hint = f"did you mean {' or '.join(map(repr, near))}?\n" if near else ""
    raise UserError(f"no file and no recipe is called {name!r}\n{hint}`hornet-lit recipes` lists the recipes")


def resolve_file(name: str) -> recipes.Recipe:
    """The packaged recipe or job script called `name`; a UserError with the nearest names where there is none."""
    scripts = {script.name: script for script in recipes.all_scripts()}
    return scripts.get(name) or resolve_recipe(name)


COMMANDS: dict[str, Callable[[str, list[str]], None]] = {
    **dict.fromkeys(LIGHTNING, _lightning),
    "check-data": _check_data,
    "convert": _convert,
    "bench": _bench,
    "recipes": _recipes,
}
