"""What `sparkctl doctor` found, for a person."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from sparkctl.cli import console, machine_rows
from sparkctl.cli.chip_tables import assembled, features, plain
from sparkctl.doctor.findings import Finding, Weight
from sparkctl.words import counted

if TYPE_CHECKING:
    from sparkctl.doctor.software import Installed
    from sparkctl.steps.doctor import Report

LABELS = {
    Weight.NEEDED: ("error:", "bold red"),
    Weight.SLOW: ("warning:", "bold yellow"),
    Weight.NOTE: ("note:", "bold"),
}


def say(finding: Finding) -> None:
    """A finding on stderr, with what mends it."""
    source = f" ({finding.source})" if finding.source else ""
    label, style = LABELS[finding.weight]
    console.remark(finding.what + source, finding.mend, label, style)


def report(found: Report) -> RenderableType:
    """One screen: the verdict, then the parts that were looked at; findings come below it, on stderr."""
    below = [Text()] if found.findings else []
    return Group(verdict(found), *(part for section in _sections(found) for part in (Text(), section)), *below)


def verdict(found: Report) -> Text:
    """The answer in a line."""
    slow = sum(finding.weight == Weight.SLOW for finding in found.findings)
    needed = sum(finding.weight == Weight.NEEDED for finding in found.findings)
    gpu = found.device.gpu if found.device else None
    name = f"{gpu.name}, {found.target or gpu.capability}" if gpu else str(found.target or "no GPU")
    unproved = sum(row.unproved for row in found.features)
    if needed and needed == unproved:
        return Text(f"{name}: not proved, {counted(needed, 'feature')} that training needs", style="bold red")
    if needed:
        return Text(f"{name}: does not train yet, {counted(needed, 'thing')} to mend", style="bold red")
    if not found.device:
        launched = any(row.proof in ("launched", "both") for row in found.features)
        how = "assembled and launched" if launched else "by assembling alone: its GPU is not here"
        return Text(f"{name}: has what training needs, {how}", style="bold")
    if slow:
        return Text(f"{name}: trains, and {counted(slow, 'thing')} may hold it back", style="bold yellow")
    if gpu is None and found.quick and found.device.fitted:
        return Text("a GPU that did not answer a quick look", style="bold yellow")
    if gpu is None:
        return Text("no GPU: trains small models on the CPU", style="bold yellow")
    depth = " (a quick look)" if found.quick else ", on the fast path"
    return Text(f"{name}: trains{depth}", style="bold green")


def _sections(found: Report) -> Iterator[RenderableType]:
    if found.device:
        yield console.rows("machine", *machine_rows.rows(found.device))
    yield _software(found)
    yield console.rows("assemblers", *((str(one), f"up to {one.newest()}") for one in found.assemblers))
    if found.features:
        yield features(found.features, str(found.target))
        if len(found.features[0].assembled) > 1:
            yield assembled(found.features)
    if found.fast_path:
        yield console.rows("fast path", *machine_rows.fast_path(found.fast_path))


def _software(found: Report) -> RenderableType:
    table = plain("library", "version", "")
    for one in found.software:
        if one.version or one.library.need != "choice":
            table.add_row(one.library.name, one.version or "none", _state(one, found))
    absent = [one.library.name for one in found.software if not one.version and one.library.need == "choice"]
    shown = console.titled("software", table)
    left_out = Text(f"not installed, not needed: {', '.join(absent)}", style="dim")
    return Group(shown, left_out) if absent else shown


def _state(one: Installed, found: Report) -> Text:
    finding = found.about(one.library.name)
    if finding:
        return Text(f"{LABELS[finding.weight][0]} see below", style=LABELS[finding.weight][1])
    if one.version is None:
        return Text("not needed without a GPU", style="dim")
    if one.problem:
        return Text(one.problem, style="yellow")
    built = f", for CUDA {one.torch.cuda}: {' '.join(one.torch.architectures)}" if one.torch and one.torch.cuda else ""
    return Text(("right" if one.imports else "installed") + built, style="green")
