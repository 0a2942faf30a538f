"""What is wrong, how much it weighs, and how to mend it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum


class Weight(IntEnum):
    """NEEDED: training is impossible or wrong. SLOW: it trains, slower or at more risk. NOTE: good to know."""

    NOTE = 1
    SLOW = 2
    NEEDED = 3


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. subject: the row it is about; source: where that is known from.

    mend: a command; None where none mends it.
    """

    subject: str
    weight: Weight
    what: str
    mend: str | None = None
    source: str | None = None


def by_weight(found: Iterable[Finding]) -> list[Finding]:
    """The heaviest first, each once; of equal weight in the order in which they were found."""
    return sorted(dict.fromkeys(found), key=lambda finding: -finding.weight)


def train(found: Iterable[Finding]) -> bool:
    """Whether all that training needs is right."""
    return all(finding.weight < Weight.NEEDED for finding in found)
