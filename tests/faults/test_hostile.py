"""A quarter of the hostile files, none of the large ones; `python -m tests.faults hostile` tries all."""

from __future__ import annotations

import pytest

from hornet_lit.network.files import check_file

from . import hostile, sizes
from .command import empty_folder


def test_hostile_files_are_refused() -> None:
    wrong = [row for row in hostile.rows(thorough=False) if not row.right]
    assert not wrong, wrong


@pytest.mark.parametrize("make", [sizes.claiming, sizes.lists])
def test_files_that_would_grow(make: object, monkeypatch: pytest.MonkeyPatch) -> None:
    with empty_folder() as folder:
        make(folder / "file")  # type: ignore[operator]
        with pytest.raises(ValueError, match=r"larger than|more bytes than"):
            check_file(folder / "file")
