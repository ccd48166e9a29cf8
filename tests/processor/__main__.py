"""The bars of speed and memory for a CPU of two cores, measured on this machine.

    python -m tests.processor --authors HORNET_PY --images FOLDER --output DIR
    python -m tests.processor rest --output DIR                                    # one part

HORNET_PY is the authors' hornet.py, FOLDER holds class folders of ImageNet's JPEGs; what is left out of the two leaves
its rows out. All processes ask for real-time priority, since a second busy process makes OpenMP's loops many times
slower, and up to eleven networks are in memory at once. Each part writes PART.json into DIR as it goes, with the times
of all turns; tables of all that was measured, and of the bars, are printed and stand in DIR/summary.md. What fails is
noted, and the rest goes on. `--small` tries it at sizes that mean nothing. Exit code 1 where a bar is missed.
"""

from __future__ import annotations

import importlib
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from hornet_lit import bench
from hornet_lit.network import native
from tests.device.report import Job, Report, conclude, parser

PARTS = ("speed", "rest")
PRIORITY = 10


def main(words: Sequence[str]) -> int:
    images = "class folders of JPEGs"
    options = parser("python -m tests.processor", __doc__.splitlines()[0], PARTS, images=images).parse_args(words)
    chosen = [part for part in PARTS if part in (options.parts or PARTS)]
    given = {"authors": options.authors, "images": options.images, "small": options.small}
    job = Job(output=options.output.resolve(), deadline=math.inf, **given)
    job.output.mkdir(parents=True, exist_ok=True)
    about = machine(words, priority=0 if job.small else _raised())
    reports, bars = [], []
    for part in chosen:
        (job.output / f"{part}.json").unlink(missing_ok=True)  # of an earlier call
        module = importlib.import_module(f"tests.processor.{part}")
        report = Report(part=part, machine=about)
        reports.append(report)
        bars += module.bars()
        for section in module.sections(job, report):
            try:
                section()
            except Exception as error:  # whatever it comes to must not cost the other sections
                report.notes.append(f"failed: {type(error).__name__}: {str(error)[:300]}")
            report.save(job.output)
        report.show()
    return conclude(reports, bars, job)


def machine(words: Sequence[str], *, priority: int) -> dict[str, Any]:
    """What the figures hold for."""
    here = Path(__file__).parents[2]
    ours = "C++" if native.offers("pixelwise", "mlp_forward_f32") else "not built: PyTorch's operations"
    return {
        "command": shlex.join(["python", "-m", "tests.processor", *words]),
        "commit": _git(here, "rev-parse", "--short", "HEAD") + ("+ changes" if _git(here, "status", "--short") else ""),
        **bench.machine(torch.device("cpu")),
        "timm": timm.__version__,
        "kernels": ours,
        "priority": f"real-time {priority}" if priority else "ordinary",
    }


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True).stdout.strip()


def _raised() -> int:
    """This process's real-time priority, and that of all that it starts; 0 where it may have none."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(PRIORITY))
    except OSError:
        return 0
    return PRIORITY


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
