"""predictions.csv: the top-k classes of every image, streamed, in input order, each image once on any number of ranks.

Every rank appends to its own part, `<output>.rank<r>.part`, as its batches come; rank 0 merges the sorted parts into a
temporary file, proves that no image is missing or doubled, and only then moves it into place. Neither step holds more
than a batch of rows, and nothing depends on how the images were dealt out to the ranks.

Shape legend: B images of a batch, K classes.
"""

import csv
import glob
import heapq
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from .names import class_names_of

PADDING = -1  # index of an image that only fills up a rank's last batch
NAMED_INDICES = 10  # an error names at most so many images


class PredictionWriter(BasePredictionWriter):
    """Write `trainer.predict`'s top-k classes to a CSV file.

    Columns: `file`, then `class_i`, `name_i`, `probability_i` for i = 1 … k, most probable first (equal
    probabilities: the lower class first); probabilities have 8 significant digits. Rows follow
    `trainer.datamodule.predict_files`. An earlier file of that name is replaced, in one move, at the very end.

    `predict_step` must return `{"index": index_B, "probability": probability_BK}`: the int64 position of each image in
    `predict_files` (−1: padding, left out), increasing on each rank, and the softmax over the classes in float32.
    Class names come from the module's `class_names`, else from the datamodule's; without either, numbers are names.

    While this callback is attached `trainer.predict` returns None: keeping the predictions would make memory grow with
    the number of images. With `limit_predict_batches` the table holds the images seen and the closing line says so.

    Args:
        output: the CSV file; missing folders are made. With several nodes it must lie on storage that all share.
        top_k: classes per image, at most as many as there are.

    Raises:
        ValueError: `top_k` below 1; `output` names a folder; a part that rank 0 cannot see; a missing, doubled or
            unordered image; class names that do not fit the network; a probability that is not a number.
    """

    def __init__(self, output: str = "predictions.csv", top_k: int = 5) -> None:
        super().__init__(write_interval="batch")
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}: ask for at least 1 class per image")
        self.output = output
        self.top_k = top_k
        self._part: IO[str] | None = None
        self._token = ""
        self._started = 0.0
        self._names: Sequence[str] | None = None
        self._files: Sequence[str] = ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "predict":
            _check_output(output=self.output)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear away the parts of an earlier run and open this rank's own."""
        files = getattr(getattr(trainer, "datamodule", None), "predict_files", None)
        if files is None:
            raise ValueError(
                "PredictionWriter needs the images' names: give trainer.predict a datamodule with predict_files"
            )
        self._files = files
        trainer.predict_loop.return_predictions = False
        output = Path(self.output)
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise ValueError(f"output {output}: {error.filename} is a file, not a folder: name another") from error
        if trainer.is_global_zero:
            for stale in output.parent.glob(f"{glob.escape(output.name)}.rank*.part"):
                stale.unlink()
        # The run's token heads each part: one that another run left, or is writing now, cannot be taken for ours.
        # The broadcast also keeps every rank from opening its part before rank 0 has cleared the old ones away.
        self._token = trainer.strategy.broadcast(secrets.token_hex(8))
        self._started = time.monotonic()
        part = _part_path(output, trainer.global_rank)
        self._part = open(part, "w", encoding="ascii", newline="\n")  # noqa: SIM115 (open until on_predict_end)
        self._part.write(f"{self._token}\n")

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in on_predict_start: Lightning calls the module's own, which may settle the names, after the callbacks'.
        self._names = class_names_of(trainer)

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append a batch to this rank's part, a line `index,class_1,probability_1,…` per image."""
        if not isinstance(prediction, dict) or not {"index", "probability"} <= prediction.keys():
            raise ValueError('PredictionWriter needs a predict_step that returns {"index": …, "probability": …}')
        assert self._part is not None, "a batch before on_predict_start"
        index_B, probability_BK = prediction["index"].cpu(), prediction["probability"]
        if self._names is not None and len(self._names) != probability_BK.shape[1]:
            raise ValueError(
                f"the network has {probability_BK.shape[1]} classes but there are {len(self._names)} class names: "
                "predict with the weights and the class list of one and the same training"
            )
        class_Bk, probability_Bk = top_classes(probability_BK=probability_BK, k=self.top_k)
        for index, classes, probabilities in zip(
            index_B.tolist(), class_Bk.tolist(), probability_Bk.tolist(), strict=True
        ):
            if index == PADDING:
                continue
            if any(p != p for p in probabilities):
                name = self._files[index] if 0 <= index < len(self._files) else f"image {index}"
                raise ValueError(
                    f"{name}: the network's output is not a number: check the weights, or use precision 32"
                )
            cells = ",".join(f"{c},{p:.8g}" for c, p in zip(classes, probabilities, strict=True))
            self._part.write(f"{index},{cells}\n")
        # For writers Lightning keeps every batch's list of samples, some 100 bytes an image; ours come in `index`.
        seen = getattr(getattr(trainer.predict_dataloaders, "batch_sampler", None), "seen_batch_indices", None)
        if seen:
            seen[batch_idx] = ()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the parts on rank 0. Every rank raises what went wrong there, so that none waits for another."""
        self._close()
        trainer.strategy.barrier("PredictionWriter: parts written")
        problem = None
        if trainer.is_global_zero:
            try:
                self._finish(trainer)
            except (OSError, ValueError) as error:
                problem = str(error)
        problem = trainer.strategy.broadcast(problem)
        if problem is not None:
            raise ValueError(problem)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()  # the parts stay, for whoever wants the rows; the next run clears them away

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self._part is not None:
            part, self._part = self._part, None
            part.close()

    def _finish(self, trainer: Trainer) -> None:
        output = Path(self.output)
        parts = [_part_path(output, rank) for rank in range(trainer.world_size)]
        limit = trainer.limit_predict_batches
        whole = isinstance(limit, float) and limit == 1.0  # the int 1 means one batch
        rows = merge_parts(
            parts=parts, token=self._token, files=self._files, names=self._names, output=output, whole=whole
        )
        for part in parts:
            part.unlink()
        rate = rows / max(time.monotonic() - self._started, 1e-9)
        some = "" if rows == len(self._files) else f" of {len(self._files)} (limit_predict_batches={limit})"
        print(f"predictions: {rows} rows{some} in {output.resolve()} ({rate:.0f} rows/s)", flush=True)


def top_classes(*, probability_BK: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The min(k, K) most probable classes of each image, class_Bk int64 and probability_Bk, on the CPU.

    Equal probabilities come in class order: `torch.topk` leaves that open, and a table must not depend on the device.
    """
    ordered = torch.sort(probability_BK, dim=1, descending=True, stable=True)
    return ordered.indices[:, :k].cpu(), ordered.values[:, :k].cpu()


def merge_parts(
    *, parts: Sequence[Path], token: str, files: Sequence[str], names: Sequence[str] | None, output: Path, whole: bool
) -> int:
    """Merge the ranks' parts into `output`, which appears complete or not at all; return the number of rows.

    Args:
        parts: one sorted file per rank, headed by `token`.
        files: the name of each image, by index.
        names: the name of each class, or None for its number.
        whole: whether every one of `files` must have its row.

    Raises:
        ValueError: an absent or foreign part, an index that is missing, doubled, out of order or not in `files`.
    """
    unseen = [part.name for part in parts if not part.exists()]
    if unseen:
        raise ValueError(
            f"rank 0 does not see {_listed(unseen)} in {parts[0].parent.resolve()}: "
            "put output on storage that all nodes share, and let only one run at a time write to it"
        )
    temporary = output.with_name(f"{output.name}.tmp")
    streams = [_part_rows(part, token) for part in parts]
    try:
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            merged = heapq.merge(*streams, key=itemgetter(0))
            rows = _write_table(file=file, rows=merged, files=files, names=names, whole=whole)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, output)
    finally:
        for stream in streams:
            stream.close()
        temporary.unlink(missing_ok=True)
    folder = os.open(output.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself must outlive a power cut
    finally:
        os.close(folder)
    return rows


def _write_table(
    *,
    file: IO[str],
    rows: Iterator[tuple[int, list[str]]],
    files: Sequence[str],
    names: Sequence[str] | None,
    whole: bool,
) -> int:
    table = csv.writer(file, lineterminator="\n")
    census = _Census(total=len(files))
    count = 0
    for index, cells in rows:
        if count == 0:
            numbers = range(1, len(cells) // 2 + 1)
            table.writerow(["file", *(f"{part}_{i}" for i in numbers for part in ("class", "name", "probability"))])
        count += 1
        if not census.see(index):
            continue
        row = [files[index]]
        for number, probability in zip(cells[::2], cells[1::2], strict=True):
            row += [number, names[int(number)] if names is not None else number, probability]
        table.writerow(row)
    census.check(whole=whole)
    if count == 0:
        raise ValueError("no image was predicted: no table was written")
    return count


class _Census:
    """Tells from an increasing stream of indices which of 0 … total−1 are missing or doubled, in constant memory."""

    def __init__(self, *, total: int) -> None:
        self.total = total
        self.expected = 0
        self.missing: list[int] = []
        self.doubled: list[int] = []
        self.unknown: list[int] = []
        self.missing_count = 0

    def see(self, index: int) -> bool:
        """Note the index; whether it is one to write."""
        if not 0 <= index < self.total:
            self.unknown = [*self.unknown, index][: NAMED_INDICES + 1]
            return False
        if index < self.expected:
            self.doubled = [*self.doubled, index][: NAMED_INDICES + 1]
            return False
        self._skip_to(index)
        self.expected = index + 1
        return True

    def check(self, *, whole: bool) -> None:
        self._skip_to(self.total)
        problems = []
        if whole and self.missing_count:
            problems.append(f"{self.missing_count} of {self.total} images missing: index {_listed(self.missing)}")
        if self.doubled:
            problems.append(f"images predicted twice: index {_listed(self.doubled)}")
        if self.unknown:
            problems.append(f"predictions for images that do not exist: index {_listed(self.unknown)}")
        if problems:
            raise ValueError(
                f"{'; '.join(problems)}. The predict dataloader must deal each of predict_files to exactly one "
                "rank and mark padding with index −1 (use_distributed_sampler=False). No table was written; "
                "the parts are kept"
            )

    def _skip_to(self, index: int) -> None:
        self.missing_count += index - self.expected
        room = NAMED_INDICES + 1 - len(self.missing)
        self.missing += range(self.expected, min(index, self.expected + room))


def _part_rows(part: Path, token: str) -> Iterator[tuple[int, list[str]]]:
    with open(part, encoding="ascii", newline="\n") as file:
        if file.readline() != f"{token}\n":
            raise ValueError(f"{part} was not written by this run: let only one run at a time write to one output")
        last = -1
        for line in file:
            head, *cells = line.rstrip("\n").split(",")
            index = int(head)
            if index < last:
                raise ValueError(
                    f"{part}: image {index} came after image {last}: the predict dataloader must not shuffle"
                )
            last = index
            yield index, cells


def _check_output(*, output: str) -> None:
    if not output or output.endswith(("/", os.sep)) or Path(output).is_dir():
        raise ValueError(f"output {output!r} is a folder: name a file in it, such as {Path(output, 'predictions.csv')}")


def _part_path(output: Path, rank: int) -> Path:
    return output.with_name(f"{output.name}.rank{rank}.part")


def _listed(things: Sequence[object]) -> str:
    shown = ", ".join(str(thing) for thing in things[:NAMED_INDICES])
    return shown + (", …" if len(things) > NAMED_INDICES else "")
