"""What the small commands (convert, check-data, bench) share: an argparse that explains itself, and a progress bar."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from hornet_lit.cli_errors import UserError


class OptionParser(argparse.ArgumentParser):
    """Its errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\n{' '.join(self.format_usage().split())}")


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told how much more is done; on a terminal a bar on stderr shows it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
