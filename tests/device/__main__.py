"""Everything that waits for a GPU, measured in one call.

    python -m tests.device --authors HORNET_PY --images FOLDER_OR_TAR --output DIR          # all of it
    python -m tests.device cifar --images FOLDER_OR_TAR --output DIR                         # one part, all the time

HORNET_PY is the authors' hornet.py, FOLDER_OR_TAR CIFAR-10's images as class folders in train/ and test/; what is left
out of the two leaves its rows out. Each part writes PART.json (and steps.png) into DIR as it goes, and prints its
tables; at the end stands a table of all bars, which is in DIR/summary.md too. A part that fails or runs out of time
leaves the others alone. `--small` tries it all on a CPU, at sizes that mean nothing. Exit code 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from tests.device.process import run_apart
from tests.device.report import Job, conclude, parser, read

# Name → what it gets of the time that is left when its turn comes; the last takes it all. `speed` has rows with the
# kernels that `kernels` found faster.
PARTS = {"kernels": 0.15, "speed": 0.45, "steps": 0.55, "cifar": 1.0}
TO_END = 5.0  # seconds of a part's time for the end of its process


def main(words: Sequence[str]) -> int:
    started = time.time()
    options = _parser().parse_args(words)
    chosen = [part for part in PARTS if part in (options.parts or PARTS)]
    job = Job(
        output=options.output.resolve(),
        authors=options.authors,
        images=options.images,
        small=options.small,
        deadline=started + 60 * options.minutes,
    )
    job.output.mkdir(parents=True, exist_ok=True)
    for part in chosen:
        (job.output / f"{part}.json").unlink(missing_ok=True)  # of an earlier call
    for part in chosen:
        seconds = job.left() * (1.0 if part == chosen[-1] else PARTS[part])
        run_apart(part, replace(job, deadline=time.time() + seconds - TO_END), seconds)
        read(part, job.output).show()
    print(f"\n{time.time() - started:.0f} s")
    bars = [bar for part in chosen for bar in importlib.import_module(f"tests.device.{part}").bars()]
    return conclude([read(part, job.output) for part in chosen], bars, job)


def _parser() -> argparse.ArgumentParser:
    found = parser("python -m tests.device", __doc__.splitlines()[0], [*PARTS], images="CIFAR-10: folder or tar file")
    found.add_argument("--minutes", type=float, default=9.5, help="for all of it (9.5)")
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the part at hand ends as well
    sys.exit(main(sys.argv[1:]))
