"""Files that are whole under their name or not there: after a kill, a power cut, or on a full disk."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES)  # SMB, some of FUSE
WRITING = ".writing"  # ends the names of files that are not whole yet; they begin with a dot


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a name to write to; on leaving, that file is on the disk and is called ``path``, or nothing has changed.

    The name is beside ``path`` and not in $TMPDIR: a file moved from another file system is copied, and a process
    killed then leaves a part of it under its final name (4 of 8 kills did, with Lightning's own way of saving).

    Raises:
        OSError: it could not be written; names ``path``. What was there under that name still is.
    """
    _remove_abandoned(path.parent)
    temporary = path.with_name(f".{path.name}{_writer()}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if cause := system_error(error):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise


def flush_folder(path: Path) -> None:
    """fsync of a folder: its renames survive a power cut. Where the file system has no such thing, nothing."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def system_error(error: BaseException | None) -> OSError | None:
    """The OSError that led to ``error``: torch's writers raise errors of their own from it, without its reason."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _writer() -> str:
    return f".{socket.gethostname()}.{os.getpid()}{WRITING}"


def _remove_abandoned(folder: Path) -> None:
    """Remove what processes of this machine left that were killed while they wrote."""
    for path in folder.glob(f".*{WRITING}"):
        name, _, pid = path.name.removesuffix(WRITING).rpartition(".")
        if name.endswith(f".{socket.gethostname()}") and pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)
