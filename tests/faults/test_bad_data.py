"""Some of the bad data; `python -m tests.faults bad_data` has all."""

from __future__ import annotations

import warnings

from . import bad_data


def test_bad_data_is_told_or_read_right() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = [row for row in bad_data.rows(thorough=False) if not row.right]
    assert not wrong, wrong
