"""Loader processes that outlive a signal to the whole process group, so that their process can end orderly."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def sigterm_blocked() -> Iterator[None]:
    """Processes that are forked within the block are born with SIGTERM blocked, and so are their threads.

    Torch starts threads in a worker before its `worker_init_fn`; one of them with an open mask would take the signal.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_signals(worker_id: int) -> None:
    """A DataLoader's worker_init_fn: signals end a worker only when they come from its own process.

    Ctrl-C, torchrun and SLURM signal every process. A training then does its step to the end and saves; a worker that
    is gone by then makes torch raise an error in the middle of it.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    # A handler in Python is not told who sent the signal.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
