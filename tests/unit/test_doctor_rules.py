"""Versions that are wrong together: each rule with libraries that it finds and with their neighbours."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from sources import ROOT

from sparkctl.doctor import rules, software
from sparkctl.doctor.findings import Weight
from sparkctl.doctor.ptx import Assembler
from sparkctl.doctor.rules import Facts
from sparkctl.doctor.software import Installed, Library, Torch
from sparkctl.doctor.targets import GB10, HOPPER

GOOD = {
    "torch": "2.11.0a0+eb65b36", "triton": "3.6.0", "flash-linear-attention": "0.6.0", "transformers": "5.17.0",
    "peft": "0.21.2", "datasets": "5.2.0", "safetensors": "0.8.0", "numpy": "2.2.6",
}  # fmt: skip
BUILT = Torch("13.1", ("sm_80", "sm_90", "sm_100", "sm_120", "compute_120"), available=True)
SPARK, HOPPER_GPU, BLACKWELL = (12, 1), (9, 0), (10, 3)
KNOWS = Assembler("triton's ptxas-blackwell", Path("/triton/ptxas-blackwell"), "12.9", frozenset({"sm_121a", "sm_90a"}))
OLD = Assembler("triton's ptxas-blackwell", Path("/triton/ptxas-blackwell"), "12.8", frozenset({"sm_120a", "sm_90a"}))
SYSTEM = Assembler("`/usr/local/cuda/bin/ptxas`", Path("/usr/local/cuda/bin/ptxas"), "13.0", frozenset({"sm_121a"}))


def facts(capability: tuple[int, int] | None = SPARK, torch: Torch | None = BUILT, **changes: object) -> Facts:
    """A good Spark, but for what is changed: `versions` replaces some, None takes one away."""
    versions = {**GOOD, **changes.pop("versions", {})}  # type: ignore[dict-item]
    settings = dict(driver=(13, 0), cuda_build=True, target=GB10, assembler=KNOWS, others=(KNOWS,)) | changes
    return Facts({k: v for k, v in versions.items() if v}, capability, torch=torch, **settings)  # type: ignore[arg-type]


def test_a_good_spark_and_a_good_hopper() -> None:
    assert rules.judge(facts()) == []
    assert rules.judge(facts(HOPPER_GPU, target=HOPPER, versions={"triton": "3.7.1", "torch": "2.13.0"})) == []


PYPI = {"torch": "2.11.0"}  # no image of NVIDIA's
CPU = facts(None, torch=None, target=None, versions={"flash-linear-attention": None})
CASES = [
    ("built for CPUs", rules.CUDA_TORCH, Weight.NEEDED, facts(torch=None, cuda_build=False, versions=PYPI)),
    (
        "none for compute capability 12.1", rules.CUDA_TORCH, Weight.NEEDED,
        facts(torch=Torch("12.6", ("sm_90",), True), versions=PYPI),
    ),
    ("none for compute capability 12.1", None, Weight.NEEDED, facts(torch=Torch("12.6", ("sm_90",), True))),
    ("the driver runs CUDA 12.8; from 580 on", None, Weight.NEEDED, facts(driver=(12, 8))),
    ("finds no GPU", "says why", Weight.NEEDED, facts(torch=Torch("13.1", BUILT.architectures, False))),
    (
        "stops at sm_120a", "pip install 'triton>=3.6'", Weight.NEEDED,
        facts(assembler=OLD, others=(OLD,), versions=PYPI),
    ),
    ("stops at sm_120a", None, Weight.NEEDED, facts(assembler=OLD, others=(OLD,))),
    (
        "compiles nothing for sm_121a", "`export TRITON_PTXAS_BLACKWELL_PATH=/usr/local/cuda/bin/ptxas`", Weight.NEEDED,
        facts(assembler=OLD, others=(OLD, SYSTEM)),
    ),
    ("wrong on Hopper with Triton 3.6.0", None, Weight.NOTE, facts(HOPPER_GPU, target=HOPPER)),
    ("Triton 3.7.0 for key", None, Weight.NOTE, facts(HOPPER_GPU, target=HOPPER, versions={"triton": "3.7.0"})),
    ("tl.dot races on Blackwell", ">=0.6", Weight.NEEDED, facts(versions={"flash-linear-attention": "0.5.2"})),
    ("tl.dot races", ">=0.6", Weight.NEEDED, facts(BLACKWELL, versions={"flash-linear-attention": "0.5.2"})),
    (
        "with Triton 3.7.1, and flash-linear-attention 0.5.2", ">=0.6", Weight.NEEDED,
        facts(versions={"flash-linear-attention": "0.5.2", "triton": "3.7.1"}),
    ),
    ("older Triton than 3.6.0", None, Weight.NEEDED, facts(versions={"torch": "2.10.0a0+b4e4ee8"})),
    ("without bitsandbytes", "pip install bitsandbytes", Weight.SLOW, facts(versions={"unsloth": "2026.10.9"})),
    ("older than what was tested", ">=5.17", Weight.SLOW, facts(versions={"transformers": "5.14.1"})),
    ("drops the ends", rules.CUDA_EXTRA, Weight.NOTE, facts(versions={"flash-linear-attention": None})),
    ("5.17.0 drops the ends", None, Weight.NOTE, CPU),
    ("transformers' own Qwen3.5 fails", None, Weight.NOTE, facts(None, torch=None, target=None)),
    ("interpreter fails", "numpy<2.4", Weight.NOTE, facts(versions={"numpy": "2.4.6"})),
]  # fmt: skip


@pytest.mark.parametrize(("what", "mend", "weight", "faked"), CASES)
def test_a_rule(what: str, mend: str | None, weight: Weight, faked: Facts) -> None:
    found = rules.judge(faked)
    assert [finding.weight for finding in found] == [weight]
    assert what in found[0].what
    assert (mend in (found[0].mend or "")) if mend else found[0].mend is None
    assert found[0].source


COMMAND = re.compile(r"(pip|docker|sparkctl) \S.*|`[^`]+`( says why)?")


def test_every_mend_is_a_command() -> None:
    mends = [finding.mend for *_, faked in CASES for finding in rules.judge(faked) if finding.mend]
    assert [mend for mend in mends if not COMMAND.fullmatch(mend)] == []
    assert len(mends) > len(rules.RULES) / 2
    assert not COMMAND.fullmatch("take NVIDIA's image 26.03 or newer")
    for mend in mends:
        shlex.split(mend.strip("`").removesuffix("` says why"))
        assert " to debug" not in mend
        assert ", where" not in mend


def test_the_torch_to_install_is_the_lock_s() -> None:
    lock = (ROOT / "locks" / "gpu.txt").read_text().splitlines()
    assert rules.LOCKED_TORCH in lock
    assert f"'{rules.LOCKED_TORCH}'" in rules.CUDA_TORCH


def test_what_an_image_of_nvidia_s_built_is_never_replaced() -> None:
    """By any mend: of a rule, of a requirement that is not met, of an import that fails."""
    asked = {"unsloth": ["torch<2.11", "triton<3.6", "datasets<5"]}
    mends = {one.what.partition("wants ")[2][:5]: one.mend for one in rules.judge(facts(requirements=asked))}
    assert mends == {"torch": None, "trito": None, "datas": "pip install 'datasets<5'"}
    outside = rules.judge(facts(requirements=asked, versions=PYPI))
    assert [one.mend for one in outside] == ["pip install 'torch<2.11'", "pip install 'triton<3.6'", mends["datas"]]
    again = "pip install --force-reinstall --no-deps '{}=={}'"
    for torch, kept in (("2.11.0a0+eb65b36", {"torch", "triton"}), ("2.11.0", set())):
        versions = {"torch": torch, "triton": "3.6.0", "peft": "0.21.2"}
        broken = [
            Installed(Library(name, name, "always"), version, imports=False, problem="ImportError: x")
            for name, version in versions.items()
        ]
        found = {one.subject: one.mend for one in rules.missing(broken, gpu=True)}
        assert found == {n: None if n in kept else again.format(n, v) for n, v in versions.items()}


def test_every_rule_has_a_case() -> None:
    assert all(any(rule.finding(faked) for *_, faked in CASES) for rule in rules.RULES)


@pytest.mark.parametrize(
    "faked",
    [
        facts(HOPPER_GPU, target=HOPPER, versions={"triton": "3.3.1", "torch": "2.10.0"}),  # before the bug
        facts(HOPPER_GPU, target=HOPPER, versions={"flash-linear-attention": None, "transformers": "5.23.0"}),
        facts(HOPPER_GPU, target=HOPPER, versions={"triton": "3.7.1", "flash-linear-attention": "0.5.2"}),
        facts(versions={"triton": "3.8.0", "flash-linear-attention": "0.5.2"}),  # it doesn't race there
        facts(versions={"torch": "2.10.0", "triton": "3.6.0"}),  # no build of NVIDIA's
        facts(versions={"unsloth": "2026.10.9", "bitsandbytes": "0.50.2"}),
        facts(torch=Torch("13.0", ("sm_90", "compute_90"), True)),  # its PTX serves every later GPU
        facts(torch=Torch("13.0", ("sm_90", "compute_121"), True)),  # and its own
        facts(driver=(13, 2)),
        facts(driver=None, torch=None),
        facts(versions={"numpy": "2.4.6", "triton": "3.7.1"}),
    ],
)
def test_neighbours_of_what_is_wrong(faked: Facts) -> None:
    assert rules.judge(faked) == []


def test_a_kernel_does_not_run_on_an_earlier_minor() -> None:
    newer = Torch("13.0", ("sm_121",), True)
    assert "none for compute capability 12.0" in rules.judge(facts((12, 0), torch=newer, target=None))[0].what
    assert rules.judge(facts((12, 1), torch=newer)) == []


def test_requirements_that_are_not_met() -> None:
    asked = {
        "unsloth": [
            "torch<2.15,>=2.4", "datasets!=4.0.*,<5,>=3.4.1", "transformers<=5.17.0", "trl<=1.15.0",
            "triton>=99; sys_platform == 'win32'", "numpy>=99; extra == 'dev'", "nothing-of-ours>=9", "no requirement",
            "Flash_Linear.Attention>=0.5",
        ],
    }  # fmt: skip
    with_it = {"unsloth": "2026.10.9", "bitsandbytes": "0.50.2", "trl": "1.16.0"}
    found = rules.judge(facts(versions=with_it, requirements=asked))
    assert [finding.mend for finding in found] == [
        "pip install 'datasets!=4.0.*,<5,>=3.4.1'",
        "pip install 'trl<=1.15.0'",
    ]
    assert found[1].what == "unsloth 2026.10.9 wants trl<=1.15.0, and 1.16.0 is here"
    assert {finding.weight for finding in found} == {Weight.SLOW}


@pytest.mark.parametrize(
    ("version", "numbers"),
    [
        ("2.11.0a0+eb65b36", (2, 11, 0)),
        ("2026.10.9", (2026, 10, 9)),
        ("3.7.1.post1", (3, 7, 1)),
        ("unknown", ()),
        ("", ()),
    ],
)
def test_versions_as_numbers(version: str, numbers: tuple[int, ...]) -> None:
    assert rules.numbers(version) == numbers


def test_libraries_that_are_missing_or_broken() -> None:
    def one(name: str, need: software.Need, version: str | None, imports: bool | None = None) -> Installed:
        return Installed(Library(name, name, need), version, imports, None if imports else "died of SIGSEGV")

    installed = [
        one("torch", "always", None), one("triton", "gpu", None), one("unsloth", "choice", None),
        one("peft", "always", "0.21.2", False), one("bitsandbytes", "choice", "0.50.2", False),
        one("transformers", "always", "5.17.0", True),
    ]  # fmt: skip
    on_gpu = [(f.subject, f.weight, f.mend) for f in rules.missing(installed, gpu=True)]
    assert on_gpu == [
        ("torch", Weight.NEEDED, "pip install dgx-sparkctl"),
        ("triton", Weight.NEEDED, "pip install 'dgx-sparkctl[cuda]'"),
        ("peft", Weight.NEEDED, "pip install --force-reinstall --no-deps 'peft==0.21.2'"),
        ("bitsandbytes", Weight.NOTE, "pip install --force-reinstall --no-deps 'bitsandbytes==0.50.2'"),
    ]
    assert "triton" not in [f.subject for f in rules.missing(installed, gpu=False)]
