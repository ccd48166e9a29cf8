"""Signals to a process whose main thread is within a call into C, as in a collective that never ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

HANGS = """
import ctypes, sys
sys.argv = ["hornet-lit"]  # as the command, which has its handlers before torch: the package's __init__ goes by that
from hornet_lit import cli_process
cli_process.ANSWER_WITHIN = 1
process = cli_process.Process()
process.noting = {noting}
with process.signals():
    print("ready", flush=True)
    lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    while True:
        libc.pthread_mutex_lock(lock)  # for ever, the second time
"""


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("noting", [False, True])
def test_a_process_that_hangs_is_ended(signum: int, code: int, noting: bool) -> None:
    command = [sys.executable, "-c", HANGS.format(noting=noting)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == code and "answered nothing" in errors
