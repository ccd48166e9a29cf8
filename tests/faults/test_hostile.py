"""Files that claim more than they hold, without the gigabytes that `python -m tests.faults hostile` writes."""

from __future__ import annotations

import pytest

from hornet_lit.network.files import check_file

from . import sizes
from .command import empty_folder


@pytest.mark.parametrize("make", [sizes.claiming, sizes.lists])
def test_files_that_would_grow(make: object, monkeypatch: pytest.MonkeyPatch) -> None:
    with empty_folder() as folder:
        make(folder / "file")  # type: ignore[operator]
        with pytest.raises(ValueError, match=r"larger than|more bytes than"):
            check_file(folder / "file")
