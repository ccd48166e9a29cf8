"""A part in a process of its own: a kernel that fails leaves CUDA unusable, and a compilation cannot be interrupted."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import traceback

from tests.device.report import Job, read


def run_apart(part: str, job: Job, seconds: float) -> None:
    """Runs the part and leaves its report in the job's folder, also if it fails or is stopped after `seconds`."""
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(part, job))
    process.start()
    try:
        process.join(seconds)
    finally:
        late = process.is_alive()
        if late:
            os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
            process.join()
    if process.exitcode:
        report = read(part, job.output)
        report.notes.append("stopped, its time was up" if late else f"failed: exit code {process.exitcode}")
        report.save(job.output)


def _run(part: str, job: Job) -> None:
    os.setpgid(0, 0)  # so that all that it starts ends with it
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler, which counts the memory, would write to stderr
    try:
        importlib.import_module(f"tests.device.{part}").run(job).save(job.output)
    except Exception as error:  # whatever a GPU or compiler comes to: it is told, and the other parts go on
        report = read(part, job.output)
        report.notes.append(f"failed: {''.join(traceback.format_exception_only(error)).strip()[:500]}")
        report.save(job.output)
