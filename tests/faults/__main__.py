"""Everything that can go wrong, done, and what came of it, as Markdown tables.

    python -m tests.faults                # all of it (about an hour on two cores)
    python -m tests.faults disk kills     # these files of this folder

Exit code 1 where a row is not right.
"""

from __future__ import annotations

import importlib
import re
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent


def tables() -> dict[str, ModuleType]:
    """The modules of this folder that have `rows`."""
    names = sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith(("test_", "__")))
    modules = {name: importlib.import_module(f"tests.faults.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "rows")}


def main(names: list[str]) -> int:
    found = tables()
    bad = 0
    for name in names or found:
        module = found[name]
        started = time.monotonic()
        print(f"**{name}**: {module.__doc__.splitlines()[0]}\n\n| case | outcome | |\n|---|---|---|", flush=True)
        for row in module.rows(thorough=True):
            bad += not row.right
            outcome = " ".join(row.outcome.split()).replace("|", "\\|")
            outcome = re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+", "…", outcome)
            print(f"| {row.case} | {outcome} | {'right' if row.right else 'WRONG'} |", flush=True)
        print(f"\n({time.monotonic() - started:.0f} s)\n", flush=True)
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
