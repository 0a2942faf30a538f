"""`sparkctl doctor`: will this machine train, fast, and if not, what to do. It reads no run and writes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass, field, replace

from sparkctl import child
from sparkctl.doctor import chip, device, device_rules, fastpath, findings, ptx, rules, software, targets
from sparkctl.doctor.chip import Row
from sparkctl.doctor.device import Device
from sparkctl.doctor.fastpath import FastPath
from sparkctl.doctor.findings import Finding, Weight
from sparkctl.doctor.ptx import Assembler
from sparkctl.doctor.software import Installed
from sparkctl.doctor.targets import Target
from sparkctl.errors import SparkError
from sparkctl.hardware import nvml
from sparkctl.hardware.machine import torch_has_cuda
from sparkctl.progress import Progress, silent

QUICK_PTXAS = 0.8  # seconds for an answer of a ptxas there, which takes 0.02
QUICK_SECONDS = 2.0  # that NVML and CUDA may take where the whole has to take less than three


@dataclass(frozen=True)
class Report:
    """All that was found. target: whose features they are, None where none was named and no GPU is here.

    device, fast_path: None where they were not looked at.
    """

    target: Target | None
    device: Device | None
    assemblers: list[Assembler]
    software: list[Installed]
    features: list[Row] = field(default_factory=list)
    fast_path: FastPath | None = None
    findings: list[Finding] = field(default_factory=list)
    quick: bool = False

    @property
    def ok(self) -> bool:
        """Whether all that training needs is right."""
        return findings.train(self.findings)

    def about(self, subject: str) -> Finding | None:
        """The heaviest finding about a row."""
        return next((finding for finding in self.findings if finding.subject == subject), None)


def doctor(target: str | None = None, *, quick: bool = False, progress: Progress = silent) -> Report:
    """Look at this machine, or, with a target, at what can be said of any machine that has it.

    quick: no imports, no launches, no fast path. Raises UsageError at an unknown target, SparkError where no
    assembler here knows the one that was named.
    """
    named = None if target is None else targets.parse(target)
    assemblers = ptx.find(QUICK_PTXAS if quick else ptx.SECONDS)
    if named:
        return _of_target(named, assemblers, quick, progress)
    seen = device.look(seconds=QUICK_SECONDS if quick else device.SECONDS, toolkit=_toolkit(assemblers))
    if quick and seen.claims and seen.claims.problem and device_rules.OVERTIME in seen.claims.problem:
        seen = replace(seen, claims=None)
    here = targets.of_capability(seen.gpu.capability) if seen.gpu else None
    report = Report(here, seen, assemblers, software.look(), quick=quick)
    if quick:
        features, wrong = _features(report, progress)
        report = replace(report, features=features)
    else:
        report, wrong = _side_by_side(report, progress)
    wrong += device_rules.judge(seen, quick=quick) + list(rules.missing(report.software, seen.gpu is not None))
    wrong += rules.judge(_facts(report)) + (fastpath.judge(report.fast_path) if report.fast_path else [])
    return replace(report, findings=findings.by_weight(wrong))


def _side_by_side(report: Report, progress: Progress) -> tuple[Report, list[Finding]]:
    """torch and its rates by themselves, then the other imports, probes and the rest of the fast path, each in
    processes of its own; and what is wrong with the probes. Without torch nothing that stands on it is tried.

    One after the other they took 96 to 120 s on a busy H200 (2026-11-26).
    """
    installed, rates = software.rooted(report.software, progress), None
    if report.device and report.device.usable and software.ready(installed, software.TORCH):
        rates = fastpath.rates(progress)
        installed = software.answered(installed, rates.said.get("torch"), rates.problem)
        rates = rates if "torch" in rates.said else None
    with progress.task("looking at this machine", 3 if rates else 2) as task, child.at_once(3) as pool:
        path = pool.submit(fastpath.look, rates, progress) if rates else None
        imports = pool.submit(software.imported, installed, progress)
        probes = pool.submit(_features, report, progress)
        for done in as_completed(part for part in (path, imports, probes) if part):
            done.result()
            task.advance()
        features, wrong = probes.result()
        fast_path = path.result() if path else None
        return replace(report, software=imports.result(), features=features, fast_path=fast_path), wrong


def _of_target(target: Target, assemblers: list[Assembler], quick: bool, progress: Progress) -> Report:
    """What assembling alone says; launched too where its GPU is here."""
    gpu, beside = (None, ()) if quick else (nvml.read(device.SECONDS).gpu, targets.BESIDE)
    here = targets.of_capability(gpu.capability) if gpu else None
    launching = here is not None and here.number == target.number
    rows = chip.rows(target, assemblers, launching=launching, beside=beside, progress=progress)
    report = Report(target, None, assemblers, software.look(), rows, quick=quick)
    wrong = chip.judge(rows, target) + rules.judge(_facts(report))
    return replace(report, findings=findings.by_weight(wrong))


def _features(report: Report, progress: Progress) -> tuple[list[Row], list[Finding]]:
    """The GPU's features, none without one; that no assembler knows it is a finding here."""
    target = report.target
    if target is None:
        return [], []
    launching = report.device is not None and report.device.usable and not report.quick
    try:
        rows = chip.rows(target, report.assemblers, launching=launching, progress=progress)
    except SparkError as error:
        return [], [Finding("ptxas", Weight.NEEDED, error.message, error.hint)]
    return rows, chip.judge(rows, target)


def _facts(report: Report) -> rules.Facts:
    """What the rules about versions look at: this machine, or one with the target's GPU and the same versions."""
    gpu = report.device.gpu if report.device else None
    capability = (report.target.number // 10, report.target.number % 10) if report.target else None
    if gpu:
        major, minor = gpu.capability.split(".")
        capability = int(major), int(minor)
    carried = list(_carried(report.assemblers, report.target))
    return rules.Facts(
        versions=software.versions(report.software),
        capability=capability,
        requirements=software.requirements(),
        driver=gpu.cuda if gpu else None,
        torch=next((one.torch for one in report.software if one.torch), None) if gpu else None,
        cuda_build=torch_has_cuda() if gpu else None,
        target=report.target,
        assembler=carried[0] if carried else None,
        others=report.assemblers,
    )


def _carried(assemblers: list[Assembler], target: Target | None) -> Iterator[Assembler]:
    """The one that Triton calls for the target."""
    name = ptx.TRITON["ptxas-blackwell" if target and target.number >= ptx.BLACKWELL else "ptxas"]
    return (one for one in assemblers if one.name == name)


def _toolkit(assemblers: list[Assembler]) -> str | None:
    """The release of the CUDA toolkit here: its ptxas's."""
    return next((one.release for one in assemblers if one.name not in ptx.TRITON.values()), None)
