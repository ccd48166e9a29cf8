"""The fast part of every table of faults; `make faults` makes the whole ones."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.faults.__main__ import OTHERS

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("test_"))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OTHERS])
def test_each_is_as_it_should_be(name: str) -> None:
    found = list(importlib.import_module(f"tests.faults.{name}").rows(thorough=False))
    assert all(row.right for row in found), [row for row in found if not row.right]
