"""Going on without unreadable images: listed on disk, at most so many, and the same ones in a resumed run.

Processes agree through the list alone: each appends what it meets, and counts what all have met.
"""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

from .images import UnreadableImageError


class SkipList:
    """The unreadable images of one split: a CSV file of (file, reason), one row per image or, rarely, two.

    Args:
        path: of the list; it and its folder are made when there is something to write.
        cap: how many different images may be in it.
        where: the split's folder, for messages.
    """

    def __init__(self, path: Path, *, cap: int, where: str) -> None:
        self.path = path
        self.cap = cap
        self.where = where

    def add(self, error: UnreadableImageError) -> None:
        """Note an image.

        Raises:
            UnreadableImageError: more than `cap` different images are in the list now.
        """
        files = self.files()
        if error.file in files:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        row = io.StringIO()
        csv.writer(row, lineterminator="\n").writerow((error.file, error.reason))
        # One write to a file opened so is never mixed with another process's.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, row.getvalue().encode("utf-8", "surrogateescape"))
        finally:
            os.close(descriptor)
        if len(self.files()) > self.cap:
            raise UnreadableImageError(
                f"more than data.skip_unreadable {self.cap} images of {self.where} cannot be read, the last is "
                f"{error.file}: {error.reason}. {self.path} lists them, `hornet-lit check-data` finds all: replace "
                f"them, or raise data.skip_unreadable",
                file=error.file,
                reason=error.reason,
            ) from error

    def files(self) -> list[str]:
        """The different images in the list, in the order of their discovery."""
        try:
            with open(self.path, encoding="utf-8", errors="surrogateescape", newline="") as file:
                return list(dict.fromkeys(row[0] for row in csv.reader(file) if row))
        except FileNotFoundError:
            return []

    def report(self, *, size: int, outcome: str) -> str:
        """How many of the split's `size` images are in the list and what came of them; "" if none are."""
        files = self.files()
        if not files:
            return ""
        shown = ", ".join(files[:5]) + (", …" if len(files) > 5 else "")
        count = f"{len(files)} of the {size} images of {self.where}"
        return f"{count} cannot be read {outcome}; {self.path} lists them: {shown}"
