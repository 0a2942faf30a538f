"""What a certificate of losslessness says, and where it is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparkctl.verify.gradients import ratio

RATIO = 2.0  # times the reference's distance from the truth
COURSE_RATIO = 3.0  # an error of one step lives on in the next, so 30 weigh like a few: 2.35 seen once in 120 courses
FORMULA = 1e-3  # distance in fp32; on a CPU 3e-6 were seen


@dataclass(frozen=True)
class TensorRow:
    """A trained tensor, or its small namesakes of all layers: relative errors of its gradient.

    formula: the engine's in fp32, where that was computed.
    """

    name: str
    tensors: int
    ours: float
    theirs: float
    formula: float | None = None

    @property
    def ratio(self) -> float:
        """Times as far from the truth as the reference."""
        return ratio(self.ours, self.theirs)

    @property
    def excess(self) -> float | None:
        """The fp32 distance over what it may be: above 1 a formula differs."""
        return None if self.formula is None else ratio(self.formula, FORMULA)


@dataclass(frozen=True)
class Compared:
    """One number over many documents or steps: root mean square distances from the truth, over the truth's mean."""

    ours: float
    theirs: float
    floor: float
    limit: float = RATIO

    @property
    def ratio(self) -> float:
        """Times as far as the reference, which counts as at least the floor."""
        return self.ours / max(self.theirs, self.floor) if math.isfinite(self.ours) else math.inf


@dataclass(frozen=True)
class Point:
    """Loss a token and gradient norm of one optimiser step."""

    loss: float
    norm: float


@dataclass(frozen=True)
class Certificate:
    """What was found; `problems` is empty where the engine is lossless. tensors: the worst first."""

    engine: str
    tensors: list[TensorRow]
    document_loss: Compared
    course_loss: Compared
    course_norm: Compared
    steps: list[tuple[Point, Point, Point]]  # truth, reference, engine
    formula_skipped: str | None  # why the engine was not computed in fp32

    @property
    def worst(self) -> TensorRow:
        """The tensor that is farthest from the truth, in the reference's distances."""
        return self.tensors[0]

    @property
    def worst_formula(self) -> TensorRow | None:
        """The tensor that is farthest from the truth in fp32."""
        known = [row for row in self.tensors if row.excess is not None]
        return max(known, key=lambda row: row.excess or 0.0, default=None)

    @property
    def problems(self) -> list[str]:
        """A sentence for each limit that was passed, with the worst case of it."""
        found, count = [], len(self.tensors)
        if not self.worst.ratio <= RATIO:
            over = sum(not row.ratio <= RATIO for row in self.tensors)
            found.append(
                f"the gradient of `{self.worst.name}` is {self.worst.ratio:.2f} times as far from fp32 as the "
                f"reference's ({over} of {count} are over {RATIO:g})"
            )
        formula = self.worst_formula
        if formula and not (formula.excess or 0.0) <= 1:
            over = sum(row.excess is not None and not row.excess <= 1 for row in self.tensors)
            found.append(
                f"a formula differs: computed in fp32 the gradient of `{formula.name}` is {formula.formula or 0.0:.1e} "
                f"from the truth ({over} of {count} are too far)"
            )
        compared = {
            "the loss of single documents": self.document_loss,
            f"the loss over {len(self.steps)} steps": self.course_loss,
            f"the gradient norm over {len(self.steps)} steps": self.course_norm,
        }
        found += [
            f"{what} is {those.ratio:.2f} times as far from fp32 as the reference's (over {those.limit:g})"
            for what, those in compared.items()
            if not those.ratio <= those.limit
        ]
        return found


def compared(
    truth: Sequence[float], theirs: Sequence[float], ours: Sequence[float], *, floor: float, limit: float = RATIO
) -> Compared:
    """Distances of two engines' numbers from the truth's, over the truth's own root mean square."""
    scale = _rms(truth) or 1.0
    ours, theirs = ([a - b for a, b in zip(those, truth, strict=True)] for those in (ours, theirs))
    return Compared(_rms(ours) / scale, _rms(theirs) / scale, floor, limit)


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / max(1, len(values)))
