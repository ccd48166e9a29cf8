"""hornet-lit check-data: reads every image of a data set as a training would, and reports what is wrong or odd.

torch is imported only once the options are right: the reading code is that of the data modules.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hornet_lit.cli_errors import UserError
from hornet_lit.cli_parts import OptionParser, progress_bar

if TYPE_CHECKING:
    from hornet_lit.data.checking import Findings
    from hornet_lit.data.sources import LabelledImages

FIRST = 5  # examples of each kind on the screen; the report has all
COLUMNS = ("kind", "split", "class", "file", "detail", "group")
ACROSS_SPLITS, ACROSS_CLASSES, COPIES = "same bytes in two splits", "same bytes in two classes", "same bytes"
_MEANING = {
    ACROSS_SPLITS: "the scores of the one will be too high",
    ACROSS_CLASSES: "one of the labels is wrong",
    COPIES: "harmless, but counted twice",
}


@dataclass
class _Opened:
    """What PATH holds: images by split, what keeps a fit from beginning, and what it would warn of."""

    taken_for: str
    is_fit: bool
    splits: dict[str, LabelledImages] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def run(words: list[str]) -> None:
    """Runs `check-data` with the options ``words``; UserError for a usage mistake, SystemExit(1) for bad data."""
    options = _options(words)
    from hornet_lit.data import checking

    try:
        opened = _open(options)
        findings = {}
        with progress_bar("reading", sum(map(len, opened.splits.values()))) as advance:
            for split, images in opened.splits.items():
                findings[split] = checking.inspect(images, workers=options.workers, advance=advance)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    groups = list(checking.duplicates(list(findings.values())))
    report = Report(opened, findings, groups, path=options.path)
    report.print()
    report.save(options.output)
    print(f"\nreport: {options.output}")
    print(report.verdict())
    if report.fails():
        raise SystemExit(1)


def _options(words: list[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="hornet-lit check-data",
        description="Reads every image under PATH as a training would, and reports unreadable files, odd modes, "
        "duplicates and class counts. Exit code 1 if a fit (of a folder without splits: predict) would fail on it.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "path",
        metavar="PATH",
        type=Path,
        help="what --data.root would be: a folder with train/ and val/, of tar files or shards; or images to predict",
    )
    parser.add_argument("--output", metavar="FILE", type=Path, default=Path("check-data.json"), help=".json or .csv")
    parser.add_argument("--workers", metavar="N", type=int, default=os.cpu_count() or 1, help="processes that read")
    same = parser.add_argument_group("as under --data of fit")
    same.add_argument("--dataset", choices=("", "wds/"), default=None)
    same.add_argument("--train_split", metavar="NAME", default="train")
    same.add_argument("--val_split", metavar="NAME", default="val")
    same.add_argument("--val_fraction", metavar="SHARE", type=float)
    same.add_argument("--class_map", metavar="FILE")
    options = parser.parse_args(words)
    if not options.path.exists():
        raise UserError(f"{options.path} does not exist\ngive the folder that --data.root would be")
    if options.class_map is not None and not Path(options.class_map).is_file():
        raise UserError(f"--class_map {options.class_map}: no such file")
    if options.val_fraction is not None and not 0 < options.val_fraction < 1:
        raise UserError(f"--val_fraction {options.val_fraction}: give a share between 0 and 1, such as 0.1")
    if options.output.suffix not in (".json", ".csv"):
        raise UserError(f"--output {options.output}: its name must end in .json or .csv")
    if not options.output.absolute().parent.is_dir() or options.output.is_dir():
        raise UserError(f"--output {options.output}: name a file in a folder that exists")
    if not os.access(options.output.absolute().parent, os.W_OK):
        raise UserError(f"--output {options.output}: its folder cannot be written to\nname a file in another one")
    if options.workers < 0:
        raise UserError(f"--workers {options.workers}: give a number of processes, or 0 to read in this one")
    return options


# ---- what PATH is


def _open(options: argparse.Namespace) -> _Opened:
    from hornet_lit.data.checking import ListedImages
    from hornet_lit.data.predict import find_images
    from hornet_lit.data.sources import tar_images

    path = options.path
    dataset = options.dataset
    if path.is_dir():
        data = _data_module(options, dataset or "")
        found = any(data.find_split(split) for split in (options.train_split, options.val_split))
        if dataset is None and not found and any(path.glob("*.tar")):
            dataset = "wds/"
        if found or dataset:
            return _open_splits(options, dataset or "")
    kind = "images to predict" if path.suffix != ".tar" else "a tar file of class folders, without splits"
    opened = _Opened(kind, is_fit=False)
    try:
        if path.is_file() and path.suffix == ".tar":
            opened.splits["all"] = tar_images(path)
        else:
            opened.splits["all"] = ListedImages(str(path), *find_images(str(path)))
    except ValueError as error:
        opened.problems.append(str(error))
    if path.is_dir():
        opened.notes.append(
            f"checked for predict: a fit needs {options.train_split}/ and {options.val_split}/ in its data.root"
        )
    return opened


def _data_module(options: argparse.Namespace, dataset: str) -> Any:
    from hornet_lit.data import ImageNetDataModule

    return ImageNetDataModule(
        root=str(options.path),
        dataset=dataset,
        train_split=options.train_split,
        val_split=options.val_split,
        val_fraction=options.val_fraction,
        class_map=options.class_map,
    )


def _open_splits(options: argparse.Namespace, dataset: str) -> _Opened:
    """The data module's own set-up for a fit says what is wrong; each split that can be listed is read all the same."""
    data = _data_module(options, dataset)
    opened = _Opened("WebDataset shards" if dataset else "data.root of a fit", is_fit=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            data.setup_data("fit")
        except ValueError as error:
            opened.problems.append(str(error))
    opened.notes += [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    seen: set[str | None] = {None}
    for split, name in (("train", options.train_split), ("val", options.val_split), ("test", "test")):
        try:
            place = data.find_split(name)
            if place not in seen:
                seen.add(place)
                opened.splits[split] = data.open_split(name)
        except ValueError as error:
            if str(error) not in opened.problems:
                opened.problems.append(str(error))
    return opened


# ---- the report


class Report:
    """What was found, for the screen, for a file, and for the exit code."""

    def __init__(
        self,
        opened: _Opened,
        findings: dict[str, Findings],
        groups: Sequence[list[tuple[int, int]]],
        *,
        path: Path,
    ) -> None:
        self.opened = opened
        self.findings = findings
        self.path = path
        self._names = list(findings)
        self._all = list(findings.values())
        self.groups: dict[str, list[list[tuple[int, int]]]] = {ACROSS_SPLITS: [], ACROSS_CLASSES: [], COPIES: []}
        for group in groups:
            kinds = []
            if len({split for split, _ in group}) > 1:
                kinds.append(ACROSS_SPLITS)
            if len({self._class(*place) for place in group}) > 1:
                kinds.append(ACROSS_CLASSES)
            for kind in kinds or [COPIES]:
                self.groups[kind].append(group)

    def fails(self) -> bool:
        """Whether a fit would fail; where there are no splits, whether predict would."""
        read = [each for split, each in self.findings.items() if split != "test"]
        return bool(self.opened.problems) or any(each.unreadable for each in read)

    def verdict(self) -> str:
        what = "a fit" if self.opened.is_fit else "predict"
        if self.fails():
            skip = " (data.skip_unreadable lets a fit go on without some)" if self.opened.is_fit else ""
            return f"{what} would fail on {self.path}{'' if self.opened.problems else skip}"
        test = self.findings.get("test")
        also = ", but `hornet-lit test` would fail" if test is not None and test.unreadable else ""
        return f"{what} can read all of {self.path}{also}"

    # ---- screen

    def print(self) -> None:
        print(f"{_shown(str(self.path))}: {self.opened.taken_for}\n")
        self._print_table()
        for title, lines in (("wrong", self.opened.problems), ("to know", self.opened.notes)):
            for line in lines:
                print(f"\n{title}: {_shown(line)}")
        for split, found in self.findings.items():
            pairs = list(found.unreadable.items())
            self._print_some(
                f"unreadable in {split}",
                [f"{self._file(found, index)}: {reason}" for index, reason in pairs[:FIRST]],
                len(pairs),
            )
        for kind, groups in self.groups.items():
            lines = [" = ".join(self._file(self._all[s], i) for s, i in group[:3]) for group in groups[:FIRST]]
            self._print_some(f"{kind} ({_MEANING[kind]})", lines, len(groups))

    def _print_table(self) -> None:
        from hornet_lit.data.checking import ODDITIES

        heads = ["", "images", "classes", "of images each", "unreadable", *ODDITIES, "width", "height"]
        rows = [heads]
        for split in self.findings:
            facts = self._facts(split)
            counts = facts["classes"].values()
            rows.append(
                [
                    split,
                    str(facts["images"]),
                    str(len(counts)),
                    _span(min(counts, default=0), max(counts, default=0)),
                    str(facts["unreadable"]),
                    *(str(facts[odd]) for odd in ODDITIES),
                    _span(*facts["width"]),
                    _span(*facts["height"]),
                ]
            )
        shown = [place for place in range(len(heads)) if place < 5 or any(row[place] != "0" for row in rows[1:])]
        widths = [max(len(row[place]) for row in rows) for place in shown]
        for row in rows if len(rows) > 1 else []:
            print("  ".join(row[place].rjust(width) for place, width in zip(shown, widths, strict=True)).rstrip())

    @staticmethod
    def _print_some(title: str, lines: Sequence[str], total: int) -> None:
        if total:
            print(f"\n{title}: {total}")
            for line in lines:
                print(f"  {_shown(line)}")
            if total > len(lines):
                print(f"  … and {total - len(lines)} more in the report")

    # ---- file

    def save(self, output: Path) -> None:
        """Everything, a finding a line; the file appears complete or not at all."""
        from hornet_lit.data.checking import ODDITIES

        temporary = output.with_name(f".{output.name}.{os.getpid()}")
        try:
            with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                if output.suffix == ".csv":
                    table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                    table.writeheader()
                    table.writerows(self._rows(ODDITIES))
                else:
                    head = {
                        "path": str(self.path),
                        "taken_for": self.opened.taken_for,
                        "fails": self.fails(),
                        "problems": self.opened.problems,
                        "notes": self.opened.notes,
                        "splits": {split: self._facts(split) for split in self.findings},
                        "duplicates": {kind: len(groups) for kind, groups in self.groups.items()},
                    }
                    file.write(json.dumps(head, indent=1)[:-2] + ',\n "findings": [')
                    for number, row in enumerate(self._rows(ODDITIES)):  # one by one: there may be a million
                        file.write(("," if number else "") + "\n  " + json.dumps(row))
                    file.write("\n ]\n}\n")
            os.replace(temporary, output)
        finally:
            temporary.unlink(missing_ok=True)

    def _rows(self, kinds: Sequence[str]) -> Iterator[dict[str, Any]]:
        for problem in self.opened.problems:
            yield dict.fromkeys(COLUMNS, "") | {"kind": "problem", "detail": problem}
        for split, found in enumerate(self._all):
            for index, reason in found.unreadable.items():
                yield self._row("unreadable", split, index, detail=reason)
            for bit, kind in enumerate(kinds):
                for index in (found.odd_N >> bit & 1).nonzero()[0].tolist():
                    yield self._row(kind, split, index)
        number = 0
        for kind, groups in self.groups.items():
            for group in groups:
                number += 1
                for split, index in group:
                    yield self._row(kind, split, index, group=number)

    def _row(self, kind: str, split: int, index: int, *, detail: str = "", group: int | str = "") -> dict[str, Any]:
        found = self._all[split]
        values = (kind, self._names[split], self._class(split, index), self._file(found, index), detail, group)
        return dict(zip(COLUMNS, values, strict=True))

    def _facts(self, split: str) -> dict[str, Any]:
        import numpy as np

        from hornet_lit.data.checking import ODDITIES

        found = self.findings[split]
        images = found.images
        counts = np.bincount(images.label_N, minlength=len(images.classes)).tolist()
        sizes = found.size_N[found.size_N[:, 0] > 0]
        spans = [[int(s.min()), int(s.max())] if len(s) else [0, 0] for s in sizes.T]
        odd = {kind: int((found.odd_N >> bit & 1).sum()) for bit, kind in enumerate(ODDITIES)}
        facts = {
            "images": len(images),
            "unreadable": len(found.unreadable),
            **odd,
            "width": spans[0],
            "height": spans[1],
        }
        return facts | {"classes": dict(zip(images.classes, counts, strict=True))}

    def _class(self, split: int, index: int) -> str:
        images = self._all[split].images
        return images.classes[images.label_N[index]]

    def _file(self, found: Findings, index: int) -> str:
        name = found.images.name(index)
        return name.removeprefix(str(self.path).rstrip("/") + "/")


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"


def _shown(text: str) -> str:
    """Names of files may hold anything, also what a terminal would obey."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
