"""`sparkctl doctor`: its options, and its answers as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparkctl.cli import console, diagnosis, kernel_rows
from sparkctl.cli.options import JsonOpt
from sparkctl.errors import SparkError, UsageError

if TYPE_CHECKING:
    from sparkctl.doctor.fastpath import FastPath
    from sparkctl.doctor.findings import Finding
    from sparkctl.doctor.software import Installed
    from sparkctl.steps.doctor import Report


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(doctor)


def doctor(
    target: Annotated[
        str | None, typer.Option("--target", help="What an architecture has, with no GPU: sm_121a is a DGX Spark.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Under 3 s: no imports, no launches, no fast path.")] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Compile every Triton kernel for the target; sm_121a unless one is named.")
    ] = False,
    json: JsonOpt = False,
) -> None:
    """Say whether this machine trains, and fast, and what to do where it does not."""
    if kernels:
        if quick:
            raise UsageError("`--kernels` compiles for a while", "leave out `--quick`")
        return _kernels(target, json)
    from sparkctl.steps.doctor import doctor as work

    report = work(target, quick=quick, progress=console.progress())
    console.answer(_report(report), diagnosis.report(report), json=json)
    for finding in report.findings:
        diagnosis.say(finding)
    if not report.ok:
        raise typer.Exit(1)


def _kernels(target: str | None, json: bool) -> None:
    from sparkctl.doctor.kernels import compile_all

    made = compile_all(target)
    answer = {"ok": not made.faults, **asdict(made)}
    console.answer(answer, kernel_rows.kernels(made), json=json)
    if made.faults:
        hint = "smaller tiles, fewer stages or 4 warps, in the launcher of that kernel.py"
        console.failure(SparkError("\n".join(made.faults), hint), json=False)
        raise typer.Exit(1)


def _report(report: Report) -> dict[str, Any]:
    device = asdict(report.device) if report.device else None
    if report.device and device:
        device["unified"] = report.device.unified
        device["disks"] = [{**asdict(disk), "folder": str(disk.folder)} for disk in report.device.disks]
    return {
        "ok": report.ok,
        "target": str(report.target) if report.target else None,
        "device": device,
        "ptxas": [{"name": one.name, "path": str(one.path), "release": one.release} for one in report.assemblers],
        "software": [_software(one, report) for one in report.software],
        "features": [asdict(row) for row in report.features],
        "fast_path": _fast_path(report.fast_path) if report.fast_path else None,
        "findings": [_finding(finding) for finding in report.findings],
        "hints": [finding.mend for finding in report.findings if finding.mend],
    }


def _fast_path(found: FastPath) -> dict[str, Any]:
    """JSON has no infinity: null stands for an error without bounds."""
    said = asdict(found)
    for name in ("ratio", "median"):
        if found.proof and not math.isfinite(said["proof"][name]):
            said["proof"][name] = None
    return said


def _software(one: Installed, report: Report) -> dict[str, Any]:
    """right: None where it is not installed, or was not tried."""
    found = report.about(one.library.name)
    untried = one.version is None or (one.imports is None and one.problem is not None and found is None)
    return {
        "name": one.library.name,
        "version": one.version,
        "imports": one.imports,
        "right": None if untried else found is None,
        "why": found.what if found else one.problem,
        **({"torch": asdict(one.torch)} if one.torch else {}),
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {**asdict(finding), "weight": finding.weight.name.lower()}
