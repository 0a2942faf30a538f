"""The table of a chip's features: assembled by a ptxas, and launched where the chip is here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from sparkctl import child
from sparkctl.doctor import launch, ptx
from sparkctl.doctor.features import FEATURES, Feature
from sparkctl.doctor.findings import Finding, Weight
from sparkctl.doctor.ptx import Assembled, Assembler
from sparkctl.doctor.targets import Target
from sparkctl.errors import SparkError
from sparkctl.progress import Progress, silent

Proof = Literal["assembled", "launched", "both"]
AT_ONCE = 4  # probes: each waits for a process
NEWER = "pip install --upgrade triton"  # each brings the ptxas of a newer CUDA
ONLY_A_LAUNCH = "assembles everywhere: only a launch tells"


@dataclass(frozen=True)
class Row:
    """A feature of one target. found: None where nothing here can tell. why: of a `no`, or of not knowing.

    assembled: what ptxas makes of it for each target that was asked for.
    """

    name: str
    expected: bool | None
    found: bool | None
    proof: Proof | None
    use: str
    needed: bool = False
    launch_only: bool = False
    why: str | None = None
    assembled: dict[str, bool | None] = field(default_factory=dict)

    @property
    def differs(self) -> bool:
        """Whether it is not as expected."""
        return None not in (self.expected, self.found) and self.expected != self.found

    @property
    def unproved(self) -> bool:
        """Whether training needs it and assembling, which could have told, did not."""
        return self.needed and not self.launch_only and self.found is None


def rows(
    target: Target,
    here: list[Assembler],
    *,
    launching: bool,
    beside: Sequence[Target] = (),
    progress: Progress = silent,
) -> list[Row]:
    """Every feature of the target. launching: its GPU is here. beside: targets to assemble for too.

    Raises SparkError where no assembler here knows the target.
    """
    by = ptx.choose(target, here)
    others = [other for other in beside if other != target]
    with progress.task("probing the chip", len(FEATURES)) as task, child.at_once(AT_ONCE) as pool:

        def row(feature: Feature) -> Row:
            found = _row(feature, target, by, launching)
            columns = {str(target): found.assembled[str(target)]} | {str(o): _other(feature, o, here) for o in others}
            task.advance()
            return replace(found, assembled=columns)

        return list(pool.map(row, FEATURES))


def _row(feature: Feature, target: Target, by: Assembler, launching: bool) -> Row:
    made = ptx.assemble(feature.probe.source(target), target, by)
    bare = Row(
        feature.named(target), feature.expected(target), made.accepted, "assembled", feature.use, feature.needed,
        feature.launch_only, made.why, {str(target): made.accepted},
    )  # fmt: skip
    if made.accepted and launching:
        return _launched(bare, feature, made, target)
    if made.accepted and feature.launch_only:
        return replace(bare, found=None, proof=None, why=ONLY_A_LAUNCH)
    return bare if made.accepted is not None else replace(bare, proof=None)


def _launched(bare: Row, feature: Feature, made: Assembled, target: Target) -> Row:
    probe = feature.probe
    said = launch.launch(
        made.cubin, words=len(probe.expected), threads=probe.threads, cluster=probe.cluster,
        shared=target.shared if probe.shared else 0,
    )  # fmt: skip
    if said.never:  # it says nothing of the feature
        bare = replace(bare, why=f"not launched: {said.problem}")
        return replace(bare, found=None, proof=None) if feature.launch_only else bare
    right = said.words == probe.expected
    why = said.problem or (None if right else f"it wrote {list(said.words)}, not {list(probe.expected)}")
    return replace(bare, found=right, proof="launched" if feature.launch_only else "both", why=why)


def _other(feature: Feature, target: Target, here: list[Assembler]) -> bool | None:
    try:
        by = ptx.choose(target, here)
    except SparkError:
        return None
    return ptx.assemble(feature.probe.source(target), target, by).accepted


def judge(found: list[Row], target: Target) -> list[Finding]:
    """What is wrong with a table: a feature that training needs is missing or not proved, or one is not as expected."""
    wrong = []
    for row in found:
        if row.needed and row.found is False:
            what = f"{target} has no {row.name}, which training needs and compute capability 8.0 has"
            what += f": {row.why}" if row.why else ""
            wrong.append(Finding(row.name, Weight.NEEDED, what))
        elif row.unproved:
            what = f"{row.name}, which training needs, is not proved of {target}: {row.why or 'no answer'}"
            wrong.append(Finding(row.name, Weight.NEEDED, what, NEWER if ptx.too_old(row.why) else None))
        elif row.differs:
            what = f"{row.name}: expected {yes(row.expected)} on {target}, found {yes(row.found)}"
            what += f" ({row.why})" if row.why else ""
            wrong.append(Finding(row.name, Weight.NOTE, f"{what}; nothing here depends on it"))
    return wrong


def yes(value: bool | None) -> str:
    """For a person."""
    return {True: "yes", False: "no", None: "?"}[value]
