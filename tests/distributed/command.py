"""`python -m hornet_lit` with the callbacks of started.py imported: a recipe may name classes of what a program has
imported, and else of installed packages alone."""

from __future__ import annotations

import sys

import tests.distributed.started  # noqa: F401
from hornet_lit.cli import main

if __name__ == "__main__":
    sys.exit(main())
