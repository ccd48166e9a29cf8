"""Running `hornet-lit` in this process: what it returns and prints, without ever training."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

# Before any redirection: Lightning keeps the stderr of its first import for its messages.
import hornet_lit.cli_lightning  # noqa: F401
from hornet_lit.cli import main
from hornet_lit.cli_errors import MAX_LINES
from hornet_lit.module import ImageClassifier
from hornet_lit.network.build import build_network

PREFIX = "hornet-lit: error: "


class Accepted(Exception):
    """Raised in the place of a training."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Exit code (None: the command went on to train, or raised), error lines, and what it raised."""

    code: int | None
    error: list[str]
    raised: BaseException | None

    @property
    def text(self) -> str:
        return " ".join(self.error)

    @property
    def is_told(self) -> bool:
        """Exit code 2 and one to five lines, no exception."""
        return self.raised is None and self.code == 2 and 1 <= len(self.error) <= MAX_LINES

    def __str__(self) -> str:
        if self.raised is not None:
            return f"{type(self.raised).__name__}: {self.raised}"[:200]
        return f"exit {self.code}, {len(self.error)} line(s): {self.text[:160]}"


def ask(words: Sequence[str | Path], *, train: bool = False) -> Answer:
    """Run the command; unless `train`, it ends with `Accepted` where the Trainer would start."""
    errors = io.StringIO()
    code, raised = None, None
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            with contextlib.nullcontext() if train else _no_training():
                code = main([str(word) for word in words])
        except Exception as error:
            raised = error
    _, found, message = errors.getvalue().rpartition(PREFIX)
    return Answer(code=code, error=message.strip().splitlines() if found else [], raised=raised)


@contextlib.contextmanager
def _no_training() -> Iterator[None]:
    from lightning.pytorch import Trainer

    def accept(*_: Any, model: ImageClassifier, **__: Any) -> None:
        settings = model.hparams
        if settings["network_options"] or not timm.is_model(str(settings["network"])):
            with torch.device("meta"):  # as configure_model does, which would also load weights
                build_network(
                    settings["network"],
                    num_classes=settings["num_classes"] or 10,
                    in_chans=settings["in_chans"],
                    img_size=settings["img_size"],
                    options=settings["network_options"],
                )
        raise Accepted("the options were accepted")

    names = ("fit", "validate", "test", "predict")
    before = {name: getattr(Trainer, name) for name in names}
    try:
        for name in names:
            setattr(Trainer, name, accept)
        yield
    finally:
        for name, method in before.items():
            setattr(Trainer, name, method)


@contextlib.contextmanager
def empty_folder() -> Iterator[Path]:
    """A temporary folder as the current one."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(before)
