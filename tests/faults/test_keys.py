"""A few keys damaged; `python -m tests.faults keys` damages all."""

from __future__ import annotations

from . import keys


def test_damaged_keys_are_told() -> None:
    wrong = [row for row in keys.rows(thorough=False) if not row.right]
    assert not wrong, wrong
