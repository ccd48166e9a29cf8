"""One line of the table that `make faults` prints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """A fault and what came of it.

    Attributes:
        case: what was done.
        outcome: what was seen, in a few words: message, exit code, seconds.
        right: whether it was as it should be.
    """

    case: str
    outcome: str
    right: bool
