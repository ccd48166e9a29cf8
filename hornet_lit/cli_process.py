"""This process among those of its run: what SIGTERM, SIGINT and SIGUSR1 do to it, and that none outlives the others.

A signal ends the command at once, but once a training steps it is only noted: `hornet_lit.cli_stop` then ends all
processes together, at the next optimizer step and with a checkpoint. A second signal ends the process at once.
One that hangs in a collective, because another process has gone, runs no handler: a thread ends it in the end.
Exit codes: 143 after SIGTERM and SIGUSR1 (the warning that SLURM can be asked for), 130 after SIGINT (Ctrl-C).

Nothing here imports torch: the handlers are set before the imports, which take seconds.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")  # where torchrun, SLURM and Lightning tell a process its number
STARTED_BY = "HORNET_LIT_PID"  # tells a process that Lightning starts (strategy ddp without torchrun) who its parent is
ANSWER_WITHIN = 20  # seconds for a handler to run: Python's wait for the call into C that the main thread is in
AGAIN_WITHIN = 2  # seconds, for a second signal
LEAVE_WITHIN = 15  # seconds for curves, metrics.csv and Lightning's teardown once a run is to end
CHILDREN_WITHIN = 10  # seconds for the processes that this one started, once it is done itself


SIGNAL_CODES = (130, 143)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def exit_code(signum: int) -> int:
    """130 for SIGINT, 143 for the others."""
    return 130 if signum == signal.SIGINT else 143


def end_python(code: int) -> NoReturn:
    """Ends this process without Python's own clean-up, which would wait for threads and loader processes."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next allocation in place of giving every large tensor's back at once.

    Each step of a network frees and allocates the same tensors; mapped anew, every page of them costs a fault
    (BENCHMARKS.md, Speed). Other C libraries are left as they are.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


class Process:
    """The state of this process.

    Attributes:
        noting: whether a signal is only noted, because a training will end by itself at its next step.
        noted: the signal that was received, or None.
        launcher: the Trainer's launcher, whose `procs` are the processes that Lightning started.
    """

    def __init__(self) -> None:
        self.noting = False
        self.noted: int | None = None
        self.launcher: Any = None
        self._pid = os.getpid()
        rank = next((os.environ[name] for name in RANKS if name in os.environ), "0")
        self._speaks = rank == "0"
        launched = rank != "0" and os.environ.get(STARTED_BY) == str(os.getppid())
        self._parent = os.getppid() if launched else 0
        self._leaving = False
        self._deadline: float | None = None
        self._rope = -1
        self._children: list[subprocess.Popen[Any]] = []

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Handles the signals within the block; a thread keeps the deadline, and ends a child whose parent has gone."""
        if threading.current_thread() is not threading.main_thread():
            yield  # where Python lets nobody set a handler
            return
        os.environ[STARTED_BY] = str(self._pid)
        bell, self._rope = os.pipe()  # Python writes each signal's number to it at once, the handler a 0
        os.set_blocking(self._rope, False)
        previous = {each: signal.signal(each, self._handle) for each in SIGNALS}
        previous_rope = signal.set_wakeup_fd(self._rope, warn_on_full_buffer=False)
        done = threading.Event()
        watch = threading.Thread(target=self._watch, args=(done, bell), name="hornet-lit-watch", daemon=True)
        watch.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous_rope)
            for each, handler in previous.items():
                signal.signal(each, handler)
            os.environ.pop(STARTED_BY, None)
            done.set()
            os.write(self._rope, b"\0")
            watch.join()
            os.close(self._rope)
            os.close(bell)

    def leave(self, signum: int) -> None:
        """The checkpoint is written, the run ends now; further signals change nothing, and a hang is cut off."""
        self._leaving = True
        self.noted = signum
        self._deadline = time.monotonic() + LEAVE_WITHIN

    def adopt_children(self) -> None:
        """Takes the processes that Lightning started over from it.

        Lightning's observer thread kills this process as soon as one of them ends with an exit code, ours included.
        """
        started = getattr(self.launcher, "procs", [])
        self._children += started
        started.clear()

    def end_children(self) -> None:
        """Waits for the processes that Lightning started, and kills what does not end by itself."""
        self.adopt_children()
        until = time.monotonic() + CHILDREN_WITHIN
        for child in self._children:
            try:
                child.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def say(self, line: str) -> None:
        """One line on stderr, by the system call itself: a handler may come in the middle of a print."""
        os.write(2, f"\nhornet-lit: {line}\n".encode())

    # ---- signals

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked loader process
            return
        os.write(self._rope, b"\0")
        if self._leaving:
            return
        if self.noted is not None:
            self._end(exit_code(signum))
        self.noted = signum
        name = signal.Signals(signum).name
        if self.noting:
            if self._speaks:
                self.say(f"{name}: a checkpoint after this step, then the end; a second signal ends at once")
            return
        self._deadline = time.monotonic() + LEAVE_WITHIN
        if self._parent:
            os.kill(self._parent, signum)  # it ends the whole run
        elif self._speaks:
            self.say(f"ended by {name}")
        self._kill_children()
        raise SystemExit(exit_code(signum))

    def _kill_children(self) -> None:
        self.adopt_children()
        for child in self._children:
            child.kill()

    def _end(self, code: int) -> None:
        self._kill_children()
        os._exit(code)

    def _watch(self, done: threading.Event, bell: int) -> None:
        waiting: tuple[int, float] | None = None  # a signal without an answer, and since when
        while not done.is_set():
            rung = os.read(bell, 64) if select.select([bell], [], [], 1)[0] else b""
            for number in rung:
                if number == 0:
                    waiting = None
                elif number in SIGNALS and waiting is None:
                    waiting = number, time.monotonic()
            if waiting is not None:
                limit = ANSWER_WITHIN if self.noted is None else AGAIN_WITHIN
                if time.monotonic() > waiting[1] + limit:
                    self.say(f"{signal.Signals(waiting[0]).name}: ended, since this process answered nothing")
                    self._end(exit_code(waiting[0]))
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._end(exit_code(self.noted or signal.SIGTERM))
            if self._parent and os.getppid() != self._parent:
                self.say("the process that started this one has gone: ended")
                os._exit(1)


def _leave_the_rope() -> None:
    """In a forked process, whose signals are not its parent's."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_the_rope)
