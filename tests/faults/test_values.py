"""A few tries; `python -m tests.faults values` makes thousands."""

from __future__ import annotations

from . import values


def test_recipes_of_random_values_are_accepted_or_told() -> None:
    wrong = [row for row in values.rows(thorough=False) if not row.right]
    assert not wrong, wrong
