"""Whether the fast path is taken, right, repeatable and fast here: two processes, of one set of imports each.

Rates are measured before anything else of `doctor` runs: whatever is beside them costs them something. Most of the
rest's time goes into imports and into compiling kernels: it runs beside all else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sparkctl import child
from sparkctl.doctor.findings import Finding, Weight
from sparkctl.hardware.ceiling import DEVICES, Ceiling
from sparkctl.progress import Progress, silent

# torch's import over a slow disk takes a minute, and so does compiling the proof's kernels the first time
SECONDS = {"speed": 90.0, "proof": 400.0}
RATES, PROOF = "speed", "proof"
RATIO = 2.0  # times the reference's distance from fp32, as in `verify lossless`
SHARE = 0.7  # of what the device should reach, below which something holds it back
RACE = "https://github.com/triton-lang/triton/issues/10590"
SUPPLY = "https://github.com/parallelArchitect/spark-gpu-throttle-check"
GB10 = "GB10"  # as its driver calls a Spark's GPU
SHARED = 10  # per cent of the time in which others compute, above which rates say little of the device
OTHERS = "`nvidia-smi` says who"
POWER = "`nvidia-smi -q -d PERFORMANCE,POWER` says why"


@dataclass(frozen=True)
class Operator:
    """An operator of the kernels folder and what it runs on here."""

    operator: str
    kernel: str
    reason: str
    slow: bool = False
    mend: str | None = None


@dataclass(frozen=True)
class Proof:
    """ratio: the worst tensor's distance from fp32, in times the reference's. differing: repeats that did not equal."""

    ratio: float
    tensor: str
    median: float
    repeats: int
    differing: list[int]
    seconds: float


@dataclass(frozen=True)
class Speed:
    """Operations and bytes a second, measured; gpu: None on a CPU. The rest is the GPU's meanwhile, MHz and watts;
    busy: per cent of the time in which others computed on it just before.
    """

    gpu: str | None
    operations: float
    bytes: float
    clock: float | None = None
    most_clock: float | None = None
    power: float | None = None
    throttled: list[str] = field(default_factory=list)
    busy: int | None = None

    @property
    def load(self) -> str:
        """Clock and power while products ran, in words; empty where nobody knows."""
        clock = f"{self.clock:,.0f} of {self.most_clock:,.0f} MHz" if self.clock and self.most_clock else ""
        power = f"{self.power:.0f} W" if self.power else ""
        held = f"held down: {', '.join(self.throttled)}" if self.throttled else ""
        return ", ".join(part for part in (clock, power, held) if part)

    @property
    def ceiling(self) -> Ceiling | None:
        """What the device should reach; None where nobody said."""
        words = (self.gpu or "").lower().split()
        return next((ceiling for name, ceiling in DEVICES.items() if name in words), None)

    @property
    def operations_share(self) -> float | None:
        """Of what large products should reach."""
        return self.operations / (self.ceiling.operations * self.ceiling.share) if self.ceiling else None

    @property
    def bytes_share(self) -> float | None:
        """Of the memory's rate."""
        return self.bytes / self.ceiling.bytes if self.ceiling else None

    @property
    def short(self) -> dict[str, str]:
        """What falls short of what it should reach, in words, by the row that shows it."""
        said = {}
        if self.operations_share is not None and self.operations_share < SHARE:
            at = f" (at {self.load})" if self.load else ""
            share = f"{self.operations_share:.0%} of what they should"
            said["power"] = f"bf16 products reach {self.operations / 1e12:.1f} TFLOP/s, {share}{at}"
        if self.bytes_share is not None and self.bytes_share < SHARE:
            said["memory"] = f"copies reach {self.bytes / 1e9:.0f} GB/s, {self.bytes_share:.0%} of what they should"
        return said


@dataclass(frozen=True)
class FastPath:
    """The answers that came. problems: why others did not, by part."""

    operators: list[Operator] = field(default_factory=list)
    proof: Proof | None = None
    speed: Speed | None = None
    problems: dict[str, str] = field(default_factory=dict)


class Answer(NamedTuple):
    """What a part said, and why it said no more."""

    said: dict[str, Any]
    problem: str | None


def rates(progress: Progress = silent) -> Answer:
    """Of products and copies, and before them torch itself, as `software.answered` reads it. Nothing else should run
    meanwhile.
    """
    with progress.task("importing torch, then measuring rates"):
        return _ask(RATES)


def look(rates: Answer, progress: Progress = silent) -> FastPath:
    """What the rates said, and the rest."""
    with progress.task("loading a small model by the fast path and by transformers, comparing gradients"):
        answer = _ask(PROOF)
    proof, speed = answer.said.get("proof"), rates.said.get("speed")
    return FastPath(
        [Operator(**one) for one in answer.said.get("operators", [])],
        Proof(**proof) if proof else None,
        Speed(**speed) if speed else None,
        {part: problem for part, problem in ((PROOF, answer.problem), (RATES, rates.problem)) if problem},
    )


def _ask(part: str) -> Answer:
    return Answer(*child.answers("sparkctl.doctor.exercise", part, seconds=SECONDS[part]))


def judge(found: FastPath) -> list[Finding]:
    """What is wrong with it."""
    return [finding for rule in RULES for finding in rule(found)]


def _failed(found: FastPath) -> Iterator[Finding]:
    for part, problem in found.problems.items():
        weight = Weight.SLOW if part == "speed" else Weight.NEEDED
        mend = f"`python -m sparkctl.doctor.exercise {part}` says why"
        yield Finding("fast path", weight, f"{part} of the fast path: {problem}", mend)


def _slow(found: FastPath) -> Iterator[Finding]:
    for one in found.operators:
        if one.slow:
            what = f"{one.operator} would run on its slow {one.kernel}: {one.reason}"
            yield Finding(one.operator, Weight.NEEDED, what, one.mend or "sparkctl train RUN --allow-slow")


def _wrong(found: FastPath) -> Iterator[Finding]:
    proof = found.proof
    if proof and not proof.ratio <= RATIO:
        what = (
            f"the native engine's gradient of `{proof.tensor}` is {proof.ratio:.1f} times as far from fp32 as eager's"
        )
        yield Finding("fast path", Weight.NEEDED, what, "sparkctl recommend RUN --engine reference")


def _differing(found: FastPath) -> Iterator[Finding]:
    proof = found.proof
    if proof and proof.differing:
        what = (
            f"{len(proof.differing)} of {proof.repeats} repeats of a forward and backward differ in their bits: a race"
        )
        yield Finding("fast path", Weight.NEEDED, what, "pip install 'triton>=3.8'", RACE)


def _held_back(found: FastPath) -> Iterator[Finding]:
    speed = found.speed
    if speed is None or not speed.short:
        return
    if (speed.busy or 0) > SHARED:
        what = f"others compute on the GPU {speed.busy} % of the time: {' and '.join(speed.short)}"
        yield Finding("power", Weight.SLOW, what, OTHERS)
        return
    for subject, said in speed.short.items():
        if subject == "power" and GB10 in (speed.gpu or ""):
            said += "; a power supply that is unplugged for a minute often ends it"
        yield Finding(subject, Weight.SLOW, said, POWER, SUPPLY if subject == "power" else None)


RULES: tuple[Callable[[FastPath], Iterator[Finding]], ...] = (_failed, _slow, _wrong, _differing, _held_back)
