"""What a user reads when a command is refused: at most five lines, exit code 2, never a traceback.

`UserError` is raised by the command line itself. `told` decides which other exceptions are a user's mistake
(a ValueError out of hornet_lit, a missing file, a value that Lightning's Trainer refuses) and which are our bugs,
which keep their traceback. Neither torch nor lightning is imported here.
"""

from __future__ import annotations

import errno
import re
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
MAX_LINES = 5
MAX_WIDTH = 400

# ValueError is what hornet_lit raises for a user (house rule); the others say which file could not be used.
FILE_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, FileExistsError)

NAME_ERRORS = (errno.ENAMETOOLONG, errno.ELOOP)
# No mistake in the options: the disk is full, or failing.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


class UserError(Exception):
    """A user's mistake, its text ready to be printed. Not a ValueError: jsonargparse catches and rewraps those."""

    exit_code = 2


class StoppedError(UserError):
    """A run that stopped itself for a reason it can state (a loss that is not finite); no mistake, and no bug."""

    exit_code = 1


def did_you_mean(name: str, valid: Iterable[str]) -> str | None:
    """The valid name nearest to `name`, or None where none resembles it. Dotted names: the same parent is preferred."""
    valid = list(dict.fromkeys(valid))
    parent, _, last = name.rpartition(".")
    siblings = {v.rpartition(".")[2]: v for v in valid if v.rpartition(".")[0] == parent}
    for matches in (
        get_close_matches(last, siblings, n=1, cutoff=0.6),
        get_close_matches(name, valid, n=1, cutoff=0.6),
    ):
        if matches:
            return siblings.get(matches[0], matches[0])
    same_last = [v for v in valid if v.rpartition(".")[2] == last]
    return same_last[0] if same_last else None


def unknown(what: str, name: str, valid: Iterable[str], *, where: str = "", mend: str = "") -> UserError:
    """The error for a name that does not exist: what was given and where, the nearest valid one, where to see all."""
    lines = [f"unknown {what} {name!r}{f' in {where}' if where else ''}"]
    if match := did_you_mean(name, valid):
        lines.append(f"did you mean {match!r}?")
    if mend:
        lines.append(mend)
    return UserError("\n".join(lines))


def printable(text: str) -> str:
    """With control characters written out: names in files that others made could steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def shorten(message: str) -> str:
    """At most five lines of at most 400 characters; blank lines dropped, control characters written out."""
    lines = [printable(line.rstrip()) for line in message.strip().split("\n") if line.strip()]
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], f"  … {len(lines) - MAX_LINES + 1} more lines: HORNET_LIT_DEBUG=1 shows them"]
    return "\n".join(line if len(line) <= MAX_WIDTH else line[: MAX_WIDTH - 1] + "…" for line in lines)


@contextmanager
def telling(*, constructing: bool = False) -> Iterator[None]:
    """Raises in place of an error within the block what `told` makes of it; a bug of ours goes through as it is."""
    try:
        yield
    except Exception as error:  # `told` decides which it knows
        short = told(error, constructing=constructing)
        if short is None or short is error:
            raise
        raise short from error


def told(error: BaseException, *, constructing: bool) -> UserError | None:
    """What to print for `error` instead of its traceback, or None for an error that is a bug of ours.

    Args:
        error: what was raised.
        constructing: whether it came while the model, data and Trainer were being made from the options: there,
            Lightning's own refusals (a strategy it does not know, no such device) are answers to the options too.
    """
    if isinstance(error, UserError):
        return error
    if type(error).__name__ == "NonFiniteError":
        return StoppedError(str(error))
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return StoppedError(
            f"{error.filename or 'a file'}: {error.strerror}\n"
            "what was written before is whole; once this is mended, run it again: a training goes on from its newest "
            "checkpoint with --ckpt_path last"
        )
    if type(error).__name__ in ("DistBackendError", "DistNetworkError") or "gloo/transport" in str(error):
        return StoppedError(
            "another process of this run has gone, or the connection to it: see above for its own message\n"
            f"({next(iter(str(error).splitlines()), '')[:200]})\n"
            "once that is mended, the same command with --ckpt_path last goes on from the last checkpoint"
        )
    text = _text_of(error, constructing=constructing)
    return None if text is None else UserError(text)


def _text_of(error: BaseException, *, constructing: bool) -> str | None:
    if isinstance(error, FILE_ERRORS) or (isinstance(error, OSError) and error.errno in NAME_ERRORS):
        if error.filename is None and not _raised_in_package(error):
            return None
        return str(error) if error.filename is None else f"{error.filename}: {error.strerror}"
    if (text := _from_worker(error)) is not None:
        return text
    if isinstance(error, ValueError) and _raised_in_package(error):
        return str(error)
    if type(error).__name__ == "MisconfigurationException":
        return str(error)
    if _raised_while_restoring(error):
        return (
            f"the checkpoint cannot be resumed from: {type(error).__name__}: {str(error)[:200]}\n"
            "it is damaged, or of another version of hornet-lit or Lightning; HORNET_LIT_DEBUG=1 shows where"
        )
    if constructing and isinstance(error, (ValueError, TypeError, ModuleNotFoundError)):
        # Where a type has alternatives, jsonargparse lists why each was refused; what the class said comes first.
        union = re.search(r"Errors:\s+- (.+)", str(error)) if "Union subtypes" in str(error) else None
        return union[1] if union else str(error)
    return None


def _raised_in_package(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and PACKAGE in Path(frames[-1].filename).resolve().parents


def _raised_while_restoring(error: BaseException) -> bool:
    """Whether Lightning was handing a checkpoint's contents on: what is wrong there can be of any type."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "checkpoint_connector" in frame.filename]
    return any(frame.name.lstrip("_").startswith(("restore", "resume")) for frame in frames)


def _from_worker(error: BaseException) -> str | None:
    """A loader's worker sends its exception's traceback as text; torch raises it again with that text as message."""
    caught = re.match(r"Caught (\w+) in DataLoader worker process \d+", str(error))
    if caught is None or not isinstance(error, (ValueError, *FILE_ERRORS)):
        return None
    files = re.findall(r'^  File "(.+)", line \d+', str(error), flags=re.MULTILINE)
    if not files or PACKAGE not in Path(files[-1]).resolve().parents:
        return None
    return re.split(rf"\n(?:\w+\.)*{caught[1]}: ", str(error))[-1]
