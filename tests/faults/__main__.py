"""Everything that can go wrong, done, and what came of it, as Markdown tables.

    python -m tests.faults                # all of it (about an hour on two cores)
    python -m tests.faults disk kills     # these files of this folder

Exit code 1 where a row is not right.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

OTHERS = {"__init__", "__main__", "row"}


def main(names: list[str]) -> int:
    here = Path(__file__).parent
    found = sorted(path.stem for path in here.glob("*.py") if not path.stem.startswith("test_"))
    bad = 0
    for name in names or [name for name in found if name not in OTHERS]:
        module = importlib.import_module(f"{__package__}.{name}")
        started = time.monotonic()
        print(f"**{name}**: {module.__doc__.splitlines()[0]}\n\n| case | outcome | |\n|---|---|---|", flush=True)
        for row in module.rows(thorough=True):
            bad += not row.right
            outcome = " ".join(row.outcome.split()).replace("|", "\\|")
            print(f"| {row.case} | {outcome} | {'right' if row.right else 'WRONG'} |", flush=True)
        print(f"\n({time.monotonic() - started:.0f} s)\n", flush=True)
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
