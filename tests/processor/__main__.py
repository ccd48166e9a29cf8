"""The bars of speed and memory for a CPU, measured on this machine.

    python -m tests.processor --authors HORNET_PY --images FOLDER --output DIR    # all of it, about an hour
    python -m tests.processor rest --output DIR                                    # one part

HORNET_PY is the authors' hornet.py, FOLDER holds class folders of ImageNet's JPEGs; what is left out of the two leaves
its rows out. Each part writes PART.json into DIR as it goes; tables of all that was measured, and of the bars, are
printed and stand in DIR/summary.md. `--small` tries it at sizes that mean nothing. Exit code 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.device.report import Job, markdown_table, summary

PARTS = ("speed", "rest")
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler, which counts the memory, would write to stderr


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.processor", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--authors", type=Path, help="the authors' hornet.py")
    parser.add_argument("--images", type=Path, help="class folders of JPEGs")
    parser.add_argument("--output", type=Path, required=True, help="folder for what is found")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try it")
    options = parser.parse_args(words)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part named {min(unknown)}: there are {', '.join(PARTS)}")
    given = {"authors": options.authors, "images": options.images, "small": options.small}
    job = Job(output=options.output.resolve(), deadline=math.inf, **given)
    texts, rows = [], []
    for part in [part for part in PARTS if part in (options.parts or PARTS)]:
        module = importlib.import_module(f"tests.processor.{part}")
        report = module.run(job)
        report.show()
        texts.append(report.markdown())
        rows += summary(module.bars(), report.found)
    table = markdown_table(rows)
    (job.output / "summary.md").write_text("\n".join([*texts, table]) + "\n", encoding="utf-8")
    print(f"\n## bars\n\n{table}\n\n{job.output}")
    if options.small:
        print("--small: no figure above means anything")
        return 0
    return int(any(row[""] == "NOT MET" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
