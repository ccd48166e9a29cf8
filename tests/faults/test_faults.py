"""The fast part of every table of faults; `make faults` makes the whole ones."""

from __future__ import annotations

import pytest

from tests.faults.__main__ import tables


@pytest.mark.parametrize("name", tables())
def test_each_is_as_it_should_be(name: str) -> None:
    found = list(tables()[name].rows(thorough=False))
    assert all(row.right for row in found), [row for row in found if not row.right]
