"""What a part of the measurements is given, and what it leaves: a table on the screen and a JSON file."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a part is given.

    Attributes:
        output: folder of its files.
        authors: the authors' hornet.py; None leaves the rows against it out.
        images: what the script reads; None leaves what needs it out.
        small: tiny sizes, to try the script on a CPU. Nothing that it measures then means anything.
        deadline: of `time.time()`.
    """

    output: Path
    authors: Path | None
    images: Path | None
    small: bool
    deadline: float

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.time()


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What has to be reached; one of the two limits is given."""

    name: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def limit(self) -> str:
        return f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"

    def met(self, value: float | None) -> bool | None:
        """None for what was not measured; nan is not met."""
        if value is None:
            return None
        return value >= self.at_least if self.at_least is not None else value <= self.at_most  # type: ignore[operator]


@dataclass(kw_only=True)
class Report:
    """Of one part: all rows of a table have the same keys, `found` has a value for each bar that was measured, and
    `times` what medians were taken of, if it says."""

    part: str
    machine: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    found: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    times: dict[str, list[float]] = field(default_factory=dict)

    def save(self, output: Path) -> None:
        """Replaces the part's file, which is whole at any moment."""
        output.mkdir(parents=True, exist_ok=True)
        written = output / f"{self.part}.json.new"
        written.write_text(json.dumps(asdict(self), indent=1, default=str) + "\n", encoding="utf-8")
        written.replace(output / f"{self.part}.json")

    def show(self) -> None:
        print("\n" + self.markdown(), flush=True)

    def markdown(self) -> str:
        about = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        blocks = [f"## {self.part}\n\n{about}".rstrip()]
        blocks += [f"{title}\n\n{markdown_table(rows)}" for title, rows in self.tables.items() if rows]
        blocks += ["\n".join(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n\n".join(blocks) + "\n"


def read(part: str, output: Path) -> Report:
    """What the part saved; an empty report if it saved nothing."""
    file = output / f"{part}.json"
    return Report(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else Report(part=part)


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|")

    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(cell(value) for value in row.values()) + " |" for row in rows])


def summary(bars: Sequence[Bar], found: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each bar, with "met", "NOT MET" or "not measured"."""
    words = {True: "met", False: "NOT MET", None: "not measured"}
    values = [found.get(bar.name) for bar in bars]
    return [
        {"bar": bar.name, "wanted": bar.limit, "found": value, "": words[bar.met(value)]}
        for bar, value in zip(bars, values, strict=True)
    ]


def conclude(reports: Sequence[Report], bars: Sequence[Bar], job: Job) -> int:
    """Prints the bars, leaves them and all tables in summary.md, and gives the exit code: 1 where a bar is missed."""
    rows = summary(bars, {name: value for report in reports for name, value in report.found.items()})
    table = markdown_table(rows)
    blocks = [*(report.markdown() for report in reports), f"## bars\n\n{table}\n"]
    (job.output / "summary.md").write_text("\n".join(blocks), encoding="utf-8")
    print(f"\n## bars\n\n{table}\n\n{job.output}")
    if job.small:
        print("--small: no figure above means anything")
        return 0
    return int(any(row[""] == "NOT MET" for row in rows))


def parser(prog: str, description: str, parts: Sequence[str], *, images: str) -> argparse.ArgumentParser:
    """What both scripts are asked for."""

    def part(word: str) -> str:
        if word not in parts:
            raise argparse.ArgumentTypeError(f"no part named {word}: there are {', '.join(parts)}")
        return word

    def existing(word: str) -> Path:
        if not (path := Path(word)).exists():
            raise argparse.ArgumentTypeError(f"{word} does not exist")
        return path

    found = argparse.ArgumentParser(prog=prog, description=description)
    found.add_argument("parts", nargs="*", type=part, metavar="PART", help=f"of {', '.join(parts)}; default: all")
    found.add_argument("--authors", type=existing, help="the authors' hornet.py")
    found.add_argument("--images", type=existing, help=images)
    found.add_argument("--output", type=Path, required=True, help="folder for what is found")
    found.add_argument("--small", action="store_true", help="tiny sizes, to try it")
    return found
